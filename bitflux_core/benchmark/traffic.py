"""Counts what is copied from host memory to a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


class HostToDevice(TorchDispatchMode):
    """While active, adds up the bytes of every tensor copied from the CPU to another device in `bytes`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is _aten._to_copy.default:
            self._count(args[0], result)
        elif func is _aten.copy_.default:
            self._count(args[1], args[0])
        return result

    def _count(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.device.type == "cpu" and target.device.type != "cpu":
            self.bytes += target.nbytes
