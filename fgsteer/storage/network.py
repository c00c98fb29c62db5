"""Find out quickly whether the Hugging Face hub can be reached.

Its client tries a host that cannot be reached six times, for half a minute. Where one quick connection
fails, what follows runs on the cache alone, so that a file that is not in the cache is an error at once.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from urllib.parse import urlsplit
from urllib.request import getproxies

from fgsteer.errors.changes import Changes, temporary_change

CONNECT_SECONDS = 5.0
_switch = threading.RLock()


def hub_is_reachable() -> bool:
    """Tell whether a connection to the hub can be made; behind a proxy that is taken for granted."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if {address.scheme, "all"} & set(getproxies()):
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def describe_unreachable() -> str:
    """Say why nothing came from the hub, and what to do, as the last part of an error."""
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "it is not in the Hugging Face cache, and HF_HUB_OFFLINE is set: unset it"
    return f"it is not in the Hugging Face cache, and {constants.ENDPOINT} cannot be reached: check the network"


def hub_or_cache(source: object) -> AbstractContextManager[bool]:
    """Run the block on the Hugging Face cache alone where the hub cannot be reached; give whether it can.

    A ``source`` that is a path of this machine needs no hub, and no connection is tried.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.path.exists(str(source)) or hub_is_reachable():
        return nullcontext(enter_result=not constants.HF_HUB_OFFLINE)
    return _offline()


@temporary_change
def _offline(changes: Changes) -> Iterator[bool]:
    """A block in which huggingface_hub makes no connection; it gives False."""
    from huggingface_hub import constants

    with _switch:
        changes.set_attribute(constants, "HF_HUB_OFFLINE", True)
        try:
            yield False
        finally:
            changes.undo()  # before another thread goes on
