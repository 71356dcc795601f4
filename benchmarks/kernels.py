"""Measure the Triton kernels against torch: time, effective bandwidth, launches and host time.

    python benchmarks/kernels.py                            # everything, under 8 minutes on one GPU
    python benchmarks/kernels.py --only low_rank_apply      # one operation, by its name below
    python benchmarks/kernels.py --device cpu               # torch's variants on a small model
    python benchmarks/kernels.py --device cpu --interpret   # the kernels too, interpreted: no measurement

Operations, and the bytes per element in float32 that each must move at least; every variant is divided by the
same number:

    momentum_norm_    m <- c m + g and the norms of all m           12
    local_step_       X <- a X - b G                                12
    local_update      both and the gate between them                24   (SGD with momentum 20, AdamW 28)
    low_rank_apply_   X <- a X - b P Q^T,  M <- M - c P R^T         16 and the factors, Q not read
    symmetric_product A^T A, and b A + c A^2 of square ones         (bfloat16) 2 (m n + n^2), once each
    sign_encode_      e + x to one bit a value, e <- what it lacks   12.14
    sign_decode_      the mean of 8 such payloads                    5.13

A shard of 1/8 is the first of 8 ranks' rows of every matrix. Products run at two precisions: tf32, against
the kernel with one TF32 product, and highest, against the kernel with three (tf32x3). The crossover is the
rank up to which the kernel is faster than `products`, the two cuBLAS products per matrix that take its place.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timing import (
    MODELS,
    TINY,
    Results,
    Variant,
    add_common_arguments,
    copies_needed,
    copy_variant,
    count_launches,
    describe_run,
    matmul_variant,
    measure,
    names,
    random_tensors,
    spread,
    start,
)
from torch import Tensor
from torch.testing import assert_close

OPERATIONS = (
    "momentum_norm",
    "local_step",
    "local_update",
    "low_rank_apply",
    "symmetric_product",
    "sign_encode",
    "sign_decode",
)
ELEMENTWISE = OPERATIONS[:3]
PRECISIONS = {
    "tf32": "high",
    "highest": "highest",
}  # of this program: torch.set_float32_matmul_precision's word for it
KERNEL_PRECISION = {"tf32": "tf32", "highest": "tf32x3"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MU, DECAY, STEP = 0.95, 0.999, 1e-3
APPLY = {"decay": 0.999, "step_size": 0.5, "feedback": 0.05}


@dataclass
class Elementwise:
    """One copy of the buffers of the elementwise operations."""

    x: list[Tensor]
    m: list[Tensor]
    g: list[Tensor]
    last_norm: Tensor
    tau: Tensor
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)

    def clone(self) -> "Elementwise":
        return replace(self, x=[t.clone() for t in self.x], m=[t.clone() for t in self.m], optimizers={})


@dataclass
class LowRank:
    """One copy of the buffers of the low-rank apply."""

    params: list[Tensor]
    momentum: Tensor
    P: Tensor
    R: Tensor
    scale: Tensor
    transposed: bool

    def clone(self) -> "LowRank":
        return replace(self, params=[x.clone() for x in self.params], momentum=self.momentum.clone())

    @property
    def arguments(self) -> dict[str, Any]:
        return {"transposed": self.transposed, "scale": self.scale, **APPLY}


@dataclass
class Case:
    """What is measured together, in turns."""

    model: str
    shard: int
    dtype: torch.dtype
    params: int
    build: Callable[[int | None], list[Variant]]  # None: as many copies as it takes
    check: Callable[[Variant], None]
    precision: str = "highest"
    notes: dict[str, Any] = field(default_factory=dict)


def import_kernels(device: torch.device, interpret: bool) -> Any:
    """Return the module of Triton kernels, None where they cannot run; say so."""
    try:
        from curvadion_kernels import triton_ops
    except ImportError as error:
        print(f"no Triton here ({error}): its kernels are left out")
        return None
    reason = (
        triton_ops.why_not(device)
        if device.type == "cuda" or interpret
        else "there is no GPU; --interpret tests them"
    )
    if reason:
        print(f"the Triton kernels are left out: {reason}")
        return None
    return triton_ops


# ---- elementwise


def foreach_momentum(m: list[Tensor], g: list[Tensor]) -> tuple[Tensor, ...]:
    torch._foreach_mul_(m, MU)
    torch._foreach_add_(m, g)
    return torch._foreach_norm(m)


def foreach_step(x: list[Tensor], g: list[Tensor]) -> None:
    torch._foreach_mul_(x, DECAY)
    torch._foreach_add_(x, g, alpha=-STEP)


def whole_update(ops: Any, s: Elementwise) -> Tensor:
    """Take a local step's kernels one after the other, as the optimizer does. Return the norms."""
    sums = ops.momentum_norm_(s.m, s.g, decay=MU)
    _, _, key = ops.gate_key(sums, s.last_norm, s.tau, hold_closed=False)
    ops.local_step_(s.x, s.g, decay=DECAY, step_size=STEP, key=key)
    return sums


def foreach_update(s: Elementwise) -> tuple[Tensor, ...]:
    norms = foreach_momentum(s.m, s.g)
    foreach_step(s.x, s.g)
    return norms


def peer(name: str, state: Elementwise) -> torch.optim.Optimizer:
    """Return a fused optimizer on the parameters x with the gradients g."""
    params = []
    for x, g in zip(state.x, state.g, strict=True):
        params.append(torch.nn.Parameter(x))
        params[-1].grad = g
    if name == "sgd_fused":
        return torch.optim.SGD(params, lr=STEP, momentum=MU, weight_decay=0.01, fused=True)
    return torch.optim.AdamW(params, lr=STEP, weight_decay=0.01, fused=True)


def elementwise_variants(
    shapes: list[tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    operations: list[str],
    triton_ops: Any,
    compiled: dict[str, Callable[..., Any]],
    copies: int | None,
) -> list[Variant]:
    """Return all variants of the elementwise operations on tensors of these shapes."""
    from curvadion_kernels import reference

    numel, size = sum(map(math.prod, shapes)), dtype.itemsize
    states = []
    for _ in range(copies or copies_needed(2 * numel * size, device)):
        x, m, g = (random_tensors(shapes, device, dtype) for _ in range(3))
        last, tau = (
            torch.ones(len(shapes), device=device),
            torch.full((len(shapes),), torch.inf, device=device),
        )
        states.append(Elementwise(x, m, g, last, tau))
    three = 3 * numel * size
    variants: list[Variant] = []

    def add(operation: str, name: str, run: Callable[[Elementwise], Any], moved: int) -> None:
        least, flops = {"momentum_norm_": (3, 4), "local_step_": (3, 3), "local_update": (6, 7)}[operation]
        if operation.rstrip("_") in operations:
            variants.append(Variant(operation, name, run, states, least * numel * size, moved, flops * numel))

    both = {"triton": triton_ops, "reference": reference}
    for name, ops in both.items():
        if ops is not None:
            norms = three if name == "triton" else 2 * three  # mul_: 2, add_: 3, norm: 1
            step = three if name == "triton" else 5 * numel * size
            add("momentum_norm_", name, lambda s, f=ops.momentum_norm_: f(s.m, s.g, decay=MU), norms)
            add(
                "local_step_",
                name,
                lambda s, f=ops.local_step_: f(s.x, s.g, decay=DECAY, step_size=STEP),
                step,
            )
            add("local_update", name, partial(whole_update, ops), norms + step)
    add("momentum_norm_", "foreach", lambda s: foreach_momentum(s.m, s.g), 2 * three)
    add("local_step_", "foreach", lambda s: foreach_step(s.x, s.g), 5 * numel * size)
    add("local_update", "foreach", foreach_update, 2 * three + 5 * numel * size)
    if compiled:
        add("momentum_norm_", "foreach_compiled", lambda s: compiled["momentum"](s.m, s.g), 4 * numel * size)
        add("local_step_", "foreach_compiled", lambda s: compiled["step"](s.x, s.g), three)
    if "local_update" in operations:
        for name, moved in (("sgd_fused", 5), ("adamw_fused", 7)):
            for state in states:
                state.optimizers[name] = peer(name, state)
            add("local_update", name, lambda s, n=name: s.optimizers[n].step(), moved * numel * size)
    return variants


def check_elementwise(variant: Variant) -> None:
    """Compare a variant with the reference, on copies; the peers do something else."""
    from curvadion_kernels import reference

    if variant.name in ("sgd_fused", "adamw_fused", "reference"):
        return
    expected, got = variant.states[0].clone(), variant.states[0].clone()
    sums = None
    if variant.operation != "local_step_":
        sums = reference.momentum_norm_(expected.m, expected.g, decay=MU)
    if variant.operation != "momentum_norm_":
        reference.local_step_(expected.x, expected.g, decay=DECAY, step_size=STEP)
    result = variant.run(got)
    # torch's variants round bfloat16 twice.
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if got.x[0].dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    assert_close(got.m, expected.m, **tolerance)
    assert_close(got.x, expected.x, **tolerance)
    if sums is not None:
        squares = (
            result[: len(got.m)]
            if isinstance(result, Tensor)
            else torch.stack([n.float() for n in result]).square()
        )
        loose = 1e-4 if got.m[0].dtype == torch.float32 else 2e-2
        assert_close(squares, sums[: len(got.m)], rtol=loose, atol=loose)


# ---- low rank


def products(s: LowRank) -> None:
    """Two addmm_ per matrix."""
    Q = s.R * s.scale.unsqueeze(-2)
    for x, m, p, q, r in zip(s.params, s.momentum, s.P, Q, s.R, strict=True):
        if s.transposed:
            x.addmm_(q, p.mT, beta=APPLY["decay"], alpha=-APPLY["step_size"])
            m.addmm_(r, p.mT, alpha=-APPLY["feedback"])
        else:
            x.addmm_(p, q.mT, beta=APPLY["decay"], alpha=-APPLY["step_size"])
            m.addmm_(p, r.mT, alpha=-APPLY["feedback"])


def stacked(s: LowRank) -> None:
    """One baddbmm_ for X, on a stacked copy that is copied back, and one for M, which is stacked already."""
    Q = s.R * s.scale.unsqueeze(-2)
    X = torch.stack(s.params)
    left = Q if s.transposed else s.P
    right = s.P if s.transposed else Q
    X.baddbmm_(left, right.mT, beta=APPLY["decay"], alpha=-APPLY["step_size"])
    (s.momentum.mT if s.transposed else s.momentum).baddbmm_(s.P, s.R.mT, alpha=-APPLY["feedback"])
    torch._foreach_copy_(s.params, list(X.unbind()))


def low_rank_variants(
    shape: tuple[int, int],
    batch: int,
    shard: int,
    rank: int,
    precision: str,
    device: torch.device,
    triton_ops: Any,
    copies: int | None,
) -> list[Variant]:
    """Return all ways to apply an update of some rank to a batch of matrices."""
    from curvadion_kernels import reference

    rows, cols = math.ceil(shape[0] / shard), shape[1]
    transposed = shape[0] < shape[1]
    long, short = (cols, rows) if transposed else (rows, cols)
    numel = batch * rows * cols
    states = []
    for _ in range(copies or copies_needed(8 * numel, device)):
        states.append(
            LowRank(
                params=random_tensors([(rows, cols)] * batch, device, torch.float32),
                momentum=torch.randn(batch, rows, cols, device=device),
                P=torch.randn(batch, long, rank, device=device) / math.sqrt(rank),
                R=torch.randn(batch, short, rank, device=device),
                scale=torch.rand(batch, rank, device=device) + 0.5,
                transposed=transposed,
            )
        )
    factors = 4 * batch * rank * (long + short + 1)
    floats = 4 * numel * rank
    ways: dict[str, tuple[Callable[[LowRank], Any], int]] = {
        "products": (
            lambda s: reference.low_rank_apply_(s.params, s.momentum, s.P, None, s.R, **s.arguments),
            16 * numel,
        ),
        "addmm": (products, 16 * numel),
        "baddbmm_stacked": (stacked, 32 * numel),
    }
    if triton_ops is not None:
        kind = KERNEL_PRECISION[precision]
        fused = triton_ops.fused_low_rank_apply_
        ways["triton"] = (
            lambda s: fused(s.params, s.momentum, s.P, None, s.R, precision=kind, **s.arguments),
            16 * numel,
        )
    notes = {"shape": f"{batch}x{rows}x{cols}", "rank": rank, "precision": precision}
    return [
        Variant("low_rank_apply_", name, run, states, 16 * numel + factors, moved + factors, floats, notes)
        for name, (run, moved) in ways.items()
    ]


def check_low_rank(variant: Variant) -> None:
    """Compare a variant with the reference at highest precision, on copies."""
    from curvadion_kernels import reference

    expected, got = variant.states[0].clone(), variant.states[0].clone()
    current = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    reference.low_rank_apply_(
        expected.params, expected.momentum, expected.P, None, expected.R, **expected.arguments
    )
    torch.set_float32_matmul_precision(current)
    variant.run(got)
    # An element of the update is a sum of size 1; TF32 keeps 10 bits of each factor, and the largest of 1e9
    # errors counts.
    atol = 2e-2 if variant.notes["precision"] == "tf32" else 2e-4
    assert_close(got.params, expected.params, rtol=0, atol=atol)
    assert_close(got.momentum, expected.momentum, rtol=0, atol=atol)


# ---- symmetric products


def symmetric_shapes(on_gpu: bool) -> list[tuple[int, int, int]]:
    """Return (B, m, n) around the sizes from which the kernel is used, at most 2^28 numbers each."""
    if not on_gpu:
        return [(2, 96, 80), (1, 150, 150)]
    sizes = [2**k for k in range(9, 14)]
    shapes = [(B, ratio * n, n) for n in sizes for B in (1, 4, 16) for ratio in (1, 4)]
    return [(B, m, n) for B, m, n in shapes if B * m * n <= 2**28]


def symmetric_variants(
    shape: tuple[int, int, int], device: torch.device, triton_ops: Any, copies: int | None
) -> list[Variant]:
    """Return both ways to multiply a batch of matrices with themselves, as a round of Newton-Schulz does."""
    from curvadion_kernels import reference

    B, m, n = shape
    moved = 2 * B * (m * n + n * n)
    states = []
    for _ in range(copies or copies_needed(moved, device)):
        A = torch.randn(B, m, n, device=device) / math.sqrt(m)
        if m == n:
            A = (A + A.mT) / 2
        # Triton's interpreter has no arithmetic of bfloat16.
        interpreted = triton_ops is not None and triton_ops.interpreted()
        states.append(A if interpreted else A.to(torch.bfloat16))
    ways = {"products": reference.symmetric_product}
    if triton_ops is not None:
        ways["triton"] = triton_ops.fused_symmetric_product
    factors = {"alpha": 2.0315, "beta": -4.7750} if m == n else {"alpha": 1.0, "beta": 0.0}
    return [
        Variant(
            "symmetric_product",
            name,
            lambda A, f=function: f(A, **factors),
            states,
            moved,
            moved,
            2 * B * m * n * n,
            {"shape": f"{B}x{m}x{n}", "n": n, "batch": B},
        )
        for name, function in ways.items()
    ]


def check_symmetric(variant: Variant) -> None:
    """Compare a variant with the reference in float32; bfloat16 rounds the result once."""
    from curvadion_kernels import reference

    A = variant.states[0]
    square = A.shape[1] == A.shape[2]
    expected = reference.symmetric_product(
        A.float(), **({"alpha": 2.0315, "beta": -4.7750} if square else {})
    )
    assert_close(variant.run(A).float(), expected, rtol=2**-7, atol=1e-2)


def print_symmetric(rows: list[dict[str, Any]], triton_ops: Any) -> None:
    """Print where one triangle is faster than the whole product, beside where the library takes it."""
    times: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in rows:
        if row["operation"] == "symmetric_product":
            key = (row["shape"], row["batch"], row["n"])
            times.setdefault(key, {})[row["variant"]] = row["device_ms"]["median"]
    shown = {key: both for key, both in times.items() if {"triton", "products"} <= both.keys()}
    if shown:
        print(
            "\nsymmetric_product, times as fast as whole products; the library takes the kernel from "
            f"SYMMETRIC_SIZE = {triton_ops.SYMMETRIC_SIZE} and "
            f"SYMMETRIC_TILES = {triton_ops.SYMMETRIC_TILES} on"
        )
    for (shape, B, n), both in shown.items():
        side = math.ceil(n / triton_ops.symmetric_tile(torch.bfloat16, "ieee")["TILE"])
        tiles = B * side * (side + 1) // 2
        taken = n >= triton_ops.SYMMETRIC_SIZE and tiles >= triton_ops.SYMMETRIC_TILES
        gain = both["products"] / both["triton"]
        print(f"{shape:18} {tiles:6} tiles {gain:5.2f}   {'kernel' if taken else 'cuBLAS'}")


# ---- one bit a value


@dataclass
class Signs:
    """One copy of the buffers of the 1-bit codec; `payloads` has a row for each replica."""

    residual: Tensor
    x: Tensor
    payloads: Tensor

    def clone(self) -> "Signs":
        return replace(self, residual=self.residual.clone(), x=self.x.clone())


def sign_variants(
    size: int, device: torch.device, operations: list[str], triton_ops: Any, copies: int | None
) -> list[Variant]:
    """Return both ways to round so many values to one bit each, and to take the mean of 8 payloads."""
    from curvadion_kernels import reference

    count, coded = 8, reference.SIGN_BYTES * size // reference.SIGN_BLOCK
    states = []
    for _ in range(copies or copies_needed(8 * size, device)):
        x = torch.randn(size, device=device)
        payload = reference.sign_encode_(x.clone(), x)
        payloads = torch.stack([payload.roll(k * reference.SIGN_BYTES) for k in range(count)])
        states.append(Signs(torch.randn(size, device=device), x, payloads))
    # The reference: add 12, abs 8, sums 12, signs 5 and 5 to pack them, d 5, subtract 12; for a payload 13,
    # to add it 12, to divide and copy 16.
    ways: dict[tuple[str, str], tuple[Callable[[Signs], Any], int, int]] = {}
    for name, ops in (("triton", triton_ops), ("reference", reference)):
        if ops is not None:
            fused = name == "triton"
            encode = 12 * size + coded
            ways["sign_encode", name] = (
                lambda s, f=ops.sign_encode_: f(s.residual, s.x),
                encode,
                encode if fused else 59 * size,
            )
            decode = 4 * size + count * coded
            ways["sign_decode", name] = (
                lambda s, f=ops.sign_decode_: f(s.residual, s.payloads),
                decode,
                decode if fused else (25 * count + 4) * size,
            )
    return [
        Variant(f"{operation}_", name, run, states, least, moved, 4 * size, {"size": size})
        for (operation, name), (run, least, moved) in ways.items()
        if operation in operations
    ]


def check_signs(variant: Variant) -> None:
    """Compare a variant with the reference on the CPU, bit for bit."""
    from curvadion_kernels import reference

    got = variant.states[0].clone()
    expected = Signs(got.residual.cpu(), got.x.cpu(), got.payloads.cpu()).clone()
    payload = variant.run(got)
    if variant.operation == "sign_encode_":
        wanted = reference.sign_encode_(expected.residual, expected.x)
        assert_close(payload.cpu(), wanted, rtol=0, atol=0)
    else:
        reference.sign_decode_(expected.residual, expected.payloads)
    assert_close(got.residual.cpu(), expected.residual, rtol=0, atol=0)


def ranks(dim: int) -> list[int]:
    """Return the powers of two from 16 to the dimension, and that."""
    return sorted({*(2**k for k in range(4, dim.bit_length())), dim})


# ---- all


def make_cases(
    arguments: argparse.Namespace, device: torch.device, operations: list[str], triton_ops: Any
) -> list[Case]:
    """Return what there is to measure, the most telling first."""
    dtype, chosen = DTYPES[arguments.dtype], arguments.chosen_models
    compiled: dict[str, Callable[..., Any]] = {}
    if not arguments.no_compile:
        options = torch._dynamo.config
        for name in ("recompile_limit", "cache_size_limit"):  # the older name
            if hasattr(options, name):
                setattr(options, name, 64)
        compiled = {
            "momentum": torch.compile(foreach_momentum, fullgraph=True),
            "step": torch.compile(foreach_step, fullgraph=True),
        }
    elementwise: list[Case] = []
    low_rank: list[Case] = []
    first_compiled = next((name for name in chosen if name in MODELS), None)
    for shard in arguments.chosen_shards:
        for model in chosen:
            if model == "tiny":
                shapes: list[tuple[int, ...]] = [
                    TINY[k % len(TINY)] for k in range(8 if arguments.interpret else 300)
                ]
                if shard != arguments.chosen_shards[0]:
                    continue
            else:
                shapes = [
                    (math.ceil(m / shard), n)
                    for (m, n), count in MODELS[model].matrices().items()
                    for _ in range(count)
                ]
            some = [o for o in operations if o in ELEMENTWISE]
            if some:
                # Compiling hundreds of tensors takes a while: once for a model, once for the tiny tensors.
                wanted = (
                    compiled
                    if model == "tiny" or (model == first_compiled and shard == arguments.chosen_shards[0])
                    else {}
                )
                build = partial(elementwise_variants, shapes, device, dtype, some, triton_ops, wanted)
                count = sum(map(math.prod, shapes))
                notes = {"tensors": len(shapes)}
                elementwise.append(
                    Case(
                        model,
                        1 if model == "tiny" else shard,
                        dtype,
                        count,
                        build,
                        check_elementwise,
                        notes=notes,
                    )
                )
            if "low_rank_apply" in operations and model != "tiny":
                for (m, n), batch in MODELS[model].matrices().items():
                    batch = 2 if arguments.interpret else batch
                    for precision in PRECISIONS if device.type == "cuda" else ["highest"]:
                        for rank in (16,) if arguments.interpret else ranks(min(m, n)):
                            build = partial(
                                low_rank_variants, (m, n), batch, shard, rank, precision, device, triton_ops
                            )
                            count = batch * math.ceil(m / shard) * n
                            low_rank.append(
                                Case(model, shard, torch.float32, count, build, check_low_rank, precision)
                            )
    symmetric: list[Case] = []
    for shape in symmetric_shapes(device.type == "cuda") if "symmetric_product" in operations else ():
        ways = partial(symmetric_variants, shape, device, triton_ops)
        symmetric.append(Case("", 1, torch.bfloat16, math.prod(shape), ways, check_symmetric))
    signs: list[Case] = []
    if some := [o for o in operations if o.startswith("sign_")]:
        least = 2**12 if arguments.interpret else 2**18
        for size in (2**22, 2**26) if device.type == "cuda" else (least,):
            build = partial(sign_variants, size, device, some, triton_ops)
            signs.append(Case("", 1, torch.float32, size, build, check_signs))
    return elementwise + symmetric + signs + low_rank


def print_crossovers(rows: list[dict[str, Any]], constant: int | None) -> None:
    """Print up to which rank the fused kernel is faster than the products, beside the constant that the
    library uses."""
    sweeps: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["operation"] == "low_rank_apply_":
            key = (row["precision"], row["model"], row["shard"], row["shape"])
            sweeps.setdefault(key, {}).setdefault(row["rank"], {})[row["variant"]] = row["device_ms"][
                "median"
            ]
    shown = {
        key: sweep for key, sweep in sweeps.items() if all("triton" in times for times in sweep.values())
    }
    if not shown:
        return
    print(
        "\ncrossover: the rank up to which the fused kernel is faster than two products per matrix; "
        f"FUSED_RANK_TF32 = {constant}"
    )
    for key in sorted(shown, key=lambda k: (k[0] != "tf32", k[1], k[2])):
        precision, model, shard, shape = key
        found = crossover({rank: times["products"] / times["triton"] for rank, times in shown[key].items()})
        beside = (
            f"   FUSED_RANK_TF32 = {constant}"
            if precision == "tf32"
            else "   the library always takes the fused kernel"
        )
        print(f"{precision:8} {model:5} 1/{shard:<3} {shape:16} {found:28}{beside}")


def crossover(speedup: dict[int, float]) -> str:
    """Say where the speed-up falls through 1, between two measured ranks by a straight line on logarithmic
    axes."""
    ordered = sorted(speedup)
    if speedup[ordered[0]] < 1:
        return f"below {ordered[0]}"
    for low, high in pairwise(ordered):
        if speedup[high] < 1:
            top, bottom = math.log(speedup[low]), math.log(speedup[high])
            return f"{low * (high / low) ** (top / (top - bottom)):.0f} (between {low} and {high})"
    return f"above {ordered[-1]}"


def main() -> None:
    """Measure, write, print the crossovers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, models=(*MODELS, "tiny"), seconds=400, out="kernels.jsonl")
    parser.add_argument("--only", help=f"comma-separated operations of {', '.join(OPERATIONS)}; none: all")
    parser.add_argument(
        "--shards", help="comma-separated, 1/N of the rows each; none: 1,8,64 on a GPU, 1,8 on a CPU"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="of the elementwise operations"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile's variants")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    device = start(arguments)
    on_gpu = device.type == "cuda"
    operations = names(
        ",".join(p.strip().rstrip("_") for p in (arguments.only or "").split(",")),
        OPERATIONS,
        OPERATIONS,
        "--only",
    )
    defaults = ("160m", "1b3", "tiny") if on_gpu else ("small", "tiny")
    arguments.chosen_models = names(arguments.models, defaults, (*MODELS, "tiny"), "--models")
    if arguments.interpret and not set(arguments.chosen_models) <= {"small", "tiny"}:
        raise SystemExit(f"--interpret is for --models small,tiny; got {arguments.models}")
    shards = arguments.shards or ("1,8,64" if on_gpu else "1,8")
    try:
        arguments.chosen_shards = [int(part) for part in shards.split(",")]
        assert all(shard >= 1 for shard in arguments.chosen_shards)
    except (ValueError, AssertionError):
        raise SystemExit(f"--shards must be positive integers with commas between; got {shards!r}") from None
    arguments.no_compile |= arguments.interpret
    triton_ops = import_kernels(device, arguments.interpret)
    cases = make_cases(arguments, device, operations, triton_ops)
    wrong: list[str] = []

    with Results("kernels", arguments.out, describe_run(arguments, device)) as results:
        copy = copy_variant(device)
        torch.set_float32_matmul_precision("highest")
        [timing] = measure([copy], device, seconds=0.5)
        results.add(copy, timing, copy_gbps=None, model="", shard=None)
        for precision in PRECISIONS if on_gpu else ("highest",):
            torch.set_float32_matmul_precision(PRECISIONS[precision])
            matmul = matmul_variant(device, precision)
            [timing] = measure([matmul], device, seconds=0.5, most=10)
            results.add(matmul, timing, copy_gbps=None, model="", shard=None)
            del matmul
        done: list[tuple[Case, list[dict[str, Any]]]] = []
        # A fifth of the time is for counting launches.
        deadline = begin + arguments.seconds * (0.8 if on_gpu else 1.0)
        for number, case in enumerate(cases):
            left = deadline - time.perf_counter()
            if left <= 0:
                print(
                    f"{len(cases) - number} of {len(cases)} cases are left out, the time is used up; give "
                    "more --seconds"
                )
                break
            # What building and checking take comes on top.
            seconds = min(2.0 if on_gpu else 0.2, max(0.05, 0.5 * left / (len(cases) - number)))
            torch.set_float32_matmul_precision(PRECISIONS[case.precision])
            variants = []
            for variant in case.build(2 if arguments.interpret else None):
                try:
                    case.check(variant)
                    variants.append(variant)
                except Exception as error:  # the others are still worth measuring
                    wrong.append(
                        f"{variant.operation} {variant.name} {case.model} 1/{case.shard} "
                        f"{variant.notes or ''}: {error}"
                    )
                    print(f"LEFT OUT: {wrong[-1]}", flush=True)
            *timings, ceiling = measure(
                [*variants, copy], device, seconds=seconds, least=1 if arguments.interpret else 3
            )
            best = spread(ceiling.device_ms)
            assert best is not None
            gbps = copy.bytes / best["median"] / 1e6
            rows = []
            for variant, timing in zip(variants, timings, strict=True):
                fields = {
                    "model": case.model,
                    "shard": case.shard,
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "params": case.params,
                }
                rows.append(
                    results.add(variant, timing, copy_gbps=gbps, copy_GBps=gbps, **fields, **case.notes)
                )
            done.append((case, rows))
            del variants, variant
        if on_gpu:
            deadline = begin + arguments.seconds
            for case, rows in done:
                if time.perf_counter() > deadline:
                    print("launches of the later cases were not counted, the time is used up")
                    break
                torch.set_float32_matmul_precision(PRECISIONS[case.precision])
                row_of = {(row["operation"], row["variant"]): row for row in rows}
                for variant in case.build(1):
                    row = row_of.get((variant.operation, variant.name))
                    if row is not None:
                        row["launches"] = count_launches(variant.run, variant.states[0], device)
        torch.set_float32_matmul_precision("highest")
        constant = None if triton_ops is None else triton_ops.FUSED_RANK_TF32
        if triton_ops is not None and on_gpu:
            print_crossovers(results.rows, constant)
            print_symmetric(results.rows, triton_ops)
    if wrong:
        raise SystemExit("\n".join(["left out, because they failed or differ from the reference:", *wrong]))


if __name__ == "__main__":
    main()
