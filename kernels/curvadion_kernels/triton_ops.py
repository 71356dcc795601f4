"""Triton kernels of CurvaDion's hot operations: every byte touched once, all parameters in a handful of
launches.

Each public function has the signature, the equation and the meaning of its namesake in `reference.py`, and
says how many bytes it moves. The lists of tensors travel as tables in device memory, one of addresses and one
that cuts the tensors into chunks, one program per chunk; a table is uploaded only when it differs from those
used before. Hyper-parameters lie in device memory too, so a schedule recompiles nothing, and a captured CUDA
graph follows a schedule if it is given tensors.

Sums are deterministic: a program sums its chunk, a second stage sums the chunks of a tensor, both in an order
that depends on the sizes alone, not on alignment or timing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from curvadion_kernels import reference
from curvadion_kernels.reference import (
    FAILED_KEY,
    INDEX_BITS,
    INDEX_MASK,
    NONFINITE_BIT,
    SIGN_BLOCK,
    SIGN_BYTES,
    SYNCHRONIZE_BIT,
    Fixed,
    Scalar,
    compute_dtype,
)

CHUNK = 8192  # elements of a tensor that one program works on
BLOCK = 2048  # of which this many at a time; part of the norms' summation order
WARPS = 8
# Without fused multiply-adds the same numbers come out on every path of a kernel, and as from the reference.
ELEMENTWISE = {"num_warps": WARPS, "enable_fp_fusion": False}
SUM_BLOCK = 256
GATE_BLOCK = 1024
COLUMN_TILE = (32, 64)  # rows and columns of R that `column_sumsq` reads at a time
COLUMN_ROWS = 512  # rows of R that one program of `column_sumsq` sums
SIGN_ROWS = 16  # blocks of values that one program of `sign_encode_` or `sign_decode_` works on
SIGN_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# Above this rank, and only where TF32 products are allowed, two cuBLAS products take the place of the fused
# low-rank apply: their arithmetic then outweighs the second pass over X and M that fusing saves. An estimate
# from the roofline of an H200 (400 TFLOP/s, 4.3 TB/s, a fused kernel at 60 % of cuBLAS), not a measurement;
# `benchmarks/kernels.py --only low_rank_apply` measures it.
FUSED_RANK_TF32 = 192

# From this size on, and where there are so many tiles, `symmetric_product` computes one triangle instead of
# asking cuBLAS for both. Of T x T tiles it computes T (T + 1) / 2. An estimate, not a measurement: at 75 % of
# cuBLAS's speed that is 1.3 times as fast from T = 8 on, if two rounds of programs fill an H100;
# `benchmarks/kernels.py --only symmetric_product` measures it.
SYMMETRIC_SIZE = 1024
SYMMETRIC_TILES = 264

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_SYNCHRONIZE = tl.constexpr(SYNCHRONIZE_BIT)
_NONFINITE = tl.constexpr(NONFINITE_BIT)
_FAILED = tl.constexpr(FAILED_KEY)
_INDEX_BITS = tl.constexpr(INDEX_BITS)
_INDEX_MASK = tl.constexpr(INDEX_MASK)
_SIGN_BLOCK = tl.constexpr(SIGN_BLOCK)
_SIGN_BYTES = tl.constexpr(SIGN_BYTES)


# ---- kernels


@triton.jit
def _chunk(owner, sizes, count, CHUNK: tl.constexpr):
    """Return this program's tensor, where in it its chunk begins (int64), and how many elements that has."""
    chunk = tl.program_id(0)
    t = tl.load(owner + chunk)
    begin = (chunk - tl.load(sizes + count + t)).to(tl.int64) * CHUNK
    size = tl.minimum(tl.load(sizes + t) - begin, CHUNK).to(tl.int32)
    return t, begin, size


@triton.jit(do_not_specialize=["count", "decay_stride"])
def momentum_norm_kernel(
    m_addresses,  # (count,) int64
    g_addresses,  # (count,) int64, 0: no gradient
    owner,  # (chunks,) int32: the tensor of each chunk
    sizes,  # (2, count) int64: elements; first chunk, counted from this launch's
    decay,  # () or (count,) float64
    decay_stride,
    partial,  # (chunks,) sums of squares
    live,  # (chunks,) 1 where a gradient is not all zero, else 0
    count,
    M_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    TYPE: tl.constexpr,
    STORE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, begin, size = _chunk(owner, sizes, count, CHUNK)
    m_address = tl.load(m_addresses + t)
    g_address = tl.load(g_addresses + t)
    c = tl.load(decay + t * decay_stride).to(TYPE)
    total = tl.zeros((BLOCK,), TYPE)
    nonzero = tl.zeros((BLOCK,), tl.int32)
    body = 0  # elements that 16-byte loads can have
    if ((m_address | g_address) % 16 == 0) & (g_address != 0):
        body = size // BLOCK * BLOCK
        m = tl.multiple_of(m_address.to(tl.pointer_type(M_TYPE)), 16) + begin
        g = tl.multiple_of(g_address.to(tl.pointer_type(G_TYPE)), 16) + begin
        for offset in range(0, body, BLOCK):
            i = offset + tl.arange(0, BLOCK)
            if M_TYPE != G_TYPE:  # the same elements of both in one thread, or they have to be exchanged
                i = tl.max_contiguous(i, 4)
            old = (c * tl.load(m + i).to(TYPE)).to(M_TYPE).to(TYPE)
            gradient = tl.load(g + i).to(TYPE)
            new = (old + gradient).to(M_TYPE)
            if STORE:
                tl.store(m + i, new)
            total += new.to(TYPE) * new.to(TYPE)
            nonzero |= (gradient != 0).to(tl.int32)
    m = m_address.to(tl.pointer_type(M_TYPE)) + begin
    g = g_address.to(tl.pointer_type(G_TYPE)) + begin
    for offset in range(body, size, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        there = i < size
        old = (c * tl.load(m + i, mask=there, other=0.0).to(TYPE)).to(M_TYPE).to(TYPE)
        gradient = tl.load(g + i, mask=i < tl.where(g_address != 0, size, 0), other=0.0).to(TYPE)
        new = (old + gradient).to(M_TYPE)
        if STORE:
            tl.store(m + i, new, mask=there)
        total += new.to(TYPE) * new.to(TYPE)
        nonzero |= (gradient != 0).to(tl.int32)
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))
    tl.store(live + tl.program_id(0), tl.max(nonzero, axis=0).to(TYPE))


@triton.jit(do_not_specialize=["count"])
def nonfinite_kernel(
    addresses,  # (count,) int64
    owner,
    sizes,
    partial,  # (chunks,) how many values are not finite
    count,
    G_TYPE: tl.constexpr,
    TYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, begin, size = _chunk(owner, sizes, count, CHUNK)
    address = tl.load(addresses + t)
    total = tl.zeros((BLOCK,), TYPE)
    body = 0
    if address % 16 == 0:
        body = size // BLOCK * BLOCK
        g = tl.multiple_of(address.to(tl.pointer_type(G_TYPE)), 16) + begin
        for offset in range(0, body, BLOCK):
            value = tl.load(g + offset + tl.arange(0, BLOCK)).to(TYPE)
            total += tl.where(tl.abs(value) < float("inf"), 0.0, 1.0).to(TYPE)
    g = address.to(tl.pointer_type(G_TYPE)) + begin
    for offset in range(body, size, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        value = tl.load(g + i, mask=i < size, other=0.0).to(TYPE)
        total += tl.where(tl.abs(value) < float("inf"), 0.0, 1.0).to(TYPE)
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count"])
def segment_sum_kernel(
    partial,
    live,
    # (2, count + 1) int64: first chunk of each tensor and the one behind its last; last the watched tensors'
    segments,
    sums,  # (2 count + 2,) float32
    count,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0)
    begin = tl.load(segments + s).to(tl.int32)
    end = tl.load(segments + count + 1 + s).to(tl.int32)
    total = tl.zeros((BLOCK,), partial.dtype.element_ty)
    most = tl.zeros((BLOCK,), partial.dtype.element_ty)
    behind = tl.where(s == count, begin, end)  # what is watched has no `live`
    for offset in range(begin, end, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        total += tl.load(partial + i, mask=i < end, other=0.0)
        most = tl.maximum(most, tl.load(live + i, mask=i < behind, other=0.0))
    value = tl.sum(total, axis=0).to(tl.float32)
    if s == count:
        value = tl.where(value > 0, 1.0, 0.0)
        tl.store(sums + count + 1, 0.0)
    else:
        tl.store(sums + count + 2 + s, tl.max(most, axis=0).to(tl.float32))
    tl.store(sums + s, value)


@triton.jit(do_not_specialize=["count", "hold_closed"])
def gate_key_kernel(
    sums, last_norm, tau, norm_out, rmmc_out, key_out, count, hold_closed, BLOCK: tl.constexpr
):
    ranked_max = tl.zeros((BLOCK,), tl.int64)
    must = tl.zeros((BLOCK,), tl.int32)
    infinite = tl.zeros((BLOCK,), tl.int32)
    for offset in range(0, count, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        there = i < count
        norm = tl.sqrt_rn(tl.load(sums + i, mask=there, other=0.0))
        last = tl.load(last_norm + i, mask=there, other=0.0)
        rmmc = tl.div_rn(tl.abs(norm - last), tl.where(last == 0, 1.0, last))
        undefined = (last < 0) | ((last == 0) & (norm > 0))
        # From 0 to NaN: neither both 0 nor defined; the flag of non-finite values says the rest.
        rmmc = tl.where(undefined | ((last == 0) & (norm != norm)), float("nan"), rmmc)
        tl.store(norm_out + i, norm, mask=there)
        tl.store(rmmc_out + i, rmmc, mask=there)
        above = (rmmc > tl.load(tau + i, mask=there, other=float("inf"))) & (hold_closed == 0)
        must |= (there & (undefined | above)).to(tl.int32)
        infinite |= (there & ~(norm < float("inf"))).to(tl.int32)
        bits = tl.where(rmmc == rmmc, rmmc, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
        ranked = (bits << _INDEX_BITS) | (_INDEX_MASK - i)
        ranked_max = tl.maximum(ranked_max, tl.where(there & (rmmc == rmmc), ranked, 0))
    key = tl.max(ranked_max, axis=0)
    nonfinite = tl.load(sums + count)
    synchronize = (tl.max(must, axis=0) > 0) | (tl.load(sums + count + 1) > 0)
    broken = (tl.max(infinite, axis=0) > 0) | (nonfinite > 0)
    key = tl.where(synchronize, key | _SYNCHRONIZE, key)
    key = tl.where(broken, key | _NONFINITE, key)
    tl.store(key_out, tl.where(nonfinite != nonfinite, _FAILED, key))


@triton.jit(do_not_specialize=["count", "decay_stride", "step_stride"])
def local_step_kernel(
    x_addresses,  # (count,) int64
    g_addresses,  # (count,) int64, 0: no gradient
    owner,
    sizes,
    decay,  # () or (count,) float64
    step_size,  # () or (count,) float64
    decay_stride,
    step_stride,
    key,  # () int64, the reduced gate key
    count,
    X_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    TYPE: tl.constexpr,
    GATED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if GATED:  # noqa: SIM102 (known when compiling; without a gate the key must not be read)
        if tl.load(key) >= _SYNCHRONIZE:  # or not finite, or failed: those bits are above
            return
    t, begin, size = _chunk(owner, sizes, count, CHUNK)
    x_address = tl.load(x_addresses + t)
    g_address = tl.load(g_addresses + t)
    a = tl.load(decay + t * decay_stride).to(TYPE)
    b = tl.load(step_size + t * step_stride).to(TYPE)
    body = 0
    if ((x_address | g_address) % 16 == 0) & (g_address != 0):
        body = size // BLOCK * BLOCK
        x = tl.multiple_of(x_address.to(tl.pointer_type(X_TYPE)), 16) + begin
        g = tl.multiple_of(g_address.to(tl.pointer_type(G_TYPE)), 16) + begin
        for offset in range(0, body, BLOCK):
            i = offset + tl.arange(0, BLOCK)
            if X_TYPE != G_TYPE:
                i = tl.max_contiguous(i, 4)
            tl.store(x + i, (a * tl.load(x + i).to(TYPE) - b * tl.load(g + i).to(TYPE)).to(X_TYPE))
    x = x_address.to(tl.pointer_type(X_TYPE)) + begin
    g = g_address.to(tl.pointer_type(G_TYPE)) + begin
    for offset in range(body, size, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        there = i < size
        old = tl.load(x + i, mask=there, other=0.0).to(TYPE)
        slope = tl.load(g + i, mask=i < tl.where(g_address != 0, size, 0), other=0.0).to(TYPE)
        tl.store(x + i, (a * old - b * slope).to(X_TYPE), mask=there)


@triton.jit
def _factor(F, batch, i, k, rows, r, there_k):
    """Load the tile (rows i, columns k) of matrix `batch` of F (B, rows, r)."""
    inside = (i < rows)[:, None] & there_k[None, :]
    return tl.load(F + (batch * rows + i).to(tl.int64)[:, None] * r + k[None, :], mask=inside, other=0.0)


@triton.jit
def low_rank_apply_kernel(
    addresses,  # (B,) int64: of X, each (rows, cols)
    M,  # (B, rows, cols)
    left,  # (B, rows, r): P, or Q's or R's rows where the equations hold for X^T
    right,  # (B, cols, r)
    other,  # the one of Q and R that is neither left nor right
    scale,  # (B, r)
    scalars,  # (3,) float64: decay, step size, feedback
    rows,
    cols,
    r,
    X_TYPE: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # every X begins at a multiple of 16 bytes
    FEEDBACK: tl.constexpr,  # M takes part
    OTHER: tl.constexpr,  # "": Q = R diag(scale) | "left", "right": that side of M's product is `other`
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
):
    batch = tl.program_id(1)
    # Tiles in groups of GROUP rows, so that the factors of neighbouring programs stay in the cache.
    tile_rows = tl.cdiv(rows, ROWS)
    tile_cols = tl.cdiv(cols, COLS)
    group = tl.program_id(0) // (GROUP * tile_cols)
    height = tl.minimum(tile_rows - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tile_cols)
    i = (group * GROUP + within % height) * ROWS + tl.arange(0, ROWS)
    j = (within // height) * COLS + tl.arange(0, COLS)

    update = tl.zeros((ROWS, COLS), TYPE)
    taken = tl.zeros((ROWS, COLS), TYPE)
    for offset in range(0, r, RANK):
        k = offset + tl.arange(0, RANK)
        there = k < r
        a = _factor(left, batch, i, k, rows, r, there)
        b = _factor(right, batch, j, k, cols, r, there)
        if OTHER == "":
            # Scale the left side whatever it is: it can feed the tensor cores from registers, and Q is never
            # in memory.
            s = tl.load(scale + batch * r + k, mask=there, other=0.0)
            update = tl.dot(a * s[None, :], tl.trans(b), update, input_precision=PRECISION, out_dtype=TYPE)
        else:
            update = tl.dot(a, tl.trans(b), update, input_precision=PRECISION, out_dtype=TYPE)
        if FEEDBACK:
            if OTHER == "left":
                a = _factor(other, batch, i, k, rows, r, there)
            if OTHER == "right":
                b = _factor(other, batch, j, k, cols, r, there)
            taken = tl.dot(a, tl.trans(b), taken, input_precision=PRECISION, out_dtype=TYPE)

    inside = (i < rows)[:, None] & (j < cols)[None, :]
    at = i.to(tl.int64)[:, None] * cols + j[None, :]
    x = tl.load(addresses + batch).to(tl.pointer_type(X_TYPE))
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    x += at
    decay = tl.load(scalars).to(TYPE)
    step_size = tl.load(scalars + 1).to(TYPE)
    tl.store(
        x, (decay * tl.load(x, mask=inside, other=0.0).to(TYPE) - step_size * update).to(X_TYPE), mask=inside
    )
    if FEEDBACK:
        feedback = tl.load(scalars + 2).to(TYPE)
        m = M + batch.to(tl.int64) * rows * cols + at
        tl.store(
            m,
            (tl.load(m, mask=inside, other=0.0).to(TYPE) - feedback * taken).to(M.dtype.element_ty),
            mask=inside,
        )


@triton.jit
def column_sumsq_kernel(
    R,
    partial,
    rows,
    r,
    blocks,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
):
    batch = tl.program_id(2)
    k = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((TILE, COLS), tl.float64)
    for begin in range(tl.program_id(0) * ROWS, tl.minimum(tl.program_id(0) * ROWS + ROWS, rows), TILE):
        i = begin + tl.arange(0, TILE)
        inside = (i < rows)[:, None] & (k < r)[None, :]
        at = (batch.to(tl.int64) * rows + i)[:, None] * r + k[None, :]
        value = tl.load(R + at, mask=inside, other=0.0).to(tl.float64)
        total += value * value
    at = (batch * blocks + tl.program_id(0)).to(tl.int64) * r + k
    tl.store(partial + at, tl.sum(total, axis=0), mask=k < r)


@triton.jit(do_not_specialize=["x_size"])
def sign_encode_kernel(
    residual,  # (size,)
    x,  # (x_size,)
    payload,  # (size / 128 * 18,) uint8
    size,
    x_size,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS
    i = row * _SIGN_BLOCK + tl.arange(0, ROWS * _SIGN_BLOCK)
    s = tl.load(residual + i, mask=i < size, other=0.0).to(tl.float32)
    if (row + ROWS) * _SIGN_BLOCK <= x_size:  # without a mask: 16 bytes at a time
        s += tl.load(x + i).to(tl.float32)
    else:
        s = tl.where(i < x_size, s + tl.load(x + i, mask=i < x_size, other=0.0).to(tl.float32), s)

    sums = tl.abs(s) * (2.0 / _SIGN_BLOCK)  # before the sum, which would overflow
    for level in tl.static_range(7):
        a, b = tl.split(tl.reshape(sums, ((ROWS * _SIGN_BLOCK) >> (level + 1), 2)))
        sums = a + b
    # To bfloat16, to the nearest even: the upper half of the bits, which are not negative.
    bits = sums.to(tl.int32, bitcast=True)
    scale = tl.where(sums == sums, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
    half = (scale << 16).to(tl.float32, bitcast=True) * 0.5

    positive = s >= 0
    lowest_first = tl.arange(0, 8)[None, :]
    signs = tl.sum(tl.reshape(positive.to(tl.int32), (ROWS * _SIGN_BLOCK // 8, 8)) << lowest_first, axis=1)
    j = tl.arange(0, ROWS * _SIGN_BLOCK // 8)
    blocks = size // _SIGN_BLOCK
    there = row + j // (_SIGN_BLOCK // 8) < blocks
    at = (row + j // (_SIGN_BLOCK // 8)) * _SIGN_BYTES + 2 + j % (_SIGN_BLOCK // 8)
    tl.store(payload + at, signs.to(tl.uint8), mask=there)
    k = row + tl.arange(0, ROWS)
    tl.store(payload + k * _SIGN_BYTES, (scale & 0xFF).to(tl.uint8), mask=k < blocks)
    tl.store(payload + k * _SIGN_BYTES + 1, (scale >> 8).to(tl.uint8), mask=k < blocks)

    spread = tl.reshape(tl.broadcast_to(half[:, None], (ROWS, _SIGN_BLOCK)), (ROWS * _SIGN_BLOCK,))
    left = s - tl.where(positive, spread, -spread)
    tl.store(residual + i, left.to(residual.dtype.element_ty), mask=i < size)


@triton.jit
def _decoded(payload, row, blocks, ROWS: tl.constexpr):
    """Return what a payload says of ROWS blocks from `row` on, eight values a row."""
    j = tl.arange(0, ROWS * _SIGN_BLOCK // 8)
    k = row + j // (_SIGN_BLOCK // 8)
    block = payload + k * _SIGN_BYTES
    low = tl.load(block, mask=k < blocks, other=0).to(tl.int32)
    high = tl.load(block + 1, mask=k < blocks, other=0).to(tl.int32)
    step = ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)
    signs = tl.load(block + 2 + j % (_SIGN_BLOCK // 8), mask=k < blocks, other=0).to(tl.int32)
    bits = (signs[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return (bits.to(tl.float32) - 0.5) * step[:, None]


@triton.jit(do_not_specialize=["count"])
def sign_decode_kernel(
    values,  # (size,)
    payloads,  # (count, size / 128 * 18) uint8
    size,
    count,
    stride,  # between the payloads
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS
    total = _decoded(payloads, row, size // _SIGN_BLOCK, ROWS)
    for _ in range(1, count):
        payloads += stride
        total += _decoded(payloads, row, size // _SIGN_BLOCK, ROWS)
    j = tl.arange(0, ROWS * _SIGN_BLOCK // 8)
    i = row * _SIGN_BLOCK + j[:, None] * 8 + tl.arange(0, 8)[None, :]
    mean = tl.div_rn(total, count.to(tl.float32))
    tl.store(values + i, mean.to(values.dtype.element_ty), mask=i < size)


@triton.jit
def probe_kernel(answer):
    tl.store(answer, 1)


@triton.jit
def symmetric_product_kernel(
    A,  # (B, rows, n) at any strides
    C,  # (B, n, n)
    rows,
    n,
    batch_stride,
    row_stride,
    col_stride,
    alpha,
    beta,
    ADD: tl.constexpr,  # beta A is added
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # The lower triangle: its rows of tiles in pairs, a short one and a long one, are equally long.
    tiles = tl.cdiv(n, TILE)
    even = 1 - tiles % 2
    line = tl.program_id(0) // (tiles + even)
    place = tl.program_id(0) % (tiles + even)
    short = line + even  # tiles of the short row
    row = tl.where(place < short, short - 1, tiles - 1 - line)
    col = tl.where(place < short, place, place - short)

    batch = tl.program_id(1).to(tl.int64)
    i = row * TILE + tl.arange(0, TILE)
    j = col * TILE + tl.arange(0, TILE)
    k = tl.arange(0, DEPTH)
    a = A + batch * batch_stride
    left = a + k.to(tl.int64)[:, None] * row_stride + i.to(tl.int64)[None, :] * col_stride
    right = a + k.to(tl.int64)[:, None] * row_stride + j.to(tl.int64)[None, :] * col_stride
    total = tl.zeros((TILE, TILE), tl.float32)
    for offset in range(0, rows, DEPTH):
        there = (k < rows - offset)[:, None]
        x = tl.load(left, mask=there & (i < n)[None, :], other=0.0)
        y = tl.load(right, mask=there & (j < n)[None, :], other=0.0)
        total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION)
        left += DEPTH * row_stride
        right += DEPTH * row_stride
    total = alpha * total
    inside = (i < n)[:, None] & (j < n)[None, :]
    if ADD:
        at = i.to(tl.int64)[:, None] * row_stride + j.to(tl.int64)[None, :] * col_stride
        total += beta * tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    value = total.to(C.dtype.element_ty)
    c = C + batch * n * n
    tl.store(c + i.to(tl.int64)[:, None] * n + j[None, :], value, mask=inside)
    if row != col:
        mirrored = (j < n)[:, None] & (i < n)[None, :]
        tl.store(c + j.to(tl.int64)[:, None] * n + i[None, :], tl.trans(value), mask=mirrored)


# ---- public functions


def momentum_norm_(
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    decay: Scalar = 1.0,
    watch: Sequence[Tensor] = (),
    store: bool = True,
) -> Tensor:
    """Accumulate the gradients into the momenta; return the squared norms of what was stored and which
    gradients are not zero; see `reference.momentum_norm_`.

        m_l <- c_l m_l + g_l,    s_l = ||m_l||_F^2

    One launch per pair of dtypes and one for the sums of the chunks. Bytes per element, fp32: 12 (read g,
    read and write m), 8 with store=False, 4 for watched tensors.
    """
    if not momenta and not watch:
        return torch.zeros(2, dtype=torch.float32)
    like = momenta[0] if momenta else watch[0]
    m = momenta if isinstance(momenta, Fixed) else Fixed(momenta)
    if not m.contiguous:
        return _with_strided(m, grads, decay, watch, store=store)
    g, watched = _gradients(grads, m), _dense(watch)
    _check_devices(m, g, watched)
    count = len(m)
    chunks, seen = _cut(m, _kinds(m, g), like.device), _cut(watched, _kinds(watched), like.device)
    dtype = (
        torch.float64
        if any(torch.float64 in launch.kind for launch in chunks.launches + seen.launches)
        else torch.float32
    )
    partials = torch.empty(chunks.total + seen.total, dtype=dtype, device=like.device)
    live = torch.empty(chunks.total, dtype=dtype, device=like.device)
    sums = torch.empty(2 * count + 2, dtype=torch.float32, device=like.device)
    decays, stride = _per_tensor(decay, count, like.device)
    with _on(like.device):
        for launch in chunks.launches:
            m_type, g_type = launch.kind
            momentum_norm_kernel[(launch.count,)](
                _addresses(m, like.device),
                _addresses(g, like.device),
                launch.owner.get(),
                launch.sizes.get(),
                decays,
                stride,
                partials[launch.first :] if launch.first else partials,
                live[launch.first :] if launch.first else live,
                count,
                _TYPES[m_type],
                _TYPES[g_type],
                _TYPES[compute_dtype(torch.promote_types(m_type, g_type))],
                store,
                CHUNK,
                BLOCK,
                **ELEMENTWISE,
            )
        for launch in seen.launches:
            (g_type,) = launch.kind
            nonfinite_kernel[(launch.count,)](
                _addresses(watched, like.device),
                launch.owner.get(),
                launch.sizes.get(),
                partials[chunks.total + launch.first :],
                len(watched),
                _TYPES[g_type],
                _TYPES[compute_dtype(g_type)],
                CHUNK,
                BLOCK,
                **ELEMENTWISE,
            )
        segment_sum_kernel[(count + 1,)](
            partials, live, _segments(chunks, seen, like.device).get(), sums, count, SUM_BLOCK, num_warps=4
        )
    if store:
        increment_version(m.present)
    return sums


def _with_strided(
    momenta: Fixed[Tensor],
    grads: Sequence[Tensor | None],
    decay: Scalar,
    watch: Sequence[Tensor],
    *,
    store: bool,
) -> Tensor:
    """Do what `momentum_norm_` does where some momenta are not contiguous: of those in plain torch."""
    count, device = len(momenta), momenta[0].device
    if "strided" not in momenta.memo:
        dense = [m.is_contiguous() for m in momenta]
        parts = [tuple(k for k in range(count) if dense[k] is kind) for kind in (True, False)]
        momenta.memo["strided"] = [(part, torch.tensor(part, dtype=torch.int64).to(device)) for part in parts]
    given = grads if isinstance(grads, Fixed) else Fixed(grads)
    result = torch.zeros(2 * count + 2, dtype=torch.float32, device=device)
    ways = ((momentum_norm_, watch), (reference.momentum_norm_, ()))
    for (part, places), (function, seen) in zip(momenta.memo["strided"], ways, strict=True):
        own = decay.to(device)[places] if isinstance(decay, Tensor) and decay.ndim else decay
        sums = function(momenta.take(part), given.take(part), decay=own, watch=seen, store=store).to(device)
        number = len(part)
        result.index_copy_(0, places, sums[:number])
        result.index_copy_(0, places + count + 2, sums[number + 2 :])
        result[count : count + 2] += sums[number : number + 2]
    return result


def gate_key(
    sums: Tensor, last_norm: Tensor, tau: Tensor, *, hold_closed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the shard-summed squared norms into norms, RMMC and the gate's key; see `reference.gate_key`. One
    launch, one program.

    Bytes: 20 a matrix.
    """
    count = last_norm.numel()
    for name, tensor, size in (
        ("sums", sums[: count + 2], count + 2),
        ("last_norm", last_norm, count),
        ("tau", tau, count),
    ):
        if (
            tensor.dtype != torch.float32
            or tensor.shape != (size,)
            or tensor.device != sums.device
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be {size} contiguous float32 numbers on {sums.device}; got "
                f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
    norm, rmmc = torch.empty_like(last_norm), torch.empty_like(last_norm)
    key = torch.empty((), dtype=torch.int64, device=sums.device)
    with _on(sums.device):
        gate_key_kernel[(1,)](
            sums, last_norm, tau, norm, rmmc, key, count, int(hold_closed), GATE_BLOCK, num_warps=4
        )
    return norm, rmmc, key


def local_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    decay: Scalar,
    step_size: Scalar,
    key: Tensor | None = None,
) -> None:
    """Take one gradient step, X_l <- a_l X_l - b_l G_l, unless the key says otherwise.

    See `reference.local_step_`.

    One launch per pair of dtypes; the key is read on the device. Bytes per element, fp32: 12 (read G, read
    and write X), none if the gate is open.
    """
    if not params:
        return
    device, count = params[0].device, len(params)
    x = params if isinstance(params, Fixed) else Fixed(params)
    if not x.contiguous:
        strided = [i for i, t in enumerate(params) if not t.is_contiguous()]
        dense = [i for i, t in enumerate(params) if t.is_contiguous()]
        for part, function in ((strided, reference.local_step_), (dense, local_step_)):
            a, b = (v[part] if isinstance(v, Tensor) and v.ndim else v for v in (decay, step_size))
            function([params[i] for i in part], [grads[i] for i in part], decay=a, step_size=b, key=key)
        return
    g = _gradients(grads, x)
    _check_devices(x, g)
    chunks = _cut(x, _kinds(x, g), device)
    if not chunks.total:
        return
    decays, decay_stride = _per_tensor(decay, count, device)
    steps, step_stride = _per_tensor(step_size, count, device)
    with _on(device):
        for launch in chunks.launches:
            x_type, g_type = launch.kind
            local_step_kernel[(launch.count,)](
                _addresses(x, device),
                _addresses(g, device),
                launch.owner.get(),
                launch.sizes.get(),
                decays,
                steps,
                decay_stride,
                step_stride,
                decays if key is None else key,
                count,
                _TYPES[x_type],
                _TYPES[g_type],
                _TYPES[compute_dtype(torch.promote_types(x_type, g_type))],
                key is not None,
                CHUNK,
                BLOCK,
                **ELEMENTWISE,
            )
    increment_version(x.present)


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
    """Apply a low-rank update to B equal matrices and take it out of their momenta; see
    `reference.low_rank_apply_`.

        X <- a X - b P Q^T,    M <- M - c P R^T

    One launch and one pass over X and M, on tensor cores: TF32 where torch may use it
    (`torch.set_float32_matmul_precision`), otherwise three TF32 products that keep float32's accuracy. Bytes
    per element of X, fp32: 16 (8 without momentum), and the factors; with `scale`, Q is not read. Two cuBLAS
    products take its place at ranks where they are faster (FUSED_RANK_TF32), for float64 on a GPU, and where
    X is not contiguous.
    """
    if not params or not params[0].numel():
        return
    precision = _precision(P)
    contiguous = all(x.is_contiguous() for x in params) and (momentum is None or momentum.is_contiguous())
    products = (precision == "tf32" and P.shape[-1] > FUSED_RANK_TF32) or (
        P.dtype == torch.float64 and P.is_cuda
    )
    products |= compute_dtype(params[0].dtype) != P.dtype
    function = reference.low_rank_apply_
    if contiguous and not products:
        function = partial(fused_low_rank_apply_, precision=precision)
    function(
        params,
        momentum,
        P,
        Q,
        R,
        transposed=transposed,
        decay=decay,
        step_size=step_size,
        feedback=feedback,
        scale=scale,
    )


def fused_low_rank_apply_(
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
    precision: str = "tf32x3",
) -> None:
    """Do what `low_rank_apply_` does with the fused kernel at every rank; X and M contiguous. For benchmarks
    and tests."""
    device = P.device
    rows, cols = params[0].shape
    B, r = len(params), P.shape[-1]
    m, n = (cols, rows) if transposed else (rows, cols)
    shapes = {
        "P": (P, (B, m, r)),
        "Q": (Q, (B, n, r)),
        "R": (R, (B, n, r)),
        "scale": (scale, (B, r)),
        "momentum": (momentum, (B, rows, cols)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and (tensor.shape != shape or tensor.device != device):
            raise ValueError(
                f"{name} must be {shape} on {device}; got {tuple(tensor.shape)} on {tensor.device}"
            )
        if tensor is not None and tensor is not momentum and tensor.dtype != P.dtype:
            raise ValueError(
                f"factors must be of one dtype; got {name} of {tensor.dtype} beside P of {P.dtype}"
            )
    if any(x.shape != (rows, cols) or x.dtype != params[0].dtype or x.device != device for x in params):
        raise ValueError(
            f"params must be equal in shape, dtype and device; got others beside {(rows, cols)} of "
            f"{params[0].dtype} on {device}"
        )
    P = P.contiguous()
    if Q is None:
        assert R is not None and scale is not None, "Q may be left out where R and scale stand for it"
        second, other = R.contiguous(), ""
    else:
        second, other = Q.contiguous(), "left" if transposed else "right"
    third = R.contiguous() if R is not None and Q is not None else second
    left, right = (second, P) if transposed else (P, second)
    scalars = _scalars((decay, step_size, feedback), device)
    tile = apply_tile(precision)
    with _on(device):
        low_rank_apply_kernel[
            (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(cols, tile["COLS"]), len(params))
        ](
            _addresses(params if isinstance(params, Fixed) else Fixed(params), device),
            params[0] if momentum is None else momentum,
            left,
            right,
            third,
            P if scale is None else scale.contiguous(),
            scalars,
            rows,
            cols,
            P.shape[-1],
            _TYPES[params[0].dtype],
            _TYPES[P.dtype],
            all(x.data_ptr() % 16 == 0 for x in params),
            momentum is not None,
            other,
            precision,
            **tile,
        )
    increment_version(params if momentum is None else [*params, momentum])


def apply_tile(precision: str) -> dict[str, int]:
    """Return the tile of `low_rank_apply_kernel` and its launch options.

    Fixed, because a kernel that works in place cannot be autotuned; chosen so that nothing spills
    (`benchmarks/compiled.py`).
    """
    if precision == "ieee":  # AMD, whose local memory is small; float64 in the interpreter
        return {"ROWS": 64, "COLS": 64, "RANK": 16, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    return {
        "ROWS": 128,
        "COLS": 64,
        "RANK": 32 if precision == "tf32" else 16,
        "GROUP": 8,
        "num_warps": 8,
        "num_stages": 3,
    }


def column_sumsq(R: Tensor) -> Tensor:
    """Return the squared norms of the columns, (B, n, r) -> (B, r) float64; see `reference.column_sumsq`.

    Two launches, deterministic. Bytes: one read of R. Where R's rows are spread over ranks, sum the results
    over them.
    """
    B, rows, r = R.shape
    blocks = triton.cdiv(rows, COLUMN_ROWS)
    if not R.numel():
        return R.new_zeros(B, r, dtype=torch.float64)
    partials = R.new_empty(B, blocks, r, dtype=torch.float64)
    height, width = COLUMN_TILE
    with _on(R.device):
        column_sumsq_kernel[(blocks, triton.cdiv(r, width), B)](
            R.contiguous(),
            partials,
            rows,
            r,
            blocks,
            COLUMN_ROWS,
            height,
            width,
            num_warps=4,
        )
    return partials[:, 0] if blocks == 1 else partials.sum(dim=1)


def symmetric_product(A: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Return alpha A^T A + beta A, (B, m, n) -> (B, n, n); see `reference.symmetric_product`.

    One launch that computes one triangle and writes it twice, where that pays (SYMMETRIC_SIZE); two cuBLAS
    products in one elsewhere, and for float64. float32 as in `low_rank_apply_`: TF32 where torch may use it,
    otherwise three TF32 products.
    """
    B, n = A.shape[0], A.shape[-1]
    tiles = triton.cdiv(n, symmetric_tile(A.dtype, _precision(A))["TILE"])
    pays = n >= SYMMETRIC_SIZE and B * tiles * (tiles + 1) // 2 >= SYMMETRIC_TILES
    function = reference.symmetric_product
    if pays and A.dtype != torch.float64:
        function = fused_symmetric_product
    return function(A, alpha=alpha, beta=beta)


def fused_symmetric_product(A: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Do what `symmetric_product` does with the kernel at every size; not of float64. For benchmarks and
    tests."""
    if A.ndim != 3 or A.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            "A must be (B, m, n) of float32, bfloat16 or float16; got "
            f"{tuple(A.shape)} of {A.dtype}; take `symmetric_product`"
        )
    B, rows, n = A.shape
    if beta and rows != n:
        raise ValueError(f"A must be symmetric where beta is not 0; got {rows} x {n} with beta={beta}")
    C = A.new_empty(B, n, n)
    if not C.numel():
        return C
    if beta and A.stride(2) != 1:  # it is its own transpose
        A = A.mT
    precision = _precision(A)
    tile = symmetric_tile(A.dtype, precision)
    tiles = triton.cdiv(n, tile["TILE"])
    with _on(A.device):
        symmetric_product_kernel[(tiles * (tiles + 1) // 2, B)](
            A, C, rows, n, *A.stride(), float(alpha), float(beta), beta != 0, precision, **tile
        )
    return C


def symmetric_tile(
    dtype: torch.dtype, precision: str, *, hip: bool = torch.version.hip is not None
) -> dict[str, int]:
    """Return the tile of `symmetric_product_kernel` and its launch options; chosen so that nothing spills."""
    if dtype == torch.float32:
        return {"TILE": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 2 if precision == "ieee" else 3}
    if hip:
        return {"TILE": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 2}
    return {"TILE": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


def sign_encode_(residual: Tensor, x: Tensor) -> Tensor:
    """Round x and what was left before to one bit a value, and leave what that lacks; see
    `reference.sign_encode_`.

    One launch, and the reference's bits. float64 goes to the reference. Bytes: one read of x, one read and
    one write of e, 0.14 a value written.
    """
    reference._check_sign_encode(residual, x)
    if torch.float64 in (residual.dtype, x.dtype):
        return reference.sign_encode_(residual, x)
    size = residual.numel()
    payload = torch.empty(size // SIGN_BLOCK * SIGN_BYTES, dtype=torch.uint8, device=residual.device)
    if size:
        with _on(residual.device):
            sign_encode_kernel[(triton.cdiv(size, SIGN_ROWS * SIGN_BLOCK),)](
                residual, x, payload, size, x.numel(), SIGN_ROWS, **SIGN_OPTIONS
            )
        increment_version(residual)
    return payload


def sign_decode_(values: Tensor, payloads: Tensor) -> None:
    """Replace the values by the mean of what K payloads stand for; see `reference.sign_decode_`.

    One launch, and the reference's bits. float64 goes to the reference. Bytes: 0.14 K a value read, one write
    of v.
    """
    reference._check_sign_decode(values, payloads)
    if values.dtype == torch.float64:
        return reference.sign_decode_(values, payloads)
    if size := values.numel():
        with _on(values.device):
            sign_decode_kernel[(triton.cdiv(size, SIGN_ROWS * SIGN_BLOCK),)](
                values, payloads, size, len(payloads), payloads.stride(0), SIGN_ROWS, **SIGN_OPTIONS
            )
        increment_version(values)


# ---- where the kernels run


def why_not(device: torch.device) -> str | None:
    """Return why the kernels cannot run on tensors of a device, None if they can."""
    if not interpreted():
        if device.type != "cuda":
            return f"Triton compiles for GPUs, and the parameters are on {device}"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            return f"the kernels need compute capability 8.0 or newer, and {name} has less"
        return _cannot_launch(device)
    elif device.type != "cpu":
        return (
            "Triton's interpreter is on (TRITON_INTERPRET), which is for parameters on the CPU, and they are "
            f"on {device}"
        )
    return None


@lru_cache
def _cannot_launch(device: torch.device) -> str | None:
    """Return why no kernel can be launched, None if one can: before the first launch Triton compiles a
    driver, which takes a C compiler and Python's headers."""
    try:
        answer = torch.zeros((), dtype=torch.int32, device=device)
        with _on(device):
            probe_kernel[(1,)](answer)
        if int(answer) == 1:
            return None
        reason = f"it stored {int(answer)} for 1"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return f"a first small kernel failed ({reason}); Triton needs a C compiler (gcc) and Python's headers"


def interpreted() -> bool:
    """Say whether the kernels run in Triton's interpreter, which is for tests: TRITON_INTERPRET was set when
    they were imported."""
    return not isinstance(momentum_norm_kernel, triton.runtime.JITFunction)


def _precision(P: Tensor) -> str:
    """Return how float32 products are taken."""
    if P.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if P.is_cuda and torch.backends.cuda.matmul.fp32_precision in ("tf32", "bf16") else "tf32x3"


# ---- tables


@dataclass(frozen=True)
class _Launch:
    """The chunks of the tensors of one kind, which one launch works on."""

    kind: tuple[torch.dtype, ...]
    first: int
    count: int
    owner: "_Table"
    sizes: "_Table"


@dataclass(frozen=True, eq=False)
class _Chunks:
    """How a list of tensors is cut into chunks: launches, and the chunks of each tensor, [begins[t],
    ends[t])."""

    launches: tuple[_Launch, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    total: int


_KEPT = 256  # tables remembered of each sort; a training loop needs a handful
_captured: set["_Table"] = set()  # a CUDA graph holds their addresses, so they are never forgotten


class _Table:
    """Numbers in device memory, uploaded once; the host does not wait for it."""

    def __init__(self, values: Sequence[float], dtype: torch.dtype, device: torch.device):
        self.device = device
        if device.type != "cuda":
            self._tensor = torch.tensor(values, dtype=dtype, device=device)
            return
        if _capturing(device):
            raise RuntimeError(
                "addresses and numbers must be uploaded before a CUDA graph is captured, and these were "
                "not seen before; run the same call on the same tensors once, then capture it"
            )
        self._tensor = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True).to(
            device, non_blocking=True
        )
        self._stream = torch.cuda.current_stream(device)
        self._uploaded = self._stream.record_event()

    def get(self) -> Tensor:
        """Return the tensor, ready for the current stream."""
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            if _capturing(self.device):  # the device was synchronized before
                _captured.add(self)
            elif current != self._stream:
                current.wait_event(self._uploaded)
                self._tensor.record_stream(current)
        return self._tensor


@lru_cache(_KEPT)
def _remembered(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> _Table:
    return _Table(values, dtype, device)


@lru_cache(_KEPT)
def _chunks(
    numels: tuple[int, ...], kinds: tuple[tuple[torch.dtype, ...], ...], device: torch.device
) -> _Chunks:
    """Cut tensors into chunks; `kinds` holds one for each tensor, or one for all."""
    kinds = kinds * len(numels) if len(kinds) == 1 else kinds
    begins, ends, launches, total = [0] * len(numels), [0] * len(numels), [], 0
    for kind in dict.fromkeys(kinds):
        first, owner = total, []
        for t, numel in enumerate(numels):
            if kinds[t] == kind:
                number = triton.cdiv(numel, CHUNK)
                begins[t], ends[t] = total, total + number
                owner += [t] * number
                total += number
        if owner:
            sizes = (*numels, *(begin - first for begin in begins))
            launches.append(
                _Launch(
                    kind,
                    first,
                    len(owner),
                    _Table(owner, torch.int32, device),
                    _Table(sizes, torch.int64, device),
                )
            )
    return _Chunks(tuple(launches), tuple(begins), tuple(ends), total)


def _kinds(*lists: Fixed[Tensor | None]) -> tuple[tuple[torch.dtype, ...], ...]:
    """Return the dtypes of the first tensors of each list, of the second ones and so on; of one only if all
    are alike.

    A missing gradient counts as of the dtype of what it is the gradient of.
    """
    if all(len(tensors.dtypes) <= 1 for tensors in lists):
        default = next(iter(lists[0].dtypes), torch.float32)
        return (tuple(next(iter(tensors.dtypes), default) for tensors in lists),)
    return tuple(
        tuple((t if t is not None else row[0]).dtype for t in row) for row in zip(*lists, strict=True)
    )


def _check_devices(*lists: Fixed[Tensor | None]) -> None:
    """Raise ValueError unless all tensors are on one device: a kernel would follow an address that is not
    there."""
    if len({device for tensors in lists for device in tensors.devices}) > 1:
        raise ValueError("all tensors of a call must be on one device; got several; move them together")


def _gradients(grads: Sequence[Tensor | None], like: Fixed[Tensor]) -> Fixed[Tensor | None]:
    """Return gradients that a kernel may read element for element beside the tensors of `like`."""
    g = _dense(grads)
    if g.numels != like.numels and any(a not in (b, -1) for a, b in zip(g.numels, like.numels, strict=True)):
        raise ValueError(
            f"gradients must have as many elements as what they change; got {g.numels} for {like.numels}"
        )
    return g


def _dense(tensors: Sequence[Tensor | None]) -> Fixed[Tensor | None]:
    """Return the tensors, copies of those that are not contiguous."""
    fixed = tensors if isinstance(tensors, Fixed) else Fixed(tensors)
    return fixed if fixed.contiguous else Fixed(None if t is None else t.contiguous() for t in fixed)


def _cut(
    tensors: Fixed[Tensor | None], kinds: tuple[tuple[torch.dtype, ...], ...], device: torch.device
) -> _Chunks:
    """Return the chunks of the tensors, which keep them in memory."""
    if kinds not in tensors.memo:
        tensors.memo[kinds] = _chunks(tensors.numels, kinds, device)
    return tensors.memo[kinds]


def _addresses(tensors: Fixed[Tensor | None], device: torch.device) -> Tensor:
    """Return the tensors' addresses, 0 for None, as a table on the device; the tensors keep it in memory."""
    if "addresses" not in tensors.memo:
        tensors.memo["addresses"] = _remembered(tensors.addresses, torch.int64, device)
    return tensors.memo["addresses"].get()


@lru_cache(_KEPT)
def _segments(chunks: _Chunks, watched: _Chunks, device: torch.device) -> _Table:
    """Return the first chunk of each tensor, and the one behind its last; the watched tensors are the last
    segment."""
    return _Table(
        (*chunks.begins, chunks.total, *chunks.ends, chunks.total + watched.total), torch.int64, device
    )


def _scalars(values: Sequence[Scalar], device: torch.device) -> Tensor:
    """Return the values as one float64 tensor on the device; numbers are uploaded when they change, tensors
    are read there."""
    if any(isinstance(v, Tensor) for v in values):
        parts = [
            v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=device)
            for v in values
        ]
        return torch.stack([v.to(device, torch.float64).reshape(()) for v in parts])
    return _remembered(tuple(values), torch.float64, device).get()


def _per_tensor(value: Scalar, count: int, device: torch.device) -> tuple[Tensor, int]:
    """Return a number for all, or one for each of the tensors, as float64 on the device; and the stride
    between them."""
    if isinstance(value, Tensor) and value.ndim:
        if value.shape != (count,):
            raise ValueError(
                f"a factor must be one number or one per tensor; got shape {tuple(value.shape)} for {count} "
                "tensors"
            )
        return value.to(device, torch.float64).contiguous(), 1
    return _scalars((value,), device), 0


def _capturing(device: torch.device) -> bool:
    with _on(device):
        return torch.cuda.is_current_stream_capturing()


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
