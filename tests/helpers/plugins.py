"""Packages of one module that plug into fgsteer by an entry point, as pip would install them."""

from __future__ import annotations

from pathlib import Path


def install_plugin(folder: Path, name: str, source: str) -> None:
    """Write the module ``name`` and its metadata to a folder; a process whose PYTHONPATH has the folder loads it."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[fgsteer.plugins]\n{name} = {name}\n", encoding="utf-8")
