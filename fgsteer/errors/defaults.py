"""torch's defaults, which a caller may have changed, as they are at first while a public function runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def has_usual_defaults() -> bool:
    """Tell whether tensors that name neither are float32 and on the CPU."""
    return torch.get_default_dtype() == torch.float32 and torch.get_default_device().type == "cpu"


@contextmanager
def usual_defaults() -> Iterator[None]:
    """A block in which tensors that name neither are float32 and on the CPU."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
