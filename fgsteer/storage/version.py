"""The installed version of fgsteer, which every file that it writes records."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    """Return the installed version of fgsteer, or "unknown" where it is not installed."""
    try:
        return version("fgsteer")
    except PackageNotFoundError:
        return "unknown"
