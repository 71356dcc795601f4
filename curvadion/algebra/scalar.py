"""AdamW and Lion for what is not a hidden matrix: embeddings, the head, norms and biases. Local shards only,
no ranks."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from curvadion_kernels.reference import store_

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: dict[str, list[Tensor]],
    steps: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Take one AdamW step in place, with torch's own fused kernel: decoupled weight decay, eps outside the
    root. In the widest dtype of parameter, gradient and moments, float32 at least.

    Args:
        params, grads: local shards of equal shapes.
        moments: "exp_avg" and "exp_avg_sq", aligned with params.
        steps: (L,) float32 on the CPU, the steps taken before this one.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    """
    alike = _alike(params, grads, moments["exp_avg"], moments["exp_avg_sq"])
    # The kernel pairs elements as they lie in memory, in whatever order that is.
    x, g, first, second = ([t.contiguous() for t in tensors] for tensors in alike)
    # The fused kernel wants the counters beside the parameters; they are read, and the caller counts.
    on_gpu = x[0].is_cuda
    counters = (steps.pin_memory().to(x[0].device, non_blocking=True) if on_gpu else steps.clone()).unbind()
    adamw(
        x,
        g,
        first,
        second,
        [],
        list(counters),
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    for tensors, values in ((params, x), (moments["exp_avg"], first), (moments["exp_avg_sq"], second)):
        store_(tensors, values)


def lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: dict[str, list[Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """Take one Lion step in place.

        X <- (1 - lr wd) X - lr sign(b1 m + (1 - b1) g)
        m <- b2 m + (1 - b2) g

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675.
    """
    x, g, m = _alike(params, grads, moments["exp_avg"])
    direction = torch._foreach_lerp(m, g, 1 - betas[0])
    torch._foreach_sign_(direction)
    torch._foreach_mul_(x, 1 - lr * weight_decay)
    torch._foreach_add_(x, direction, alpha=-lr)
    torch._foreach_lerp_(m, g, 1 - betas[1])
    store_(params, x)
    store_(moments["exp_avg"], m)


def _alike(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the lists with the k-th tensors of all in their widest dtype, float32 at least."""
    widest = [
        functools.reduce(torch.promote_types, (t.dtype for t in row), torch.float32)
        for row in zip(*lists, strict=True)
    ]
    return [[t.to(dtype) for t, dtype in zip(tensors, widest, strict=True)] for tensors in lists]
