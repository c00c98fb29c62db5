"""Build llama.cpp into the environment that runs this, with the converter of the same version beside it.

llama-cpp-python comes as source alone: its build takes a C++ compiler and some minutes.

    .venv-llama-cpp/bin/python tests/llama_cpp/install.py
"""

from __future__ import annotations

import os
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
            for member in archive.getmembers():
                _, found, inside = member.name.partition("/vendor/llama.cpp/")
                if found and inside.startswith(("con", "gguf-py/")) and inside.endswith(".py"):
                    content = archive.extractfile(member)
                    assert content is not None
                    (SOURCE / inside).parent.mkdir(parents=True, exist_ok=True)
                    (SOURCE / inside).write_bytes(content.read())
