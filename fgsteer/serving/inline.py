"""Vectors that requests carry: the file of a vector as text in base64, of bounded size.

A vector is served under a name made of the text's hash, which no client can ask for by name. Equal requests share its
rows, which are freed when they are wanted and no request uses them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tempfile
import threading
from collections import Counter
from pathlib import Path

from fgsteer.errors import FgsteerError, SteeringError
from fgsteer.vector import SteeringVector

HEADER_BYTES = 1 << 16
"""The largest header of a vector in a request: its features and its provenance."""
_MARK = "="  # begins the names of vectors that requests carry; other names have none


def inline_chars(d_model: int) -> int:
    """The length of the longest text: a direction and a reference in float64, and a header, in base64."""
    return -(-(16 * d_model + HEADER_BYTES) // 3) * 4


def inline_name(text: str) -> str:
    """The name of the vector that a request carries as this text."""
    return _MARK + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def is_inline(name: str) -> bool:
    """Whether a name is that of a vector that a request carried."""
    return name.startswith(_MARK)


def encode_vector(vector: SteeringVector) -> str:
    """The text of a vector, for the key ``steer_vector`` of a request."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.safetensors"
        vector.save(path)
        return base64.b64encode(path.read_bytes()).decode()


def decode_vector(text: str, most_chars: int) -> SteeringVector:
    """The vector of a text. Raises SteeringError for one that is too long or damaged, and for another kind of file."""
    if len(text) > most_chars:
        raise SteeringError(
            f"steer_vector of {len(text):,} characters",
            f"the file of a vector in at most {most_chars:,} characters of base64",
            "send the vector without its provenance, or have it loaded by name",
        )
    try:
        content = base64.b64decode(text.encode("ascii", "replace"), validate=True)
    except binascii.Error as error:
        raise SteeringError("steer_vector that is not base64", "the file of a vector in base64") from error
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        try:
            file.write(content)
            file.flush()
            return SteeringVector.load(file.name)
        except FgsteerError as error:  # clients need not know where the server keeps files
            message = str(error).replace(file.name, "the file in steer_vector").rstrip(".")
            raise SteeringError(f"{message[:1].upper()}{message[1:]}.") from error


class Leases:
    """How many HTTP requests have asked for a name and have not been answered in full."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, name: str) -> None:
        """Count one more."""
        with self._lock:
            self._counts[name] += 1

    def give_back(self, name: str) -> None:
        """Count one fewer."""
        with self._lock:
            self._counts[name] -= 1
            self._counts = +self._counts  # keeps no name that nothing holds

    def __contains__(self, name: str) -> bool:
        return self._counts[name] > 0
