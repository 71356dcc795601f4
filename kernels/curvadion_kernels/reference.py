"""Plain-torch reference of every hot operation of CurvaDion: the definition that a fused kernel must
reproduce.

Runs wherever torch runs. Low-precision tensors are computed in float32 (float64 stays float64) and rounded
once, when they are stored. Nothing here talks to other ranks.
"""

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from curvadion_kernels.fixed import Fixed as Fixed
from curvadion_kernels.fixed import Views, extremes, gathered, largest

# The gate's message, one int64 whose MAX over the replicas is the gate (non-negative floats order like
# integers):
#   bit 62       a non-finite value was seen
#   bit 61       the replicas must synchronize
#   bits 30..60  the float32 bits of the largest RMMC
#   bits 0..29   INDEX_MASK - (index of that matrix), so that ties go to the lowest; 0 when no RMMC is defined
NONFINITE_BIT = 1 << 62
SYNCHRONIZE_BIT = 1 << 61
INDEX_BITS = 30
INDEX_MASK = (1 << INDEX_BITS) - 1
FAILED_KEY = (1 << 63) - 1  # larger than any regular key: a rank could not do its part of the step
OUTSIDE_KEY = (
    FAILED_KEY - 2
)  # the same of a replica that is between steps; plus 1: it has seen a non-finite value
CHECK_KEY = FAILED_KEY - 3  # another replica checks that all ranks agree

SIGN_BLOCK = 128  # values that share a scale in `sign_encode_`
SIGN_BYTES = 2 + SIGN_BLOCK // 8  # of them and their scale

Scalar = float | Tensor
_DTYPE = operator.attrgetter("dtype")

NO_NORM = -1.0  # last_norm of a matrix that the gate has not seen yet


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are computed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def momentum_norm_(
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    decay: Scalar = 1.0,
    watch: Sequence[Tensor] = (),
    store: bool = True,
) -> Tensor:
    """Accumulate the gradients into the momenta and return the squared norms of what was stored: the gate's
    message.

        m_l <- c_l m_l + g_l,    s_l = ||m_l||_F^2

    Args:
        momenta: L local shards, any shapes, strides and floating-point dtypes, changed in place.
        grads: L gradients of the same shapes; None counts as zero.
        decay: c, the factor of the old momentum: one number, a 0-d tensor, or a tensor of L; c m is rounded
            to m's dtype.
        watch: further tensors that are only searched for NaN and infinities.
        store: whether to change the momenta; without it, only the norms that they would have are returned.

    Returns: (2 L + 2,) float32: s, not finite where a momentum is not; 1 if a watched tensor holds a NaN or
        an infinity, else 0; 0, the place of the flag that the replicas must synchronize (see `gate_key`); and
        for each gradient 1 if some of it is not zero, else 0.
    Bytes: one read of g, one read and one write of m, one read of what is watched.
    """
    count = len(momenta)
    if isinstance(decay, Tensor) and decay.ndim and decay.shape != (count,):
        raise ValueError(
            f"a factor must be one number or one per tensor; got shape {tuple(decay.shape)} for {count} "
            "tensors"
        )
    device = next((t.device for t in (*momenta, *watch)), None)
    flags = torch.zeros(2, dtype=torch.float32, device=device)
    watched = [t for t in watch if t.numel()]
    if watched:
        flags[:1] = ~largest(watched).isfinite().all()
    plain = not isinstance(decay, Tensor) and decay == 1.0
    if not momenta:
        norms = live = flags[:0]
    elif plain and isinstance(momenta, Views) and momenta[0].device.type == "cpu":
        norms, live = _accumulated_lots(momenta, grads, store=store)
    else:
        norms, live = _accumulated(momenta, grads, decay, store=store)
    return torch.cat([norms.square().to(flags), flags, live.to(flags)])


def _accumulated(
    momenta: Sequence[Tensor], grads: Sequence[Tensor | None], decay: Scalar, *, store: bool
) -> tuple[Tensor, Tensor]:
    """Do what `momentum_norm_` does; return the norms, and which gradients are not zero, (L,) bool."""
    count = len(momenta)
    if not store:  # one at a time, to hold a copy of one
        factors = decay.unbind() if isinstance(decay, Tensor) and decay.ndim else [decay] * count
        single = [
            _accumulated([m.clone()], [g], c, store=True)
            for m, g, c in zip(momenta, grads, factors, strict=True)
        ]
        return torch.cat([norm for norm, _ in single]), torch.cat([live for _, live in single])
    if isinstance(decay, Tensor) or decay != 1.0:
        scale_(momenta, decay)
    wide = upcast(momenta)
    into, present = _present(wide, grads)
    if present:
        torch._foreach_add_(into, present)
    store_(momenta, wide)
    norms = torch.stack(torch._foreach_norm(list(momenta), 2, dtype=_norm_dtype(momenta)))
    given = _not_empty(grads)
    live = torch.zeros(count, dtype=torch.bool, device=norms.device)
    if given:
        nonzero = largest([g for _, g in given]) != 0
        if len(given) == count:
            return norms, nonzero
        places = torch.tensor([k for k, _ in given], device=norms.device)
        live.index_copy_(0, places, nonzero)
    return norms, live


def _accumulated_lots(
    momenta: Views, grads: Sequence[Tensor | None], *, store: bool
) -> tuple[Tensor, Tensor]:
    """Do what `_accumulated` does, the same bits, lot by lot, each while the CPU's caches have it."""
    dtype, norms, high, low = _norm_dtype(momenta), [], [], []
    for lot in momenta.lots:
        m = lot.stack if store else lot.stack.clone()
        g = gathered(grads, lot.places, m[0])
        [wide] = upcast([m])
        wide.add_(g)
        store_([m], [wide])
        norms.append(torch.linalg.vector_norm(m.flatten(1), dim=1, dtype=dtype))
        most, least = extremes(g)
        high.append(most)
        low.append(least)
        del m, g, wide  # before the next ones are made
    live = (torch.cat(high) != 0) | (torch.cat(low) != 0)
    return torch.cat(norms).index_select(0, momenta.order), live.index_select(0, momenta.order)


def _norm_dtype(momenta: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, set(map(_DTYPE, momenta)), torch.float32)


def _not_empty(grads: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """Return the gradients that are there and have elements, and where."""
    if isinstance(grads, Fixed):  # which has looked at them already
        return [
            (k, g) for k, (g, n) in enumerate(zip(grads, grads.numels, strict=True)) if g is not None and n
        ]
    return [(k, g) for k, g in enumerate(grads) if g is not None and g.numel()]


def gate_key(
    sums: Tensor, last_norm: Tensor, tau: Tensor, *, hold_closed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the shard-summed squared norms into the RMMC of every matrix and this replica's gate key.

        rmmc_l = | ||m_t||_l - ||m_{t-1}||_l | / ||m_{t-1}||_l

    0 when both norms are 0; undefined (NaN), and a reason to synchronize, when there is no previous norm or
    it was 0.

    Args:
        sums: (L + 2,) float32 or more, sums over the shards: squared norms; ranks that saw a non-finite value
            (NaN: a rank failed); ranks that must synchronize.
        last_norm: (L,) float32, the previous norms, NO_NORM where there is none.
        tau: (L,) float32 thresholds; the comparison is strict.
        hold_closed: do not synchronize on account of RMMC alone.

    Returns: (norm, rmmc, key): (L,), (L,) float32 and a 0-d int64.
    """
    count = last_norm.numel()
    norm = sums[:count].sqrt()
    rmmc = (norm - last_norm).abs() / last_norm
    rmmc = torch.where((norm == 0) & (last_norm == 0), 0.0, rmmc)
    undefined = (last_norm < 0) | ((last_norm == 0) & (norm > 0))
    rmmc = torch.where(undefined, torch.nan, rmmc)

    must = (sums[count + 1] > 0) | undefined.any()
    if not hold_closed:
        must = must | (rmmc > tau).any()
    nonfinite = (sums[count] > 0) | ~norm.isfinite().all()

    index = torch.arange(count, device=sums.device)
    bits = rmmc.nan_to_num(0.0, posinf=torch.inf).view(torch.int32).to(torch.int64)
    ranked = torch.where(rmmc.isnan(), 0, (bits << INDEX_BITS) | (INDEX_MASK - index))
    key = torch.cat([ranked, ranked.new_zeros(1)]).max()
    key = key | (must.to(torch.int64) * SYNCHRONIZE_BIT) | (nonfinite.to(torch.int64) * NONFINITE_BIT)
    return norm, rmmc, torch.where(sums[count].isnan(), FAILED_KEY, key)


def local_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    decay: Scalar,
    step_size: Scalar,
    key: Tensor | None = None,
) -> None:
    """Take one gradient step, X_l <- a_l X_l - b_l G_l, in place; a gradient of None counts as zero.

    Args:
        params, grads: L local shards of equal shapes.
        decay, step_size: a and b: one number, a 0-d tensor, or a tensor of L.
        key: the reduced gate key, 0-d int64; given, nothing happens unless the gate is closed and all values
            were finite.

    Bytes: one read of G, one read and one write of X.
    """
    if not params or (key is not None and int(key) >= SYNCHRONIZE_BIT):
        return
    work = upcast(params)
    torch._foreach_mul_(work, _factors(decay, work))
    moved, slopes = _present(work, grads)
    if list(map(_DTYPE, slopes)) != list(map(_DTYPE, moved)):
        slopes = [g.to(x.dtype) for x, g in zip(moved, slopes, strict=True)]
    if slopes and isinstance(step_size, float):
        torch._foreach_add_(moved, slopes, alpha=-step_size)
    elif slopes:
        steps = _factors(step_size, work)
        if isinstance(steps, list):
            steps = [step for step, g in zip(steps, grads, strict=True) if g is not None]
        torch._foreach_sub_(moved, torch._foreach_mul(slopes, steps))
    store_(params, work)


def low_rank_apply_(
    params: Sequence[Tensor],
    momentum: Tensor | None,
    P: Tensor,
    Q: Tensor | None,
    R: Tensor | None,
    *,
    transposed: bool,
    decay: Scalar,
    step_size: Scalar,
    feedback: Scalar = 0.0,
    scale: Tensor | None = None,
) -> None:
    """Apply a low-rank update to B equal matrices and take it out of their momenta, in place.

        X <- a X - b P Q^T
        M <- M - c P R^T

    Args:
        params: B local shards of X, (rows, cols).
        momentum: M, (B, rows, cols), or None to leave it alone.
        P, Q, R: (B, m, r), (B, n, r), (B, n, r) with m the longer side of the whole matrix. R may be None
            without momentum.
        transposed: the equations hold for X^T and M^T (X has more columns than rows).
        decay, step_size, feedback: a, b and c, numbers or 0-d tensors.
        scale: (B, r), with Q = None: Q is R with its columns scaled, R diag(scale).

    Bytes: one read and one write of X and of M; P, Q and R once.
    """
    if momentum is not None:
        assert R is not None, "the update of the momentum needs R"
        M = momentum if momentum.dtype == P.dtype else momentum.to(P.dtype)
        (M.mT if transposed else M).baddbmm_(P * -feedback, R.mT)
        if M is not momentum:
            momentum.copy_(M)
    if Q is None:
        assert R is not None and scale is not None, "Q may be left out where R and scale stand for it"
        Q = R * scale.unsqueeze(-2)
    work = upcast(params)
    dtype = work[0].dtype if work else P.dtype
    P, Q = (P * -step_size).to(dtype), Q.to(dtype)
    if isinstance(decay, Tensor):
        torch._foreach_mul_(work, decay)
        decay = 1.0
    left, right = (Q, P) if transposed else (P, Q)
    for x, columns, rows in zip(work, left.unbind(), right.mT.unbind(), strict=True):
        x.addmm_(columns, rows, beta=decay)
    store_(params, work)


def column_sumsq(R: Tensor) -> Tensor:
    """Return the squared norms of the columns: (B, n, r) -> (B, r) float64, so that they are right for
    entries of 1e-38 as for those of 1e38. Bytes: one read of R."""
    return R.to(torch.float64, copy=True).square_().sum(dim=-2)


def symmetric_product(A: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Return alpha A^T A + beta A, which is symmetric: (B, m, n) -> (B, n, n), in A's dtype.

    Products are summed in float32, or float64 for float64. Where beta is not 0, A must be symmetric itself;
    then A^T A is A A. FLOPs: 2 B m n^2; one triangle takes half of them.
    """
    if beta:
        return torch.baddbmm(A, A, A, beta=beta, alpha=alpha)
    if alpha == 1:
        return torch.bmm(A.mT, A)
    return torch.baddbmm(A.new_empty(A.shape[0], 1, A.shape[2]), A.mT, A, beta=0, alpha=alpha)


def sign_encode_(residual: Tensor, x: Tensor) -> Tensor:
    """Round x and what was left before to one bit a value, and leave what that lacks.

        s = e + x,    h = bf16(2 mean|s|) / 2,    d = h where s >= 0, else -h,    e <- s - d

    with a mean of every 128 values: neighbours are added, then neighbouring sums, so that it is the same to
    the last bit everywhere. Zeros are exact; a block with a NaN decodes to NaN, one with an infinity to
    infinities.

    Args:
        residual: e, flat and contiguous, a multiple of 128 values.
        x: flat and contiguous, at most as long; behind its end nothing is added.

    Returns: uint8, 18 bytes for each 128 values: 2 h as a bfloat16, little-endian, and 16 bytes of signs, 1
    where s >= 0, lowest bit first.
    Bytes: one read of x, one read and one write of e, 0.14 a value written.
    """
    _check_sign_encode(residual, x)
    wide = upcast([residual])[0]
    wide[: x.numel()].add_(x)
    s = wide.view(-1, SIGN_BLOCK)
    sums = s.abs().mul_(2 / SIGN_BLOCK)  # a power of two; before the sum, which would overflow from 1e36 on
    while sums.shape[-1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    step = sums.to(torch.bfloat16)
    step.masked_fill_(step.isnan(), torch.nan)  # of all NaNs always the same one
    positive = s >= 0
    # Eight bytes of 0 or 1 as one little-endian number: this product gathers them, without a carry, in the
    # highest byte.
    signs = (positive.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)
    half = step.to(s.dtype).mul_(0.5)
    s.sub_(torch.where(positive, half, -half))
    store_([residual], [wide])
    return torch.cat([step.view(torch.uint8), signs], dim=-1).view(-1)


def sign_decode_(values: Tensor, payloads: Tensor) -> None:
    """Replace the values by the mean of what K payloads of `sign_encode_` stand for.

        v <- (d_1 + d_2 + ... + d_K) / K,    added in this order

    Args:
        values: v, flat and contiguous, a multiple of 128.
        payloads: (K, 18 values / 128) uint8; the rows may lie apart.

    Bytes: 0.14 K a value read, one write of v.
    """
    _check_sign_decode(values, payloads)
    device, dtype = values.device, compute_dtype(values.dtype)
    bits = torch.arange(256, device=device).unsqueeze(-1) >> torch.arange(8, device=device) & 1
    halves = bits.to(dtype) - 0.5  # of each bit of each byte
    total = torch.zeros((), dtype=dtype, device=device)
    for k, payload in enumerate(payloads.unflatten(1, (-1, SIGN_BYTES))):
        step = payload[:, :2].contiguous().view(torch.bfloat16).to(dtype)
        codes = payload[:, 2:].reshape(-1).to(torch.int32)
        decoded = halves.index_select(0, codes).view(-1, SIGN_BLOCK).mul_(step)
        total = total.add_(decoded) if k else decoded
    values.copy_(total.div_(len(payloads)).view(-1))


def _check_sign_encode(residual: Tensor, x: Tensor) -> None:
    if residual.ndim != 1 or residual.numel() % SIGN_BLOCK or not residual.is_contiguous():
        raise ValueError(
            f"residual must be flat, contiguous and a multiple of {SIGN_BLOCK} values; got "
            f"{tuple(residual.shape)} of strides {residual.stride()}; pad it"
        )
    if x.ndim != 1 or x.numel() > residual.numel() or not x.is_contiguous() or x.device != residual.device:
        raise ValueError(
            f"x must be flat, contiguous, on {residual.device} and have at most {residual.numel()} values; "
            f"got {tuple(x.shape)} of strides {x.stride()} on {x.device}"
        )


def _check_sign_decode(values: Tensor, payloads: Tensor) -> None:
    if values.ndim != 1 or values.numel() % SIGN_BLOCK or not values.is_contiguous():
        raise ValueError(
            f"values must be flat, contiguous and a multiple of {SIGN_BLOCK}; got {tuple(values.shape)} of "
            f"strides {values.stride()}"
        )
    width = values.numel() // SIGN_BLOCK * SIGN_BYTES
    if payloads.ndim != 2 or not len(payloads) or payloads.shape[1] != width or payloads.stride(1) != 1:
        raise ValueError(
            f"payloads must be (K, {width}) with K >= 1 for {values.numel()} values, and each row together; "
            f"got {tuple(payloads.shape)} of strides {payloads.stride()}"
        )
    if payloads.dtype != torch.uint8 or payloads.device != values.device:
        raise ValueError(
            f"payloads must be uint8 on {values.device}; got {payloads.dtype} on {payloads.device}"
        )


def scale_(tensors: Sequence[Tensor], factor: Scalar | Sequence[float]) -> None:
    """Multiply the tensors by a number, or each by its own (a list, or a tensor of them), rounding once."""
    wide = upcast(tensors)
    torch._foreach_mul_(wide, list(factor.unbind()) if isinstance(factor, Tensor) and factor.ndim else factor)
    store_(tensors, wide)


def _factors(value: Scalar, tensors: Sequence[Tensor]) -> Scalar | list[Tensor]:
    """Return one number for all tensors, or one for each, as it takes least time to multiply by them: on a
    CPU in the tensors' dtype, because every tensor would convert it for itself."""
    dtypes = set(map(_DTYPE, tensors))
    if len(dtypes) == 1 and tensors[0].device.type == "cpu":
        value = torch.as_tensor(value, dtype=dtypes.pop(), device="cpu")
    return list(value.unbind()) if isinstance(value, Tensor) and value.ndim else value


def _present(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that have a gradient, and the gradients."""
    if isinstance(grads, Fixed) and len(grads.present) == len(grads) == len(tensors):
        return list(tensors), grads.present
    pairs = [(t, g) for t, g in zip(tensors, grads, strict=True) if g is not None]
    return [t for t, _ in pairs], [g for _, g in pairs]


def upcast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in the dtype they are computed in: the same object where that is its own."""
    if set(map(_DTYPE, tensors)) <= {torch.float32, torch.float64}:
        return list(tensors)
    return [t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float32) for t in tensors]


def store_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Round the results of a computation on `upcast(tensors)` back into the tensors."""
    if not all(map(operator.is_, tensors, values)):
        changed = [(t, v) for t, v in zip(tensors, values, strict=True) if t is not v]
        torch._foreach_copy_([t for t, _ in changed], [v for _, v in changed])
