"""Numbers that differ from matrix to matrix, on the device; uploaded only when something changed."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Numbers:
    """Hyper-parameters as the kernels want them: one number for all, or a tensor of one for each.

    Args:
        device: where they go.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._uploaded: dict[str, tuple[tuple[list[float], list[int]], Tensor]] = {}

    def on_device(self, name: str, values: Sequence[float], of: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return values[of[l]] for every l as a tensor on the device; `name` tells one such list from
        another."""
        before, tensor = self._uploaded.get(name, (None, None))
        if tensor is None or before != (values, of):
            host = [values[k] for k in of]
            pinned = torch.tensor(host, dtype=dtype, device="cpu", pin_memory=self._device.type == "cuda")
            tensor = pinned.to(self._device, non_blocking=True)
            self._uploaded[name] = (list(values), list(of)), tensor
        return tensor

    def each(self, name: str, values: Sequence[float], of: Sequence[int]) -> float | Tensor:
        """Return the number that values[of[l]] is for every l, or else all of them on the device, in
        float64."""
        different = {values[k] for k in set(of)}
        if len(different) > 1:
            return self.on_device(name, values, of, torch.float64)
        return next(iter(different), 1.0)
