"""Every fused kernel against its definition in plain torch and against the equations written out here in
float64.

On a GPU where there is one, otherwise in Triton's interpreter (see interpreter.py). Whatever a kernel writes
lies between sentinels: an access out of bounds goes unseen in the interpreter, and on a GPU most of the time.
"""

from __future__ import annotations

import inspect
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import curvadion_kernels
from curvadion_kernels import OPS, reference
from curvadion_kernels.reference import (
    FAILED_KEY,
    INDEX_BITS,
    INDEX_MASK,
    NO_NORM,
    NONFINITE_BIT,
    SYNCHRONIZE_BIT,
)

try:
    import triton
    import triton.language as tl

    from curvadion_kernels import triton_ops
    from curvadion_kernels.triton_ops import _chunk
except ImportError:
    triton = triton_ops = None

# What the interpreter says of values that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
needs_triton = pytest.mark.skipif(
    triton is None, reason="Triton cannot be imported; pip install -e '.[dev]', on Linux"
)
BLOCK, CHUNK, SUM_BLOCK, GATE_BLOCK = (
    (2048, 8192, 256, 1024)
    if triton is None
    else (triton_ops.BLOCK, triton_ops.CHUNK, triton_ops.SUM_BLOCK, triton_ops.GATE_BLOCK)
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# One rounding, to the nearest: the default tolerances for these two would let truncation pass. 2 % for the
# float32 arithmetic before it.
ROUNDED: dict[torch.dtype, dict[str, float]] = {
    F16: {"rtol": 1.02 * 2**-11, "atol": 1e-5},
    BF16: {"rtol": 1.02 * 2**-8, "atol": 1e-5},
    F32: {"rtol": 1.3e-6, "atol": 1e-5},
    F64: {"rtol": 1e-7, "atol": 1e-7},
}
# The reference adds up to 2e4 squares in float32 in another order, and squares a root; its own error is the
# larger one.
ORDER = {"rtol": 1e-5, "atol": 1e-6}

KINDS = {  # of the tensor in place, of the gradient
    "fp32": (F32, F32),
    "bf16 gradients": (F32, BF16),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "fp64": (F64, F64),
    "fp32 gradients": (BF16, F32),
}
kinds = pytest.mark.parametrize("kind", KINDS)
packed = pytest.mark.parametrize("packed", [False, True], ids=["aligned", "misaligned"])

SHAPES: list[tuple[int, ...]] = [
    (1,),
    (),
    (3, 5),
    (0,),
    (BLOCK,),
    (0, 4),
    (BLOCK + 1,),
    (64, CHUNK // 64),
    (CHUNK + 1,),
    (2, CHUNK + 3),
]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F32, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(device, dtype)


class Guard(TorchFunctionMode):
    """Puts tensors between sentinels; while it is active also whatever `torch.empty` and its like give out,
    filled with NaN."""

    PAD = 64  # elements; so that an offset of 0 is aligned
    SENTINEL = -77.0  # exact in every dtype but bytes

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def sentinel(cls, dtype: torch.dtype) -> float:
        return cls.SENTINEL % 256 if dtype == torch.uint8 else cls.SENTINEL

    def put(self, *values: Tensor, packed: bool = False) -> list[Tensor]:
        """Return equal tensors: aligned, or one behind the other at whatever address, as FSDP2 hands out its
        shards."""
        if not packed:
            return [view for value in values for view in self._put([value], 0)]
        views: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(v.dtype for v in values):
            places = [i for i, v in enumerate(values) if v.dtype == dtype]
            views.update(zip(places, self._put([values[i] for i in places], 1), strict=True))
        return [views[i] for i in range(len(values))]

    def _put(self, values: Sequence[Tensor], offset: int) -> list[Tensor]:
        size = 2 * self.PAD + offset + sum(v.numel() + 1 for v in values)
        dtype = values[0].dtype
        buffer = torch.full((size,), self.sentinel(dtype), dtype=dtype, device=values[0].device)
        outside = torch.ones(size, dtype=torch.bool, device=buffer.device)
        views, begin = [], self.PAD + offset
        for value in values:
            views.append(buffer[begin : begin + value.numel()].view(value.shape).copy_(value))
            outside[begin : begin + value.numel()] = False
            begin += value.numel() + 1
        self.buffers.append((buffer, outside))
        return views

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            getattr(func, "__name__", "") not in ("empty", "empty_like", "new_empty")
            or not out.is_contiguous()
        ):
            return out
        return self.put(out.fill_(math.nan if out.is_floating_point() else self.sentinel(out.dtype)))[0]

    def check(self) -> None:
        for buffer, outside in self.buffers:
            assert (buffer[outside] == self.sentinel(buffer.dtype)).all(), "written out of bounds"


@pytest.fixture
def guard() -> Iterator[Guard]:
    guard = Guard()
    with guard:
        yield guard
    guard.check()


def tensors(
    guard: Guard, device: torch.device, kind: str, packed: bool = False
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Tensors in place and gradients, of all SHAPES; the third has no gradient."""
    wide, low = KINDS[kind]
    states = guard.put(
        *[draw(*s, seed=i, dtype=wide, device=device) for i, s in enumerate(SHAPES)], packed=packed
    )
    grads: list[Tensor | None] = [
        *guard.put(
            *[draw(*s, seed=i + 50, dtype=low, device=device) for i, s in enumerate(SHAPES)], packed=packed
        )
    ]
    grads[2] = None
    return states, grads


def copies(values: Sequence[Tensor]) -> list[Tensor]:
    return [v.clone() for v in values]


def combined(a: float, old: Tensor, b: float, grad: Tensor | None) -> Tensor:
    """A old + b grad in float64."""
    return a * old.double() + (0.0 if grad is None else b * grad.double())


def accumulated(c: float, m: Tensor, grad: Tensor | None) -> Tensor:
    """C m, rounded to m's dtype as if it had been stored before, + grad, in float64."""
    wide = m.to(reference.compute_dtype(m.dtype))
    return combined(1.0, (wide * torch.tensor(c, dtype=wide.dtype, device=m.device)).to(m.dtype), 1.0, grad)


def check_rounded(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for got, want in zip(actual, exact, strict=True):
        assert_close(got.double(), want, **ROUNDED[got.dtype])


def check_norms(sums: Tensor, momenta: Sequence[Tensor]) -> None:
    assert_close(
        sums[: len(momenta)], torch.stack([m.double().square().sum() for m in momenta]).float(), **ORDER
    )


FACTORS: dict[str, Callable[[int], float | Tensor]] = {
    "number": lambda count: 0.75,
    "one": lambda count: 1.0,
    "0-d": lambda count: torch.tensor(0.75, dtype=F64),
    "0-d fp32": lambda count: torch.tensor(0.75),
    "per tensor": lambda count: torch.linspace(0.25, 1.25, count, dtype=F64),
    "per tensor fp32": lambda count: torch.linspace(0.25, 1.25, count),
}
factors = pytest.mark.parametrize("factor", FACTORS)


def factor_on(name: str, count: int, device: torch.device) -> tuple[Any, list[float]]:
    """A factor of `count` tensors as an argument, and its values."""
    value = FACTORS[name](count)
    values = value.expand(count).tolist() if isinstance(value, Tensor) else [value] * count
    return value.to(device) if isinstance(value, Tensor) else value, values


# ---- the interpreter


if triton is not None:

    @triton.jit
    def canary_kernel(x, number, rounded, squared, below, product, counted, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        value = tl.load(x + at).to(tl.bfloat16)
        tl.store(rounded + at, value)
        tl.store(squared + at, value * value)
        tl.store(below + at, (value < -0.5).to(tl.int32))
        tl.store(product + at, tl.dot(value, value))
        total = 0
        for _ in range(tl.load(number)):
            total += 1
        tl.store(counted, total)

    @triton.jit
    def chunk_kernel(owner, sizes, begin_out, size_out, count, CHUNK: tl.constexpr):
        t, begin, size = _chunk(owner, sizes, count, CHUNK)
        tl.store(begin_out + t, begin)
        tl.store(size_out + t, size)


@needs_triton
def test_the_interpreter_is_right_about_bfloat16_and_loaded_bounds(device: torch.device) -> None:
    """Ties, overflow to infinity, subnormals and NaN among the values; wrong in triton 3.6 and 3.7 unless
    interpreter.py takes effect."""
    x = draw(16, 16, device=device)
    x[0, :8] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.4e38, 1e-40, math.inf, -0.0])
    number = torch.tensor(5, dtype=torch.int32, device=device)
    rounded, squared = torch.empty_like(x, dtype=BF16), torch.empty_like(x, dtype=BF16)
    below, counted = torch.empty_like(x, dtype=torch.int32), torch.empty_like(number)
    canary_kernel[(1,)](x, number, rounded, squared, below, torch.empty_like(x), counted, 16)
    value = x.bfloat16()
    assert torch.equal(rounded, value)
    assert torch.equal(squared, value * value)
    assert torch.equal(below, (value < -0.5).int())
    assert counted.item() == 5
    x[0, 0], x[0, 1:8] = math.nan, 0.25
    product = torch.empty_like(x)
    canary_kernel[(1,)](x, number, rounded, squared, below, product, counted, 16)
    assert torch.equal(rounded.isnan(), x.isnan())
    assert_close(product, x.bfloat16().float() @ x.bfloat16().float(), equal_nan=True)


# ---- the table


@needs_triton
@pytest.mark.parametrize("name", OPS)
def test_both_implementations_have_one_signature(name: str) -> None:
    assert inspect.signature(OPS[name].reference) == inspect.signature(OPS[name].triton)


# ---- momentum_norm_


@needs_triton
@kinds
@packed
def test_momentum_norm(guard: Guard, device: torch.device, kind: str, packed: bool) -> None:
    momenta, grads = tensors(guard, device, kind, packed)
    expected, exact = copies(momenta), [accumulated(0.95, m, g) for m, g in zip(momenta, grads, strict=True)]
    sums = triton_ops.momentum_norm_(momenta, grads, decay=0.95)
    reference_sums = reference.momentum_norm_(expected, grads, decay=0.95)
    check_rounded(momenta, exact)
    assert_close(momenta, expected)
    check_norms(sums, momenta)
    assert_close(sums, reference_sums, **ORDER)
    some = [float(g is not None and bool((g != 0).any())) for g in grads]
    assert sums.dtype == F32 and sums[len(momenta) :].tolist() == [0, 0, *some]


@needs_triton
@factors
def test_momentum_norm_decays(guard: Guard, device: torch.device, factor: str) -> None:
    momenta, grads = tensors(guard, device, "fp32")
    decay, values = factor_on(factor, len(momenta), device)
    expected = copies(momenta)
    exact = [accumulated(c, m, g) for c, m, g in zip(values, momenta, grads, strict=True)]
    sums = triton_ops.momentum_norm_(momenta, grads, decay=decay)
    assert_close(sums, reference.momentum_norm_(expected, grads, decay=decay), **ORDER)
    check_rounded(momenta, exact)
    assert_close(momenta, expected)


@needs_triton
@packed
def test_momentum_norm_of_mixed_dtypes(guard: Guard, device: torch.device, packed: bool) -> None:
    """One launch per pair of dtypes, interleaved in the list: every norm must come back to its own place."""
    pairs = [pair for _ in range(2) for pair in KINDS.values()]
    shapes = [(CHUNK + i,) if i == 5 else (2 + i, 3 + i % 4) for i in range(len(pairs))]
    momenta = guard.put(
        *[
            draw(*s, seed=i, dtype=p[0], device=device)
            for i, (s, p) in enumerate(zip(shapes, pairs, strict=True))
        ],
        packed=packed,
    )
    grads = guard.put(
        *[
            draw(*s, seed=99 - i, dtype=p[1], device=device)
            for i, (s, p) in enumerate(zip(shapes, pairs, strict=True))
        ],
        packed=packed,
    )
    decay, values = factor_on("per tensor", len(momenta), device)
    expected = copies(momenta)
    exact = [accumulated(c, m, g) for c, m, g in zip(values, momenta, grads, strict=True)]
    sums = triton_ops.momentum_norm_(momenta, grads, decay=decay, watch=grads)
    assert_close(sums, reference.momentum_norm_(expected, grads, decay=decay, watch=grads), **ORDER)
    check_rounded(momenta, exact)
    check_norms(sums, momenta)
    assert_close(momenta, expected)


@needs_triton
def test_norms_do_not_depend_on_alignment_or_run(guard: Guard, device: torch.device) -> None:
    """Bit for bit, as are the momenta: the replicas' shards lie at different addresses."""
    outcomes = []
    for packed in (False, True, False):
        momenta, grads = tensors(guard, device, "fp32", packed)
        outcomes.append((triton_ops.momentum_norm_(momenta, grads, decay=0.9), *momenta))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@needs_triton
@kinds
def test_norms_without_storing(guard: Guard, device: torch.device, kind: str) -> None:
    momenta, grads = tensors(guard, device, kind)
    before = copies(momenta)
    seen = triton_ops.momentum_norm_(momenta, grads, decay=0.9, store=False)
    assert all(torch.equal(m, b) for m, b in zip(momenta, before, strict=True))
    assert torch.equal(seen, triton_ops.momentum_norm_(momenta, grads, decay=0.9))
    assert not torch.equal(momenta[0], before[0])


@needs_triton
def test_momentum_norm_of_strided_gradients(guard: Guard, device: torch.device) -> None:
    grads = [
        draw(7, 5, device=device).t(),
        draw(10, 14, seed=1, device=device)[::2, ::2],
        draw(5, 1, seed=2, device=device).expand(5, 7),
    ]
    momenta = guard.put(*[draw(5, 7, seed=9, device=device)] * 3)
    exact = [accumulated(0.5, m, g) for m, g in zip(momenta, grads, strict=True)]
    check_norms(triton_ops.momentum_norm_(momenta, grads, decay=0.5), exact)
    check_rounded(momenta, exact)


@needs_triton
@pytest.mark.parametrize("own", [False, True])
def test_momentum_norm_of_blocks_of_columns(device: torch.device, own: bool) -> None:
    """Momenta that are no runs of memory, beside one that is; each with a factor of its own, or not."""

    def momenta() -> list[Tensor]:
        whole = draw(6, 9, seed=9, device=device)
        return [whole[:, :4], draw(5, 3, seed=8, device=device), whole[:, 4:]]

    grads = [draw(6, 4, device=device), None, torch.zeros(6, 5, device=device)]
    decay = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64, device=device) if own else 0.5
    ours, theirs, bad = momenta(), momenta(), [torch.tensor([math.nan], device=device)]
    got = triton_ops.momentum_norm_(ours, grads, decay=decay, watch=bad)
    want = OPS["momentum_norm_"].reference(theirs, grads, decay=decay, watch=bad)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, theirs)


@needs_triton
def test_three_hundred_small_tensors_in_one_call(guard: Guard, device: torch.device) -> None:
    """Whole numbers, so the norms are exact."""
    shapes = [(i % 7,) for i in range(300)]
    momenta = guard.put(
        *[torch.full(s, float(i % 11), device=device) for i, s in enumerate(shapes)], packed=True
    )
    grads: list[Tensor | None] = [
        None if i % 5 == 0 else torch.ones(s, device=device) for i, s in enumerate(shapes)
    ]
    sums = triton_ops.momentum_norm_(momenta, grads, decay=2.0)
    assert sums.tolist() == [(i % 7) * (2 * (i % 11) + (i % 5 > 0)) ** 2 for i in range(300)] + [
        *(0, 0),
        *[float(i % 5 > 0 and i % 7 > 0) for i in range(300)],
    ]


@needs_triton
def test_the_chunks_of_a_large_tensor_are_summed(guard: Guard, device: torch.device) -> None:
    """The second stage alone: more chunks than it reads at a time, an empty tensor, and exact sums."""
    bounds = [
        (0, 3 * SUM_BLOCK + 1),
        (3 * SUM_BLOCK + 1, 3 * SUM_BLOCK + 1),
        (3 * SUM_BLOCK + 1, 3 * SUM_BLOCK + 6),
        (10, 12),
    ]
    partials = guard.put(torch.arange(3 * SUM_BLOCK + 6, dtype=F32, device=device))[0]
    live = guard.put(torch.zeros(3 * SUM_BLOCK + 6, device=device))[0]
    live[3 * SUM_BLOCK] = 1.0  # the last of the first tensor
    segments = torch.tensor([[b for b, _ in bounds], [e for _, e in bounds]], device=device)
    sums = torch.empty(2 * len(bounds), device=device)
    triton_ops.segment_sum_kernel[(len(bounds),)](
        partials, live, segments, sums, len(bounds) - 1, SUM_BLOCK, num_warps=4
    )
    assert sums.tolist() == [*[float(sum(range(*b))) for b in bounds[:-1]], 1.0, 0.0, 1.0, 0.0, 0.0]


@needs_triton
def test_momentum_norm_of_nothing(device: torch.device) -> None:
    for op in (triton_ops.momentum_norm_, reference.momentum_norm_):
        assert op([], []).tolist() == [0, 0]
        assert op([], [], watch=[torch.full((3,), math.inf, device=device)]).tolist() == [1, 0]
        empty = [torch.zeros(0, 4, device=device), torch.zeros(0, device=device)]
        assert op(empty, [None, empty[1]], decay=0.5, watch=empty).tolist() == [0] * 6


@needs_triton
def test_what_momentum_norm_rejects(device: torch.device) -> None:
    m = torch.ones(4, 3, device=device)
    with pytest.raises(ValueError, match="gradients must have as many elements"):
        triton_ops.momentum_norm_([m], [m[:3]])
    for op in (triton_ops.momentum_norm_, reference.momentum_norm_):
        with pytest.raises(ValueError, match="one number or one per tensor"):
            op([m, m.clone()], [None, None], decay=torch.ones(3, device=device))


LARGEST = {F16: 65504.0, BF16: 3.3e38, F32: 3.4e38, F64: 1e300}


@needs_triton
@packed
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "largest", "-largest"], ids=str)
def test_watched_tensors_are_searched_for_nonfinite_values(
    guard: Guard, device: torch.device, dtype: torch.dtype, value: float | str, packed: bool
) -> None:
    """In the aligned body, in the tail, in the second chunk and in the last of several tensors."""
    number = value if isinstance(value, float) else LARGEST[dtype] * (-1 if value[0] == "-" else 1)
    for numel, place in ((CHUNK + 1, 5), (CHUNK + 1, CHUNK), (3, 2)):
        clean = [torch.ones(4, dtype=F32, device=device), torch.ones(0, dtype=dtype, device=device)]
        watch = guard.put(*clean, torch.ones(numel, dtype=dtype, device=device), packed=packed)
        watch[2][place] = number
        for op in (triton_ops.momentum_norm_, reference.momentum_norm_):
            m = torch.ones(3, device=device)
            sums = op([m], [None], watch=watch)
            assert sums.tolist() == [3, float(not math.isfinite(number)), 0, 0], op.__module__


@needs_triton
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e25])
def test_a_momentum_that_is_not_finite_shows_in_its_norm(
    guard: Guard, device: torch.device, value: float
) -> None:
    """Also one whose square is not. The other norms and the flag of what is watched stay as they are."""
    momenta = guard.put(*[torch.ones(CHUNK + 5, device=device)] * 2)
    gradient = torch.zeros_like(momenta[0])
    gradient[CHUNK + 2] = value
    sums = triton_ops.momentum_norm_(momenta, [gradient, None])
    assert not sums[0].isfinite() and sums[1:].tolist() == [CHUNK + 5, 0, 0, 1, 0]


@pytest.mark.sample
@needs_triton
@packed
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_a_gradient_is_not_zero_however_small(
    guard: Guard, device: torch.device, dtype: torch.dtype, packed: bool
) -> None:
    """In the aligned body, in the tail, in the second chunk; also one whose square is 0, and NaN."""
    for value in (torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny, math.nan):
        for numel, place in ((CHUNK + 1, 5), (CHUNK + 1, CHUNK), (3, 2)):
            grads = [torch.zeros(numel, dtype=dtype, device=device) for _ in range(3)]
            grads[1][place] = value
            put = guard.put(*grads, packed=packed)
            for op in (triton_ops.momentum_norm_, reference.momentum_norm_):
                for store in (True, False):
                    momenta = [torch.ones(numel, device=device, dtype=dtype) for _ in range(4)]
                    sums = op(momenta, [*put, None], store=store)
                    assert sums[6:].tolist() == [0, 1, 0, 0], op.__module__


# ---- gate_key


def decode(key: int) -> tuple[bool, bool, bool, float, int]:
    """(failed, not finite, synchronize, largest RMMC, its index or -1)."""
    if key == FAILED_KEY:
        return True, False, False, math.nan, -1
    bits, index = key >> INDEX_BITS & (1 << 31) - 1, key & INDEX_MASK
    rmmc = struct.unpack("<f", struct.pack("<I", bits))[0]
    return (
        False,
        bool(key & NONFINITE_BIT),
        bool(key & SYNCHRONIZE_BIT),
        rmmc,
        INDEX_MASK - index if index else -1,
    )


NAN, INF = math.nan, math.inf
GATE_CASES: dict[
    str, tuple[list[float], list[float], list[float], list[float], bool, tuple[bool, bool, bool, float, int]]
] = {
    # name: squared norms, flags, last norms, tau, hold_closed -> (failed, not finite, synchronize, RMMC,
    # index)
    "first step": ([4.0], [0, 0], [NO_NORM], [0.5], False, (False, False, True, 0.0, -1)),
    "first step, held": ([4.0], [0, 0], [NO_NORM], [0.5], True, (False, False, True, 0.0, -1)),
    "first step of 0": ([0.0], [0, 0], [NO_NORM], [0.5], False, (False, False, True, 0.0, -1)),
    "both 0": ([0.0], [0, 0], [0.0], [0.0], False, (False, False, False, 0.0, 0)),
    "from 0": ([4.0], [0, 0], [0.0], [INF], False, (False, False, True, 0.0, -1)),
    "to 0": ([0.0], [0, 0], [2.0], [0.5], False, (False, False, True, 1.0, 0)),
    "below": ([9.0], [0, 0], [2.0], [0.75], False, (False, False, False, 0.5, 0)),
    "equal": ([9.0], [0, 0], [2.0], [0.5], False, (False, False, False, 0.5, 0)),
    "above": ([9.0], [0, 0], [2.0], [0.25], False, (False, False, True, 0.5, 0)),
    "above, shrinking": ([1.0], [0, 0], [2.0], [0.25], False, (False, False, True, 0.5, 0)),
    "above, held": ([9.0], [0, 0], [2.0], [0.25], True, (False, False, False, 0.5, 0)),
    "tau inf": ([1e30], [0, 0], [1e-15], [INF], False, (False, False, False, 1e30, 0)),
    "must": ([4.0], [0, 1], [2.0], [0.5], False, (False, False, True, 0.0, 0)),
    "must, held": ([4.0], [0, 2], [2.0], [0.5], True, (False, False, True, 0.0, 0)),
    "watched": ([4.0], [1, 0], [2.0], [0.5], False, (False, True, False, 0.0, 0)),
    "watched by three, above": ([9.0], [3, 0], [2.0], [0.25], False, (False, True, True, 0.5, 0)),
    "norm NaN": ([NAN], [0, 0], [2.0], [0.5], False, (False, True, False, 0.0, -1)),
    "norm NaN from 0": ([NAN], [0, 0], [0.0], [0.5], False, (False, True, False, 0.0, -1)),
    "norm NaN, first step": ([NAN], [0, 0], [NO_NORM], [0.5], False, (False, True, True, 0.0, -1)),
    "norm inf": ([INF], [0, 0], [2.0], [0.5], False, (False, True, True, INF, 0)),
    "norm inf from inf": ([INF], [0, 0], [INF], [0.5], False, (False, True, False, 0.0, -1)),
    "failed": ([9.0], [NAN, 1], [2.0], [0.25], False, (True, False, False, NAN, -1)),
    "failed, nothing to sum": ([], [NAN, 0], [], [], False, (True, False, False, NAN, -1)),
    "no matrix": ([], [0, 0], [], [], False, (False, False, False, 0.0, -1)),
    "no matrix, must": ([], [0, 1], [], [], True, (False, False, True, 0.0, -1)),
    "no matrix, watched": ([], [1, 0], [], [], True, (False, True, False, 0.0, -1)),
    "tie": ([4.0, 9.0, 9.0, 1.0], [0, 0], [2.0] * 4, [1.0] * 4, False, (False, False, False, 0.5, 1)),
    "own tau": ([9.0, 4.0, 6.25], [0, 0], [2.0] * 3, [0.5, 0.0, 0.125], False, (False, False, True, 0.5, 0)),
    "one undefined": ([9.0, 4.0], [0, 0], [2.0, NO_NORM], [1.0, 1.0], True, (False, False, True, 0.5, 0)),
}


@needs_triton
@pytest.mark.parametrize("case", GATE_CASES)
def test_gate_key(guard: Guard, device: torch.device, case: str) -> None:
    """Worked out by hand, and bit for bit the reference."""
    squares, flags, last, tau, hold_closed, expected = GATE_CASES[case]
    arguments = guard.put(
        *[torch.tensor(v, dtype=torch.float32, device=device) for v in (squares + flags, last, tau)]
    )
    got = triton_ops.gate_key(*arguments, hold_closed=hold_closed)
    want = reference.gate_key(*arguments, hold_closed=hold_closed)
    for outcome in (got, want):
        failed, nonfinite, synchronize, rmmc, index = decode(int(outcome[2]))
        assert (failed, nonfinite, synchronize, index) == (expected[0], expected[1], expected[2], expected[4])
        assert rmmc == pytest.approx(expected[3], nan_ok=True)
    check_same_gate(got, want)


def check_same_gate(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert_close(got[:2], want[:2], rtol=0, atol=0, equal_nan=True)
    assert got[2].dtype == torch.int64 and got[2].shape == () and int(got[2]) == int(want[2])


@needs_triton
@pytest.mark.parametrize("hold_closed", [False, True])
@pytest.mark.parametrize("count", [1, GATE_BLOCK - 1, GATE_BLOCK, GATE_BLOCK + 1, 2 * GATE_BLOCK + 1])
def test_gate_key_of_many_matrices(guard: Guard, device: torch.device, count: int, hold_closed: bool) -> None:
    """Bit for bit the reference, and float64. The largest RMMC is the last matrix's, behind the blocks that
    the kernel reads at a time."""
    last = draw(count, seed=1, device=device).abs() + 0.5
    squares = draw(count, seed=2, device=device).square()
    squares[-1] = (3 * last[-1] + 20).square()
    tau = torch.full_like(last, INF)
    for threshold in (INF, 1.0):
        tau[-1] = threshold
        sums, last, tau = guard.put(torch.cat([squares, squares.new_zeros(2)]), last, tau)
        got = triton_ops.gate_key(sums, last, tau, hold_closed=hold_closed)
        check_same_gate(got, reference.gate_key(sums, last, tau, hold_closed=hold_closed))
        norm = squares.double().sqrt()
        rmmc = (norm - last.double()).abs() / last.double()
        assert_close(got[0], norm.float())
        assert_close(got[1], rmmc.float())
        failed, nonfinite, synchronize, largest, index = decode(int(got[2]))
        assert (failed, nonfinite, synchronize, index) == (
            False,
            False,
            threshold == 1.0 and not hold_closed,
            count - 1,
        )
        assert largest == float(got[1][-1])


@needs_triton
@pytest.mark.parametrize("place", [0, GATE_BLOCK - 1, GATE_BLOCK, GATE_BLOCK + 4])
@pytest.mark.parametrize(
    ("square", "before", "flags"),
    [(9.0, NO_NORM, (False, True)), (9.0, 0.0, (False, True)), (NAN, 3.0, (True, False))],
    ids=str,
)
def test_one_of_many_matrices_is_enough(
    guard: Guard, device: torch.device, place: int, square: float, before: float, flags: tuple[bool, bool]
) -> None:
    count = GATE_BLOCK + 5
    sums, last, tau = guard.put(
        torch.full((count + 2,), 9.0, device=device),
        *[torch.full((count,), v, device=device) for v in (3.0, 0.1)],
    )
    sums[-2:] = 0
    for outcome in (
        reference.gate_key(sums, last, tau, hold_closed=False),
        triton_ops.gate_key(sums, last, tau, hold_closed=False),
    ):
        assert decode(int(outcome[2])) == (False, False, False, 0.0, 0)
    sums[place], last[place] = square, before
    got = triton_ops.gate_key(sums, last, tau, hold_closed=False)
    assert decode(int(got[2])) == (False, *flags, 0.0, 0 if place else 1)
    check_same_gate(got, reference.gate_key(sums, last, tau, hold_closed=False))


# ---- local_step_


@needs_triton
@kinds
@packed
def test_local_step(guard: Guard, device: torch.device, kind: str, packed: bool) -> None:
    params, grads = tensors(guard, device, kind, packed)
    expected, exact = copies(params), [combined(0.99, x, -0.3, g) for x, g in zip(params, grads, strict=True)]
    triton_ops.local_step_(params, grads, decay=0.99, step_size=0.3)
    reference.local_step_(expected, grads, decay=0.99, step_size=0.3)
    check_rounded(params, exact)
    assert_close(params, expected)


@needs_triton
@factors
def test_local_step_factors(guard: Guard, device: torch.device, factor: str) -> None:
    """Both factors, in every form, and together with parameters that are not contiguous, which take another
    way."""
    params, grads = tensors(guard, device, "fp32")
    params[1:1] = [
        guard.put(draw(9, 8, seed=7, device=device))[0].t(),
        guard.put(draw(6, 6, seed=8, device=device))[0][::2, 1::2],
    ]
    grads[1:1] = [draw(8, 9, seed=5, device=device), draw(3, 3, seed=6, device=device).t()]
    decay, a = factor_on(factor, len(params), device)
    step_size, b = factor_on(factor, len(params), device)
    outside = params[2]._base.clone()
    expected = copies(params)
    exact = [combined(a, x, -b, g) for a, b, x, g in zip(a, b, params, grads, strict=True)]
    triton_ops.local_step_(params, grads, decay=decay, step_size=step_size)
    reference.local_step_(expected, grads, decay=decay, step_size=step_size)
    check_rounded(params, exact)
    assert_close(params, expected)
    changed = params[2]._base != outside
    assert changed.sum() == 9, "only the elements of the view may change"


@needs_triton
@pytest.mark.parametrize(
    ("decay", "step_size"),
    [("number", "per tensor"), ("per tensor", "number"), ("0-d", "number"), ("number", "0-d")],
)
def test_local_step_factors_of_two_forms(
    guard: Guard, device: torch.device, decay: str, step_size: str
) -> None:
    params, grads = tensors(guard, device, "fp32")
    (a, a_values), (b, b_values) = (
        factor_on(decay, len(params), device),
        factor_on(step_size, len(params), device),
    )
    expected = copies(params)
    exact = [combined(u, x, -v, g) for u, v, x, g in zip(a_values, b_values, params, grads, strict=True)]
    triton_ops.local_step_(params, grads, decay=a, step_size=b)
    reference.local_step_(expected, grads, decay=a, step_size=b)
    check_rounded(params, exact)
    assert_close(params, expected)


@needs_triton
def test_local_step_of_mixed_dtypes_and_many_tensors(guard: Guard, device: torch.device) -> None:
    pairs = [list(KINDS.values())[i % len(KINDS)] for i in range(150)]
    params = guard.put(
        *[torch.full((i % 5,), float(i % 7), dtype=p[0], device=device) for i, p in enumerate(pairs)],
        packed=True,
    )
    grads = guard.put(
        *[torch.full((i % 5,), float(i % 3), dtype=p[1], device=device) for i, p in enumerate(pairs)],
        packed=True,
    )
    triton_ops.local_step_(
        params, [None if i % 4 == 0 else g for i, g in enumerate(grads)], decay=0.5, step_size=2.0
    )
    for i, x in enumerate(params):
        assert x.tolist() == [(i % 7) / 2 - 2 * (i % 3) * (i % 4 > 0)] * (i % 5)


KEYS = {
    "closed": (INDEX_MASK, True),
    "closed, RMMC inf": ((0x7F800000 << INDEX_BITS) | INDEX_MASK, True),
    "zero": (0, True),
    "synchronize": (SYNCHRONIZE_BIT, False),
    "synchronize and RMMC": (SYNCHRONIZE_BIT | (0x3F000000 << INDEX_BITS) | INDEX_MASK, False),
    "not finite": (NONFINITE_BIT, False),
    "both": (NONFINITE_BIT | SYNCHRONIZE_BIT, False),
    "failed": (FAILED_KEY, False),
}


@needs_triton
@packed
@pytest.mark.parametrize("key", KEYS)
def test_local_step_waits_for_a_closed_gate(
    guard: Guard, device: torch.device, key: str, packed: bool
) -> None:
    value, applied = KEYS[key]
    (on_device,) = guard.put(torch.tensor(value, device=device))
    for op in (triton_ops.local_step_, reference.local_step_):
        params, grads = tensors(guard, device, "fp32", packed)
        strided = draw(3, 4, device=device).t()
        params, grads = [*params, strided], [*grads, torch.ones_like(strided)]
        before = copies(params)
        op(params, grads, decay=0.5, step_size=0.25, key=on_device)
        exact = [
            combined(0.5, x, -0.25, g) if applied else x.double() for x, g in zip(before, grads, strict=True)
        ]
        check_rounded(params, exact)
        assert applied or all(torch.equal(x, b) for x, b in zip(params, before, strict=True))


@needs_triton
def test_local_step_of_nothing(device: torch.device) -> None:
    for op in (triton_ops.local_step_, reference.local_step_):
        op([], [], decay=0.5, step_size=1.0)
        op(
            [torch.zeros(0, device=device)],
            [None],
            decay=0.5,
            step_size=1.0,
            key=torch.tensor(0, device=device),
        )


# ---- low_rank_apply_


APPLY_KINDS = {
    "fp32": (F32, F32, F32),
    "bf16 X": (BF16, F32, F32),
    "bf16 X and M": (BF16, BF16, F32),
    "fp64": (F64, F64, F64),
}


def low_rank(
    guard: Guard,
    device: torch.device,
    B: int,
    rows: int,
    cols: int,
    r: int,
    kind: str,
    transposed: bool,
    packed: bool = False,
) -> SimpleNamespace:
    """X, M, P, Q, R and scale; the scales spread over powers of 2 that keep products near 1."""
    x_type, m_type, f_type = APPLY_KINDS[kind]
    m, n = (cols, rows) if transposed else (rows, cols)
    return SimpleNamespace(
        params=guard.put(
            *[draw(rows, cols, seed=i, dtype=x_type, device=device) for i in range(B)], packed=packed
        ),
        momentum=guard.put(draw(B, rows, cols, seed=20, dtype=m_type, device=device))[0],
        P=draw(B, m, r, seed=21, dtype=f_type, device=device),
        Q=draw(B, n, r, seed=22, dtype=f_type, device=device),
        R=draw(B, n, r, seed=23, dtype=f_type, device=device),
        scale=2.0 ** draw(B, r, seed=24, dtype=f_type, device=device).round(),
    )


def check_low_rank(
    function: Callable[..., None],
    given: SimpleNamespace,
    *,
    transposed: bool,
    momentum: bool,
    scaled: bool,
    with_R: bool = True,
) -> None:
    a, b, c = 0.875, 0.3, 0.6
    P, Q, R = given.P, None if scaled else given.Q, given.R if with_R or scaled else None
    M = given.momentum if momentum else None
    right = given.R * given.scale[:, None] if scaled else given.Q
    update, taken = P.double() @ right.double().mT, P.double() @ given.R.double().mT
    if transposed:
        update, taken = update.mT, taken.mT
    exact = [a * x.double() - b * u for x, u in zip(given.params, update, strict=True)]
    exact_M = given.momentum.double() - c * taken if momentum else given.momentum.double()
    expected, expected_M = copies(given.params), None if M is None else M.clone()
    options = {
        "transposed": transposed,
        "decay": a,
        "step_size": b,
        "feedback": c,
        "scale": given.scale if scaled else None,
    }
    function(given.params, M, P, Q, R, **options)
    reference.low_rank_apply_(expected, expected_M, P, Q, R, **options)
    check_rounded([*given.params, given.momentum], [*exact, exact_M])
    assert_close(given.params, expected)
    if expected_M is not None:
        assert_close(given.momentum, expected_M)


@needs_triton
@pytest.mark.parametrize(
    ("kind", "r", "B"),
    [("fp32", 1, 1), ("fp32", 33, 1), ("bf16 X", 7, 2), ("bf16 X and M", 33, 1), ("fp64", 7, 1)],
    ids=str,
)
@pytest.mark.parametrize("momentum", [True, False], ids=["X and M", "X only"])
@pytest.mark.parametrize("scaled", [True, False], ids=["scale", "Q"])
@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
def test_low_rank_apply(
    guard: Guard,
    device: torch.device,
    transposed: bool,
    scaled: bool,
    momentum: bool,
    kind: str,
    r: int,
    B: int,
) -> None:
    """Rows, columns and ranks beside the tiles' edges; X misaligned at rank 7."""
    rows, cols = (69, 131) if transposed else (131, 69)
    given = low_rank(guard, device, B, rows, cols, r, kind, transposed, packed=r == 7)
    check_low_rank(
        triton_ops.low_rank_apply_,
        given,
        transposed=transposed,
        momentum=momentum,
        scaled=scaled,
        with_R=momentum,
    )


@needs_triton
@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
@pytest.mark.parametrize(
    ("B", "rows", "cols", "r"),
    [
        (1, 1, 1, 1),
        (3, 128, 64, 16),
        (1, 9 * 128 + 5, 65, 3),
        (2, 5, 300, 5),
        (1, 64, 64, 128),
        (1, 20, 10, 0),
    ],
    ids=["one element", "one tile", "several groups of tiles", "flat", "many ranks", "rank 0"],
)
def test_low_rank_apply_tiles(
    guard: Guard, device: torch.device, B: int, rows: int, cols: int, r: int, precision: str
) -> None:
    """Every tile once: the order of the tiles within groups leaves out none and repeats none. The tile
    depends on the precision."""

    def function(*args: Any, **kwargs: Any) -> None:
        triton_ops.fused_low_rank_apply_(*args, **kwargs, precision=precision)

    given = low_rank(guard, device, B, rows, cols, r, "fp32", rows < cols)
    check_low_rank(function, given, transposed=rows < cols, momentum=True, scaled=False)


@needs_triton
@pytest.mark.parametrize("which", ["X", "M", "X and M"])
def test_low_rank_apply_where_x_or_m_is_not_contiguous(
    guard: Guard, device: torch.device, which: str
) -> None:
    given = low_rank(guard, device, 2, 20, 10, 3, "fp32", False)
    if "X" in which:
        given.params = [guard.put(x.t())[0].t() for x in given.params]
    if "M" in which:
        given.momentum = guard.put(given.momentum.mT)[0].mT
    check_low_rank(triton_ops.low_rank_apply_, given, transposed=False, momentum=True, scaled=False)


@needs_triton
def test_low_rank_apply_of_strided_factors_and_factors_as_tensors(guard: Guard, device: torch.device) -> None:
    """`torch.linalg.qr` returns column-major factors; a schedule may live on the device."""
    given = low_rank(guard, device, 2, 20, 10, 3, "fp32", False)
    strided = [F.mT.contiguous().mT for F in (given.P, given.Q, given.R)]
    numbers = {"decay": 0.5, "step_size": 0.25, "feedback": 0.75}
    expected, expected_M = copies(given.params), given.momentum.clone()
    triton_ops.low_rank_apply_(expected, expected_M, given.P, given.Q, given.R, transposed=False, **numbers)
    for dtype in (F32, F64):
        params, momentum = copies(given.params), given.momentum.clone()
        on_device = {name: torch.tensor(value, dtype=dtype, device=device) for name, value in numbers.items()}
        triton_ops.low_rank_apply_(params, momentum, *strided, transposed=False, **on_device)
        assert all(
            torch.equal(x, e) for x, e in zip([*params, momentum], [*expected, expected_M], strict=True)
        )
        reference.low_rank_apply_(
            params := copies(given.params),
            momentum := given.momentum.clone(),
            *strided,
            transposed=False,
            **on_device,
        )
        assert_close([*params, momentum], [*expected, expected_M])


@needs_triton
def test_low_rank_apply_of_nothing(device: torch.device) -> None:
    for op in (triton_ops.low_rank_apply_, reference.low_rank_apply_):
        factor = torch.ones(1, 4, 2, device=device)
        op([], None, factor[:0], factor[:0], None, transposed=False, decay=1.0, step_size=1.0)
        op(
            [torch.ones(0, 4, device=device)],
            None,
            factor[:, :0],
            factor,
            None,
            transposed=False,
            decay=1.0,
            step_size=1.0,
        )


@needs_triton
@pytest.mark.parametrize(("contiguous", "calls"), [(True, 1), (False, 0)])
def test_which_products_are_fused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, contiguous: bool, calls: int
) -> None:
    """The reference takes the place of the kernel where X is strided, and only there: the tests above would
    not notice."""
    fused: list[int] = []
    monkeypatch.setattr(triton_ops, "fused_low_rank_apply_", lambda *args, **kwargs: fused.append(1))
    x = torch.ones(6, 4, device=device)
    P, Q = torch.ones(1, 6, 2, device=device), torch.ones(1, 4, 2, device=device)
    triton_ops.low_rank_apply_(
        [x if contiguous else x.t().contiguous().t()],
        None,
        P,
        Q,
        None,
        transposed=False,
        decay=1.0,
        step_size=1.0,
    )
    assert len(fused) == calls


# ---- column_sumsq


@needs_triton
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 33, 7), (2, 512, 64), (1, 1030, 65), (1, 0, 5), (2, 5, 0), (0, 5, 3)], ids=str
)
def test_column_sumsq(guard: Guard, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Beside the tiles' edges, several blocks of rows, and nothing."""
    R = draw(*shape, dtype=dtype, device=device)
    sums = triton_ops.column_sumsq(R)
    assert sums.dtype == F64 and sums.shape == (shape[0], shape[2])
    assert_close(sums, R.double().square().sum(dim=1))
    assert_close(sums, reference.column_sumsq(R))
    if dtype == F32:
        assert torch.equal(sums, triton_ops.column_sumsq(R.mT.contiguous().mT)), (
            "from run to run, and of a column-major R"
        )


# ---- sign_encode_, sign_decode_


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether they agree also in the signs of zeros; which NaN a NaN is does not count."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    bits = [torch.where(t.isnan(), 0.0, t).view(integers) if t.is_floating_point() else t for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)


def blocks_of(number: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Blocks of 128 values from denormal to near the largest, of zeros of both signs, NaNs and infinities."""
    x = draw(number, 128, seed=seed)
    x *= torch.logspace(-44, 38, max(number, 2))[:number, None]
    if number > 8:
        x[2], x[3], x[4], x[5, 7], x[6, 9], x[7, 11] = 0.0, -0.0, 3e38, math.nan, math.inf, -math.inf
    return x.view(-1).to(device, dtype)


def signs_exactly(s: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes and the values of float32 numbers, by the equations: block by block, sums in a tree."""
    payload, values = bytearray(), []
    for block in s.cpu().view(-1, 128):
        sums = (block.abs() / 64).unbind()  # before the sum, which may overflow
        while len(sums) > 1:
            sums = tuple(a + b for a, b in zip(sums[::2], sums[1::2], strict=True))
        step = sums[0].bfloat16()
        positive = [bool(v >= 0) for v in block]
        if step.isnan():
            payload += b"\xc0\x7f"
        else:
            payload += struct.pack("<f", float(step))[2:]
        payload += sum(bit << place for place, bit in enumerate(positive)).to_bytes(16, "little")
        values += [step.float() / 2 * (1 if bit else -1) for bit in positive]
    return torch.tensor(list(payload), dtype=torch.uint8), torch.stack(values)


SIGN_DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)


@needs_triton
@SIGN_DTYPES
@pytest.mark.parametrize(("number", "missing"), [(0, 0), (1, 0), (37, 0), (37, 131), (16, 1), (16, 16 * 128)])
def test_sign_encode(
    guard: Guard, device: torch.device, number: int, missing: int, dtype: torch.dtype
) -> None:
    """Bit for bit, beside the programs' edges and where x is shorter than the residual."""
    size = 128 * number
    e, x = guard.put(
        blocks_of(number, dtype, device), blocks_of(number, dtype, device, seed=1)[: size - missing]
    )
    before, expected = e.clone().float(), e.clone()
    payload = triton_ops.sign_encode_(e, x)
    wanted = reference.sign_encode_(expected, x)
    assert payload.shape == (18 * number,) and torch.equal(payload, wanted)
    assert same_bits(e, expected)
    if number == 37:
        before[: len(x)] += x.float()
        exact, values = signs_exactly(before)
        assert torch.equal(payload.cpu(), exact)
        assert same_bits(e.cpu(), (before.cpu() - values).to(dtype))


@needs_triton
@packed
def test_sign_encode_of_mixed_dtypes(guard: Guard, device: torch.device, packed: bool) -> None:
    """Of a bfloat16 x and a float32 residual, at any address; and float64 by the reference."""
    for dtype, other in ((BF16, F32), (F32, F64), (F64, F64)):
        e, x = guard.put(
            blocks_of(20, other, device), blocks_of(18, dtype, device, seed=3)[: 17 * 128 + 1], packed=packed
        )
        expected = e.clone()
        assert torch.equal(triton_ops.sign_encode_(e, x), reference.sign_encode_(expected, x))
        assert same_bits(e, expected)


@pytest.mark.sample
@needs_triton
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_sign_decode(guard: Guard, device: torch.device, count: int, dtype: torch.dtype) -> None:
    """Bit for bit, of rows that lie apart as those of a part do."""
    sent = [blocks_of(40, F32, device, seed=k).roll(128 * k) for k in range(count)]
    payloads = torch.stack([reference.sign_encode_(s.clone(), s[:0]) for s in sent])
    for begin, end in ((0, 40), (3, 20), (16, 32), (5, 5)):
        values = torch.empty(128 * (end - begin), dtype=dtype, device=device)
        expected, rows = torch.empty_like(values), payloads[:, 18 * begin : 18 * end]
        triton_ops.sign_decode_(values, rows)
        reference.sign_decode_(expected, rows)
        assert same_bits(values, expected)
    total = torch.zeros(40 * 128)
    for s in sent:
        total = total + signs_exactly(s)[1]
    values = torch.empty(40 * 128, device=device)
    triton_ops.sign_decode_(values, payloads)
    assert_close(values.cpu(), total / count, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", ["reference", pytest.param("triton", marks=needs_triton)])
def test_the_signs_refuse_what_does_not_fit(device: torch.device, op: str) -> None:
    encode, decode = (getattr(OPS[name], op) for name in ("sign_encode_", "sign_decode_"))
    values, payloads = torch.zeros(256, device=device), torch.zeros(2, 36, dtype=torch.uint8, device=device)
    for residual in (values[:200], values.view(2, 128), torch.zeros(512, device=device)[::2]):
        with pytest.raises(ValueError, match="residual must be flat"):
            encode(residual, values[:1])
    for x in (torch.zeros(257, device=device), values.view(2, 128), values[::2], values.to("meta")):
        with pytest.raises(ValueError, match="x must be flat"):
            encode(values, x)
    for wrong in (values[:200], values.view(2, 128)):
        with pytest.raises(ValueError, match="values must be flat"):
            decode(wrong, payloads)
    for sent in (payloads[0], payloads[:0], payloads[:, :18], payloads.expand(2, 2, 36)):
        with pytest.raises(ValueError, match=r"payloads must be \(K, 36\)"):
            decode(values, sent)
    for sent in (payloads.to(torch.int8), payloads.to("meta")):
        with pytest.raises(ValueError, match="payloads must be uint8 on"):
            decode(values, sent)


# ---- symmetric_product


def symmetric(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    A = draw(*shape, dtype=F64, device=device)
    return ((A + A.mT) / 2).to(dtype)


def check_symmetric(A: Tensor, function: Callable[..., Tensor], alpha: float, beta: float) -> None:
    C = function(A, alpha=alpha, beta=beta)
    B, m, n = A.shape
    assert C.dtype == A.dtype and C.shape == (B, n, n) and C.is_contiguous()
    exact = alpha * (A.double().mT @ A.double()) + (beta * A.double() if beta else 0)
    # Sums of m products in float32, the partial sums as large as sqrt(m) of them.
    rtol, atol = ROUNDED[A.dtype]["rtol"], 1e-6 * (m + 10)
    assert_close(C.double(), exact, rtol=rtol, atol=atol)
    assert_close(C, reference.symmetric_product(A, alpha=alpha, beta=beta), rtol=2 * rtol, atol=2 * atol)


@needs_triton
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (2, 5, 3),
        (1, 64, 128),
        (1, 70, 129),
        (1, 33, 300),
        (1, 3, 400),
        (1, 0, 5),
        (2, 5, 0),
        (0, 5, 3),
    ],
    ids=str,
)
def test_symmetric_product(
    guard: Guard, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """One tile to seven a side, an even number and an odd one, beside the tiles' edges, and nothing."""
    [A] = guard.put(draw(*shape, dtype=dtype, device=device))
    C = triton_ops.fused_symmetric_product(A)
    assert torch.equal(C, C.mT), "to the bit"
    check_symmetric(A, triton_ops.fused_symmetric_product, 1.0, 0.0)
    check_symmetric(A, triton_ops.fused_symmetric_product, -0.75, 0.0)


@needs_triton
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("n", [1, 65, 128, 200])
def test_symmetric_product_with_a_added(
    guard: Guard, device: torch.device, n: int, dtype: torch.dtype
) -> None:
    [A] = guard.put(symmetric(2, n, n, dtype=dtype, device=device))
    for function in (triton_ops.fused_symmetric_product, triton_ops.symmetric_product):
        check_symmetric(A, function, 0.5, -1.25)
        check_symmetric(A.mT, function, 0.5, -1.25)


@needs_triton
@pytest.mark.parametrize(
    "view",
    [
        lambda A: A.mT,
        lambda A: A[:, ::2],
        lambda A: A[:, :, 1::3],
        lambda A: A[::2, 3:, 5:],
        lambda A: A.expand(3, -1, -1) if len(A) == 1 else A[:1].expand(3, -1, -1),
    ],
    ids=["column-major", "every other row", "every third column", "a corner", "one for all"],
)
def test_symmetric_product_at_any_strides(
    guard: Guard, device: torch.device, view: Callable[[Tensor], Tensor]
) -> None:
    [A] = guard.put(draw(3, 20, 150, dtype=BF16, device=device))
    check_symmetric(view(A), triton_ops.fused_symmetric_product, 1.0, 0.0)


@needs_triton
@pytest.mark.parametrize("which", ["batch", "row", "column"])
def test_symmetric_product_beyond_2_to_the_31(device: torch.device, which: str) -> None:
    """Of memory that is only reserved, but for a few entries."""
    far = 2**31 + 64
    strides = {"batch": (far, 4, 1), "row": (1, far, 2), "column": (1, 2, far)}[which]
    shape = {"batch": (2, 3, 4), "row": (1, 2, 4), "column": (1, 4, 2)}[which]
    A = torch.empty(far + 64, dtype=torch.bfloat16, device=device).as_strided(shape, strides)
    A.copy_(draw(*shape, device=device))
    check_symmetric(A, triton_ops.fused_symmetric_product, 1.0, 0.0)


@needs_triton
def test_which_symmetric_products_are_fused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones, enough of them to fill a GPU, and none of float64."""
    fused: list[tuple[int, ...]] = []
    monkeypatch.setattr(triton_ops, "fused_symmetric_product", lambda A, **_: fused.append(tuple(A.shape)))
    n, tile = triton_ops.SYMMETRIC_SIZE, triton_ops.symmetric_tile(BF16, "ieee")["TILE"]
    enough = -(-triton_ops.SYMMETRIC_TILES // ((n // tile) * (n // tile + 1) // 2))
    for B, size, dtype in ((enough, n, BF16), (enough - 1, n, BF16), (enough, n - 1, BF16), (enough, n, F64)):
        triton_ops.symmetric_product(torch.zeros(B, 1, size, dtype=dtype, device=device))
    assert fused == [(enough, 1, n)]


@needs_triton
def test_the_symmetric_product_refuses_what_does_not_fit(device: torch.device) -> None:
    for A, beta in (
        (torch.zeros(4, 4), 0.0),
        (torch.zeros(1, 4, 4).double(), 0.0),
        (torch.zeros(1, 4, 3), 1.0),
    ):
        with pytest.raises(ValueError, match="must be"):
            triton_ops.fused_symmetric_product(A.to(device), beta=beta)


@needs_triton
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_newton_schulz_by_symmetric_products(device: torch.device, dtype: torch.dtype) -> None:
    """Of tall and wide matrices, where M is a transposed view: as far from float64 as with two whole
    products."""
    from curvadion.algebra.iteration import Iteration
    from curvadion.algebra.newton_schulz import newton_schulz
    from curvadion.formats import name_of

    batches = [draw(2, 150, 70, device=device), draw(2, 70, 150, seed=1, device=device).mT]
    exact = newton_schulz([M.double() for M in batches], Iteration("polar_express", 6))
    how = Iteration("polar_express", 6, name_of(dtype))
    fused = newton_schulz(batches, how, product=triton_ops.fused_symmetric_product)
    whole = newton_schulz(batches, how)
    for got, other, expected in zip(fused, whole, exact, strict=True):
        error, usual = ((x.double() - expected).norm() / expected.norm() for x in (got, other))
        assert float(error) < max(1.5 * float(usual), 1e-6) and float(usual) < 0.05


# ---- tables on the host


@needs_triton
def test_the_chunks_of_a_tensor_beyond_2_to_the_31(device: torch.device) -> None:
    """Too large to allocate: the tables, and what a program makes of them."""
    numel = 3 * 2**31 + 5
    chunks = triton_ops._chunks.__wrapped__((7, numel, numel), ((F32,), (F32,), (F32,)), device)
    number = numel // CHUNK + 1
    assert (chunks.begins, chunks.ends) == ((0, 1, 1 + number), (1, 1 + number, 1 + 2 * number))
    (launch,) = chunks.launches
    owner, sizes = launch.owner.get(), launch.sizes.get()
    assert sizes.dtype == torch.int64 and sizes.tolist() == [7, numel, numel, 0, 1, 1 + number]
    assert owner.bincount().tolist() == [1, number, number]
    for chunk in (
        0,
        1,
        number,
        number + 1,
        2 * number,
    ):  # each tensor's first and last; the last ones begin beyond int32
        t = int(owner[chunk])
        expected = (chunk - chunks.begins[t]) * CHUNK
        moved = sizes.clone()
        moved[3:] -= chunk  # so that the one program takes itself for this chunk
        begin, size = torch.full((3,), -1, device=device), torch.full((3,), -1, device=device)
        chunk_kernel[(1,)](owner[chunk:], moved, begin, size, 3, CHUNK)
        assert (int(begin[t]), int(size[t])) == (expected, min(CHUNK, int(sizes[t]) - expected))
    assert expected > 2**32


def uploads(function: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """How many tables of addresses and numbers a call uploads; it must cut no list of tensors anew."""
    cut, before = triton_ops._chunks.cache_info().misses, triton_ops._remembered.cache_info().misses
    function(*args, **kwargs)
    assert triton_ops._chunks.cache_info().misses == cut
    return triton_ops._remembered.cache_info().misses - before


@needs_triton
def test_tables_are_uploaded_only_when_they_change(device: torch.device) -> None:
    """A training loop allocates its gradients at the same addresses, step after step."""
    x, g, other = ([draw(5, 3, seed=10 * i + j, device=device) for j in range(2)] for i in range(3))
    watch = [draw(5, 3, seed=99, device=device)]
    key = torch.tensor(0, device=device)
    in_tensor = torch.tensor(0.123, dtype=F64, device=device)

    def step(grads: list[Tensor], lr: float | Tensor) -> None:
        triton_ops.local_step_(x, grads, decay=0.5, step_size=lr, key=key)

    def norms(grads: list[Tensor], decay: float | Tensor) -> None:
        triton_ops.momentum_norm_(x, grads, decay=decay, watch=watch)

    P, Q = torch.ones(2, 5, 1, device=device), torch.ones(2, 3, 1, device=device)

    def apply(_: list[Tensor], lr: float | Tensor) -> None:
        triton_ops.low_rank_apply_(x, None, P, Q, None, transposed=False, decay=0.5, step_size=lr)

    for function, moved in ((step, [g[0], other[1]]), (norms, [other[0], g[1]]), (apply, None)):
        function(g, 0.1)
        function(g, in_tensor)
        assert uploads(function, g, 0.1) == 0
        if moved is not None:
            assert uploads(function, moved, 0.1) == 1
            assert uploads(function, moved, 0.1) == 0
            assert uploads(function, g, 0.1) == 0, "the addresses of before are still there"
        assert uploads(function, g, 0.1 + len(function.__name__)) == 1
        in_tensor.fill_(0.321)
        assert uploads(function, g, in_tensor) == 0


@needs_triton
def test_fixed_lists_are_looked_at_once_and_mean_the_same(device: torch.device) -> None:
    """Also where a gradient is missing, or strided and therefore copied anew in every call."""
    x, fixed = ([draw(5, 3, seed=i, device=device) for i in range(3)] for _ in range(2))
    grads = [draw(5, 3, seed=9, device=device), None, draw(3, 5, seed=8, device=device).t()]
    X, G = reference.Fixed(fixed), reference.Fixed(grads)
    for _ in range(2):
        expected = triton_ops.momentum_norm_(x, grads, decay=0.5, watch=x)
        assert torch.equal(triton_ops.momentum_norm_(X, G, decay=0.5, watch=X), expected)
        triton_ops.local_step_(x, grads, decay=0.5, step_size=0.25)
        triton_ops.local_step_(X, G, decay=0.5, step_size=0.25)
        assert all(torch.equal(a, b) for a, b in zip(fixed, x, strict=True))
        grads[2].mul_(2.0)


@needs_triton
@pytest.mark.parametrize("name", ["momentum_norm_kernel", "local_step_kernel", "low_rank_apply_kernel"])
def test_a_schedule_compiles_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Triton compiles anew when a number, a dtype or an alignment changes; a schedule may change none of
    them."""
    launches: list[list[Any]] = []

    def record(*args: Any, **kwargs: Any) -> None:
        described = [(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in args]
        launches.append([*described, kwargs])

    monkeypatch.setattr(triton_ops, name, {(2,): record, (1, 2): record})
    x, g = [torch.ones(5, 3, device=device)] * 2, [torch.ones(5, 3, device=device)] * 2
    P, Q = torch.ones(2, 5, 1, device=device), torch.ones(2, 3, 1, device=device)
    for lr in (0.1, 0.2, 0.0, 1.0):
        if name == "momentum_norm_kernel":
            triton_ops.momentum_norm_(x, g, decay=lr)
        elif name == "local_step_kernel":
            triton_ops.local_step_(x, g, decay=1 - lr, step_size=lr, key=torch.tensor(0, device=device))
        else:
            triton_ops.low_rank_apply_(
                x, torch.ones(2, 5, 3), P, Q, Q, transposed=False, decay=1 - lr, step_size=lr, feedback=lr
            )
    assert len(launches) == 4 and all(launch == launches[0] for launch in launches)


# ---- which implementation


def test_auto_takes_the_reference_on_the_cpu() -> None:
    ops = curvadion_kernels.choose("auto", "cpu")
    assert ops.kernels == "reference" and "Triton compiles for GPUs" in ops.why and "cpu" in ops.why
    assert all(getattr(ops, name) is OPS[name].reference for name in OPS)


def test_the_reference_can_be_asked_for() -> None:
    ops = curvadion_kernels.choose("reference", "cuda")
    assert (ops.kernels, ops.why) == ("reference", "asked for")


@needs_triton
def test_triton_can_be_asked_for(device: torch.device) -> None:
    ops = curvadion_kernels.choose("triton", device)
    assert (ops.kernels, ops.why) == ("triton", "asked for")
    assert all(getattr(ops, name) is OPS[name].triton for name in OPS)


@needs_triton
def test_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An explicit choice fails and says why; "auto" on a GPU takes the reference and says why."""
    monkeypatch.setattr(triton_ops, "why_not", lambda device: f"too old a {device.type}")
    with pytest.raises(RuntimeError, match="kernels='triton' must .* too old a cuda; use kernels='auto'"):
        curvadion_kernels.choose("triton", "cuda")
    ops = curvadion_kernels.choose("auto", "cuda")
    assert (ops.kernels, ops.why) == ("reference", "too old a cuda")
    monkeypatch.setattr(triton_ops, "why_not", lambda device: None)
    assert curvadion_kernels.choose("auto", "cuda").kernels == "triton"


@needs_triton
@pytest.mark.parametrize("failure", ["Failed to find C compiler. Please specify via CC", None])
def test_a_gpu_on_which_no_kernel_can_be_launched(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, failure: str | None
) -> None:
    """Triton looks for a C compiler at the first launch, which must not be in the middle of a step."""

    class Probe:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(answer: Tensor) -> None:
                if failure is not None:
                    raise RuntimeError(failure)

            return launch

    monkeypatch.setattr(triton_ops, "probe_kernel", Probe())
    reason = triton_ops._cannot_launch.__wrapped__(device)
    assert (failure or "it stored 0 for 1") in reason and "Python's headers" in reason
    monkeypatch.undo()
    assert triton_ops._cannot_launch.__wrapped__(device) is None

    monkeypatch.setattr(triton_ops, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_ops, "_cannot_launch", lambda device: reason)
    ops = curvadion_kernels.choose("auto", "cuda")
    assert (ops.kernels, ops.why) == ("reference", reason)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_interpreter_is_for_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET.* they are on cuda"):
        curvadion_kernels.choose("triton", "cuda")


def test_an_unknown_choice() -> None:
    with pytest.raises(ValueError, match="one of 'auto', 'triton', 'reference'; got 'cutlass'; try 'auto'"):
        curvadion_kernels.choose("cutlass")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, curvadion_kernels
import curvadion_kernels.library
x = torch.ones(3)
curvadion_kernels.choose("auto", "cpu").local_step_([x], [torch.ones(3)], decay=0.5, step_size=1.0)
assert x.tolist() == [-0.5] * 3
assert curvadion_kernels.choose("auto", "cuda").kernels == "reference"
curvadion_kernels.choose("triton", "cpu")
"""


def test_without_triton() -> None:
    """In a process of its own: the package works, and an explicit choice names what to install."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, env=environment
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: ") and "pip install 'curvadion[kernels]'" in last, done.stderr


# ---- custom ops


def library_arguments(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """One call of every custom op."""
    matrices = [[draw(6, 4, seed=10 * i + j, device=device) for j in range(2)] for i in range(3)]
    P, Q, R = (
        draw(2, 6, 3, seed=50, device=device),
        draw(2, 4, 3, seed=51, device=device),
        draw(2, 4, 3, seed=52, device=device),
    )
    a, b, c = (torch.tensor(v, dtype=F64, device=device) for v in (0.5, 0.25, 0.75))
    sums = torch.tensor([4.0, 9.0, 0, 0], device=device)
    last, tau = torch.full((2,), 2.0, device=device), torch.full((2,), 1.0, device=device)
    return {
        "momentum_norm_": (matrices[0], matrices[1], a),
        "gate_key": (sums, last, tau, False),
        "local_step_": (matrices[2], matrices[1], a, b, torch.tensor(0, device=device)),
        "low_rank_apply_": (matrices[2], torch.stack(matrices[0]), P, Q, R, False, a, b, c),
        "column_sumsq": (R,),
        "symmetric_product": (P, 0.5, 0.0),
        "sign_encode_": (draw(256, seed=60, device=device), draw(200, seed=61, device=device)),
        "sign_decode_": (
            torch.zeros(256, device=device),
            torch.arange(108, dtype=torch.uint8, device=device).view(3, 36),
        ),
    }


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def library_kernels(
    request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Which implementation the custom ops run; on the CPU they would always take the reference."""
    import curvadion_kernels.library as library

    monkeypatch.setattr(library, "_ops_for", lambda on: curvadion_kernels.choose(request.param, on))
    return request.param


@pytest.mark.parametrize("name", OPS)
def test_custom_ops(device: torch.device, library_kernels: str, name: str) -> None:
    """What torch checks: that the schema tells which arguments change, that no result aliases another, and
    that shapes are known."""
    torch.library.opcheck(getattr(torch.ops.curvadion, name).default, library_arguments(device)[name])


def all_custom_ops(given: dict[str, tuple[Any, ...]]) -> tuple[Tensor, ...]:
    ops = torch.ops.curvadion
    sums = ops.momentum_norm_(*given["momentum_norm_"])
    norm, rmmc, key = ops.gate_key(sums, *given["gate_key"][1:])
    ops.local_step_(*given["local_step_"])
    ops.low_rank_apply_(*given["low_rank_apply_"])
    C = ops.symmetric_product(*given["symmetric_product"])
    payload = ops.sign_encode_(*given["sign_encode_"])
    ops.sign_decode_(*given["sign_decode_"])
    return sums, norm, rmmc, key, ops.column_sumsq(*given["column_sumsq"]), C, payload


def test_custom_ops_compile_without_copies(device: torch.device, library_kernels: str) -> None:
    """One graph, the same numbers as without compilation, the operations called on the arguments themselves,
    and no new graph for new values."""
    from torch._inductor.utils import run_and_get_code

    def leaves(given: dict[str, tuple[Any, ...]]) -> list[Tensor]:
        flat = torch.utils._pytree.tree_leaves(given)
        return [v for v in flat if isinstance(v, Tensor)]

    torch.compiler.reset()
    eager, compiled = library_arguments(device), library_arguments(device)
    expected = all_custom_ops(eager)
    function = torch.compile(all_custom_ops, fullgraph=True)
    got, (code,) = run_and_get_code(function, compiled)
    assert_close(got, expected, rtol=0, atol=0)
    assert_close(leaves(compiled), leaves(eager), rtol=0, atol=0)
    for name in ("momentum_norm_", "local_step_", "low_rank_apply_"):
        assert f"torch.ops.curvadion.{name}.default([arg" in code, code
    for name in ("sign_encode_", "sign_decode_"):
        assert f"torch.ops.curvadion.{name}.default(arg" in code, code
    assert "clone" not in code and "copy_" not in code, code
    with torch._dynamo.config.patch(error_on_recompile=True):
        for given in (eager, compiled):
            for factor in given["low_rank_apply_"][6:] + given["local_step_"][2:4]:
                factor.fill_(0.125)
        assert_close(function(compiled), all_custom_ops(eager), rtol=0, atol=0)
        assert_close(leaves(compiled), leaves(eager), rtol=0, atol=0)


@needs_triton
def test_a_postponed_decay_gives_the_same_bits_as_one_done_at_once(device: torch.device) -> None:
    """Looking at the state applies what was postponed, and must not change the run."""
    for dtype in (torch.float32, torch.bfloat16):
        old, g = torch.randn(5000, device=device).to(dtype), torch.randn(5000, device=device)
        postponed, at_once = [old.clone()], [old.clone()]
        triton_ops.momentum_norm_(postponed, [g], decay=0.95)
        reference.scale_(at_once, 0.95)
        triton_ops.momentum_norm_(at_once, [g])
        assert_close(postponed, at_once, rtol=0, atol=0)


@needs_triton
def test_version_counters_know_of_the_kernels(device: torch.device) -> None:
    """A backward through values from before the step must be an error, as with torch's own operations."""
    x, g = torch.ones(6, 4, device=device, requires_grad=True), torch.ones(6, 4, device=device)
    loss = (x * x).sum()
    with torch.no_grad():
        triton_ops.local_step_([x], [g], decay=1.0, step_size=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    before = g._version
    triton_ops.momentum_norm_([g], [torch.ones_like(g)])
    assert g._version > before


@needs_triton
@pytest.mark.parametrize("wrong", ["P", "Q", "R", "momentum", "params", "dtype"])
def test_the_low_rank_apply_refuses_what_does_not_fit(device: torch.device, wrong: str) -> None:
    """It works on bare addresses: a wrong shape would be somebody else's memory."""
    B, m, n, r = 2, 6, 4, 3
    X, M = [torch.zeros(m, n, device=device) for _ in range(B)], torch.zeros(B, m, n, device=device)
    P, Q, R = (torch.zeros(B, rows, r, device=device) for rows in (m, n, n))
    if wrong == "P":
        P = P[:, :-1]
    if wrong == "Q":
        Q = Q[:, :, :-1]
    if wrong == "R":
        R = R[:1]
    if wrong == "momentum":
        M = M.mT
    if wrong == "params":
        X[1] = X[1].T
    if wrong == "dtype":
        R = R.double()
    with pytest.raises(ValueError, match="must be"):
        triton_ops.fused_low_rank_apply_(
            X, M, P, Q, R, transposed=False, decay=1.0, step_size=0.1, feedback=0.1
        )


@needs_triton
def test_the_gate_key_refuses_what_does_not_fit(device: torch.device) -> None:
    with pytest.raises(ValueError, match="tau must be 3 contiguous float32"):
        triton_ops.gate_key(
            torch.zeros(5, device=device),
            torch.zeros(3, device=device),
            torch.zeros(2, device=device),
            hold_closed=False,
        )


def test_float64_parameters_with_a_float32_momentum() -> None:
    """The update is computed in the momentum's dtype and added in the parameter's."""
    X, P, Q = [torch.zeros(6, 4, dtype=torch.float64)], torch.randn(1, 6, 2), torch.randn(1, 4, 2)
    for op in ("reference", "triton") if triton_ops is not None else ("reference",):
        x = [X[0].clone()]
        getattr(OPS["low_rank_apply_"], op)(x, None, P, Q, None, transposed=False, decay=1.0, step_size=1.0)
        assert_close(x[0], -(P[0] @ Q[0].T).double(), rtol=1e-5, atol=1e-6)
