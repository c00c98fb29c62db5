"""Build llama.cpp into the environment that runs this, with the converter of the same version beside it.

llama-cpp-python comes as source alone: its build takes a C++ compiler and some minutes.

    .venv-llama-cpp/bin/python tests/llama_cpp/install.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

BINDING, TORCH = "llama-cpp-python==0.3.36", "torch==2.13.0"
SOURCE = Path(sys.prefix) / "llama.cpp"


def pip(*arguments: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-q"], check=True, env=os.environ | environment)


if __name__ == "__main__":
    pip("install", TORCH, "sentencepiece", "protobuf")
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--no-binary", ":all:", "-d", folder, BINDING)
        source = next(Path(folder).glob("*.tar.gz"))
        pip("install", str(source), CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF")
        with tarfile.open(source) as archive:
            parts = ("/vendor/llama.cpp/con", "/vendor/llama.cpp/gguf-py/")
            kept = [m for m in archive.getmembers() if m.name.endswith(".py") and any(p in m.name for p in parts)]
            archive.extractall(folder, kept, filter="data")
        shutil.copytree(Path(folder, kept[0].name.split("/")[0], "vendor", "llama.cpp"), SOURCE, dirs_exist_ok=True)
