"""Nothing but the registry, downloads in its layouts and old folders needs sae-lens: all else works without it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import importlib.util
assert importlib.util.find_spec("sae_lens") is None
import pytest, torch
import fgsteer as fg
for name in fg.__all__:
    getattr(fg, name)
import fgsteer.serving, fgsteer.cli
model, tokenizer = fg.load_model("default")
sae = fg.load_sae("default")
vector = fg.from_features(sae, [12])
vector.save("vector.safetensors")
again = fg.SteeringVector.load("vector.safetensors", model)
options = {"max_new_tokens": 4}
plain, steered = (fg.generate(model, tokenizer, ["The day"], steering=s, **options) for s in (None, again.add(500.0)))
assert plain != steered
stats = fg.collect(model, tokenizer, fg.ContrastSet("x", positives=["the sea"], negatives=["a dog"]), sae=sae)
assert fg.caa(stats).norm > 0
for call in (fg.registry, lambda: fg.load_sae("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical"),
             lambda: fg.load_sae("old", hookpoint="blocks.1.hook_resid_post")):
    with pytest.raises(fg.FormatError, match="pip install sae-lens"):
        call()
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """All packages that are installed here, but sae-lens."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            if not entry.name.startswith(("sae_lens", "fgsteer", "_fgsteer")) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def test_all_but_downloads_works_without_it(packages, tmp_path):
    (tmp_path / "old").mkdir()  # as sae-lens wrote folders before its version 6
    (tmp_path / "old" / "cfg.json").write_text('{"architecture": "standard", "d_in": 8, "d_sae": 16}')
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
