"""The hot operations of CurvaDion, each under one name and one signature in one table; usable without the
optimizer.

`OPS` maps a name to its two implementations: `reference`, plain torch, is the definition and runs anywhere;
`triton` is the fused kernel, in `triton_ops.py`. Tests and benchmarks iterate over the table. `choose` says
which of them a program gets:

    ops = curvadion_kernels.choose("auto", device)
    sums = ops.momentum_norm_(momenta, grads, decay=0.95)

`curvadion_kernels.library` makes the same operations `torch.library` custom ops, for use under
`torch.compile`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from curvadion_kernels import reference

__all__ = ["KERNELS", "OPS", "Op", "Ops", "choose", "reference"]

KERNELS = ("auto", "triton", "reference")


@dataclass(frozen=True)
class Op:
    """One operation and its implementations, by name so that Triton is imported only where it is used."""

    name: str

    @property
    def reference(self) -> Callable[..., Any]:
        """The definition, in plain torch."""
        return getattr(reference, self.name)

    @property
    def triton(self) -> Callable[..., Any]:
        """The fused kernel. Raises ImportError without Triton."""
        return getattr(importlib.import_module("curvadion_kernels.triton_ops"), self.name)


OPS = {
    name: Op(name)
    for name in (
        "momentum_norm_",
        "gate_key",
        "local_step_",
        "low_rank_apply_",
        "column_sumsq",
        "symmetric_product",
        "sign_encode_",
        "sign_decode_",
    )
}


class Ops:
    """The operations from one of the two places.

    Attributes:
        kernels: "triton" or "reference".
        why: in words, why this one.
        momentum_norm_, gate_key, local_step_, low_rank_apply_, column_sumsq, symmetric_product, sign_encode_,
            sign_decode_: see `reference`.
    """

    def __init__(self, kernels: str, why: str):
        self.kernels, self.why = kernels, why
        for name, op in OPS.items():
            setattr(self, name, getattr(op, kernels))

    momentum_norm_: Callable[..., torch.Tensor]
    gate_key: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    local_step_: Callable[..., None]
    low_rank_apply_: Callable[..., None]
    column_sumsq: Callable[..., torch.Tensor]
    symmetric_product: Callable[..., torch.Tensor]
    sign_encode_: Callable[..., torch.Tensor]
    sign_decode_: Callable[..., None]


def choose(kernels: str = "auto", device: torch.device | str = "cpu") -> Ops:
    """Return the operations for tensors on a device.

    Args:
        kernels: "triton" or "reference" for that one; "auto" for Triton where it compiles for the device, the
            reference elsewhere.

    Raises ValueError for another word, and RuntimeError, with the reason, where Triton is asked for and
    cannot run.
    """
    if kernels not in KERNELS:
        raise ValueError(
            f"kernels must be one of {', '.join(map(repr, KERNELS))}; got {kernels!r}; try 'auto'"
        )
    device = torch.device(device)
    if kernels == "reference":
        return Ops("reference", "asked for")
    if kernels == "auto" and device.type != "cuda":
        return Ops("reference", f"Triton compiles for GPUs, and the parameters are on {device}")
    triton_ops, reason = _triton()
    if triton_ops is not None:
        reason = triton_ops.why_not(device)
    if reason is None:
        return Ops("triton", "asked for" if kernels == "triton" else f"the parameters are on {device}")
    if kernels == "triton":
        raise RuntimeError(
            f"kernels='triton' must be able to run Triton here; it cannot: {reason}; use kernels='auto'"
        )
    return Ops("reference", reason)


def _triton() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("curvadion_kernels.triton_ops"), None
    except ImportError as error:
        return None, f"Triton cannot be imported ({error}); pip install 'curvadion[kernels]'"
