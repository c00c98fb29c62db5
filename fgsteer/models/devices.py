"""The device that a model is put on: by default a GPU of this machine, where there is one.

place(model, None); place(model, "cpu")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from fgsteer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def place(model: PreTrainedModel, device: torch.device | str | None) -> PreTrainedModel:
    """Return the model on a device; by default on this process's GPU, unless it is on a GPU already.

    Raises DataError for a device that this machine does not have, or that is full.
    """
    if device is None and (not torch.cuda.is_available() or any(p.device.type != "cpu" for p in model.parameters())):
        return model
    try:
        return model.to(own_gpu() if device is None else device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is unknown, missing or full
        raise device_error("The GPU" if device is None else f"device={device!s:.100}", error) from error


def own_gpu() -> str:
    """Return the GPU that this process takes: of several processes on a machine, each another one."""
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def device_error(name: str, error: Exception) -> DataError:
    """Return the error for a device on which torch cannot put a tensor."""
    reason = str(error).partition("\n")[0].rstrip(".")
    return DataError(
        f"{name} cannot be used: {reason}.",
        "a device of this machine with room for the model",
        "name another device, such as device=cpu",
    )
