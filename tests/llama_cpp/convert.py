"""Convert a Hugging Face model to GGUF in float32 with llama.cpp's own converter.

    python tests/llama_cpp/convert.py MODEL OUT.gguf

The converter refuses byte-level BPE that it does not know by its hash. Token ids are all that the tests
feed, so GPT-2's name does for any of them.
"""

from __future__ import annotations

import runpy
import sys

from tests.llama_cpp.install import SOURCE

if __name__ == "__main__":
    sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]
    from conversion import base  # type: ignore[import-not-found]

    base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    model, out = sys.argv[1:]
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "f32"]
    runpy.run_path(str(SOURCE / "convert_hf_to_gguf.py"), run_name="__main__")
