#!/bin/sh
# An environment with the peers of speed.py, over the one of `python`, which stays as it is.
#   sh benchmarks/peers.sh build/peers && build/peers/bin/python benchmarks/speed.py
# Without their dependencies: steering-vectors 0.12.2 asks for transformers < 5 and repeng 0.4.0 for numpy < 2,
# and both do this work under later ones.
set -eu
python -m venv "$1"
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
echo "import site; site.addsitedir('$(python -c "$purelib")')" > "$("$1/bin/python" -c "$purelib")/base.pth"
"$1/bin/python" -m pip install -q scikit-learn tqdm
"$1/bin/python" -m pip install -q --no-deps steering-vectors==0.12.2 repeng==0.4.0 gguf==0.19.0
