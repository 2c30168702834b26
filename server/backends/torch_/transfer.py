"""From the host to the device without waiting for what the device still computes."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Small things that the host has just made. Only from pinned memory a copy waits for nobody."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def numbers_to_device(values: list[int], device: torch.device) -> Tensor:
    """int64."""
    return to_device(torch.tensor(values, dtype=torch.int64), device)
