"""The hot operations as `torch.library` custom ops, `torch.ops.curvadion.*`, for use inside
`torch.compile(fullgraph=True)`.

    import curvadion_kernels.library

    @torch.compile(fullgraph=True)
    def local_step(params, grads, decay, step_size, key):
        torch.ops.curvadion.local_step_(params, grads, decay, step_size, key)

Same meaning as in `reference.py`, with two differences that a schema needs: factors are tensors (0-d, or one
per parameter), so that a schedule recompiles nothing, and every tensor has a gradient. They change their
arguments in place without copies, and run Triton where it compiles for the device, the reference elsewhere
(`curvadion_kernels.choose("auto", device)`).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from curvadion_kernels import Ops, choose
from curvadion_kernels.reference import SIGN_BLOCK, SIGN_BYTES

# Their tables of addresses must not be made inside the memory pool of a graph that torch.compile captures.
_UNSAFE = [tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) is not None else None
_ops_for = lru_cache(None)(lambda device: choose("auto", device))


def _ops(tensor: Tensor) -> Ops:
    return _ops_for(tensor.device)


@torch.library.custom_op("curvadion::momentum_norm_", mutates_args=("momenta",), tags=_UNSAFE)
def momentum_norm_(momenta: Sequence[Tensor], grads: Sequence[Tensor], decay: Tensor) -> Tensor:
    """m_l <- c_l m_l + g_l; return the gate's message, (2 L + 2,) float32, first of it all ||m_l||^2."""
    return _ops(momenta[0]).momentum_norm_(momenta, grads, decay=decay)


@momentum_norm_.register_fake
def _(momenta: Sequence[Tensor], grads: Sequence[Tensor], decay: Tensor) -> Tensor:
    return momenta[0].new_empty(2 * len(momenta) + 2, dtype=torch.float32)


@torch.library.custom_op("curvadion::gate_key", mutates_args=())
def gate_key(
    sums: Tensor, last_norm: Tensor, tau: Tensor, hold_closed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (norm, rmmc, key) of the gate's message."""
    return _ops(sums).gate_key(sums, last_norm, tau, hold_closed=hold_closed)


@gate_key.register_fake
def _(sums: Tensor, last_norm: Tensor, tau: Tensor, hold_closed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(last_norm), torch.empty_like(last_norm), sums.new_empty((), dtype=torch.int64)


@torch.library.custom_op("curvadion::local_step_", mutates_args=("params",), tags=_UNSAFE)
def local_step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], decay: Tensor, step_size: Tensor, key: Tensor
) -> None:
    """X_l <- a_l X_l - b_l G_l where the key says that the gate is closed."""
    _ops(params[0]).local_step_(params, grads, decay=decay, step_size=step_size, key=key)


@torch.library.custom_op("curvadion::low_rank_apply_", mutates_args=("params", "momentum"), tags=_UNSAFE)
def low_rank_apply_(
    params: Sequence[Tensor],
    momentum: Tensor,
    P: Tensor,
    Q: Tensor,
    R: Tensor,
    transposed: bool,
    decay: Tensor,
    step_size: Tensor,
    feedback: Tensor,
) -> None:
    """X <- a X - b P Q^T,  M <- M - c P R^T."""
    _ops(P).low_rank_apply_(
        params, momentum, P, Q, R, transposed=transposed, decay=decay, step_size=step_size, feedback=feedback
    )


@torch.library.custom_op("curvadion::column_sumsq", mutates_args=())
def column_sumsq(R: Tensor) -> Tensor:
    """Return the squared norms of the columns, (B, n, r) -> (B, r) float64."""
    return (
        _ops(R).column_sumsq(R).clone()
    )  # an output must not be a view of what the allocator gave out for something else


@column_sumsq.register_fake
def _(R: Tensor) -> Tensor:
    return R.new_empty(R.shape[0], R.shape[2], dtype=torch.float64)


@torch.library.custom_op("curvadion::symmetric_product", mutates_args=())
def symmetric_product(A: Tensor, alpha: float, beta: float) -> Tensor:
    """Return alpha A^T A + beta A, (B, m, n) -> (B, n, n)."""
    return _ops(A).symmetric_product(A, alpha=alpha, beta=beta)


@symmetric_product.register_fake
def _(A: Tensor, alpha: float, beta: float) -> Tensor:
    return A.new_empty(A.shape[0], A.shape[2], A.shape[2])


@torch.library.custom_op("curvadion::sign_encode_", mutates_args=("residual",))
def sign_encode_(residual: Tensor, x: Tensor) -> Tensor:
    """Return e + x as one bit a value and a scale each 128, (18 values / 128,) uint8; e <- what they lack."""
    return _ops(residual).sign_encode_(residual, x)


@sign_encode_.register_fake
def _(residual: Tensor, x: Tensor) -> Tensor:
    return residual.new_empty(residual.numel() // SIGN_BLOCK * SIGN_BYTES, dtype=torch.uint8)


@torch.library.custom_op("curvadion::sign_decode_", mutates_args=("values",))
def sign_decode_(values: Tensor, payloads: Tensor) -> None:
    """v <- the mean of what the K rows of payloads stand for."""
    _ops(values).sign_decode_(values, payloads)
