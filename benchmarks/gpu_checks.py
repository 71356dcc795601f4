"""What `gpu_first_run.py` checks: one generator of checks for each part. A check returns what it found, or
raises."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timing  # first: it puts the packages of this checkout on the path
import torch
from torch import Tensor, nn

from curvadion import CurvaDion
from curvadion.consensus import CODECS, CONSENSUS
from curvadion.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS
from curvadion.rules import RULES
from curvadion.sharding.group import ThreadGroup
from curvadion.signals import SIGNALS
from curvadion_kernels import OPS, choose

SEED = 0
STEPS = 20


@dataclass(frozen=True)
class Where:
    """What the checks run on.

    Attributes:
        device: of the tensors; "cpu" is a rehearsal.
        interpret: on a CPU, run the kernels in Triton's interpreter.
        quick: small tensors and few steps.
        root: of the project.
    """

    device: torch.device
    interpret: bool
    quick: bool
    root: Path = timing.ROOT

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return 4 if self.quick else STEPS

    def gpu(self, least: int = 1) -> None:
        """Leave the check out where there are fewer GPUs."""
        if self.device.type != "cuda" or torch.cuda.device_count() < least:
            raise LeftOut("needs a GPU" if least == 1 else f"needs {least} GPUs")

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class LeftOut(Exception):
    """A check that cannot be made here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One claim. `run` returns what was found, in words; it raises where the claim does not hold."""

    name: str
    run: Callable[[], str]


def expect(holds: bool, found: str) -> str:
    """Return what was found, or raise with it."""
    if not holds:
        raise AssertionError(found)
    return found


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers, the same on every machine."""
    generator = torch.Generator("cpu").manual_seed(1_000_003 * SEED + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest expected value; inf where NaNs differ."""
    a, b = actual.detach().cpu(), expected.detach().cpu()
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    a, b = a.double(), b.double()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        return math.inf
    a, b = (torch.where(t.isfinite(), t, 0.0) for t in (a, b))
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


def digest(tensors: Sequence[Tensor]) -> str:
    """Return a hash of the exact bytes."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


# ---- part 1: each kernel against its definition

PAIRS = [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]
PAIRS += [(torch.float16,) * 2, (torch.float64,) * 2]
# Of the largest entry: the reference sums in another order and rounds once, as the kernel does.
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SUMS = 2e-5  # float32 sums, in another order
PRODUCTS = {"highest": 2e-5, "high": 5e-3}  # by torch.set_float32_matmul_precision


def on(device: torch.device, values: Sequence[Tensor | None], *, aligned: bool) -> list[Tensor | None]:
    """Put tensors on a device: each by itself, or one behind the other at whatever address."""
    if aligned:
        return [None if v is None else v.to(device) for v in values]
    present = [v for v in values if v is not None]
    flat = torch.empty(1 + sum(v.numel() + 1 for v in present), dtype=present[0].dtype, device=device)
    placed: list[Tensor | None] = []
    begin = 1
    for v in values:
        placed.append(None if v is None else flat[begin : begin + v.numel()].view(v.shape).copy_(v))
        begin += 0 if v is None else v.numel() + 1
    return placed


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Take float32 products at this precision, inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def elementwise(shapes: Sequence[tuple[int, ...]], wide: torch.dtype, low: torch.dtype) -> Any:
    """Return tensors that are changed and gradients, of which the second is missing."""
    x = [draw(*s, seed=i, dtype=wide) for i, s in enumerate(shapes)]
    g: list[Tensor | None] = [draw(*s, seed=i + 50, dtype=low) for i, s in enumerate(shapes)]
    g[1] = None
    return x, g


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def cases(name: str, where: Where) -> Iterator[tuple[str, Callable[[torch.device], Arguments], float, str]]:
    """Yield, for an operation of the table: a label, what makes its arguments on a device, how far results
    may be apart, and the precision of products."""
    large = () if where.quick else ((1024, 1024), (300, 8193))
    shapes = ((3, 5), (7,), (2049,), (64, 128), *large)
    if name in ("momentum_norm_", "local_step_"):
        for (wide, low), aligned in itertools.product(PAIRS[:1] if where.quick else PAIRS, (True, False)):
            label = f"{wide}, gradients {low}, {'aligned' if aligned else 'at odd addresses'}"
            bound = max(ROUNDING[wide], SUMS if name == "momentum_norm_" else 0.0)
            for variant in (True, False):
                yield (
                    f"{label}, {VARIANT[name]}={variant}",
                    partial(_elementwise_arguments, name, shapes, wide, low, aligned, variant),
                    bound,
                    "highest",
                )
    elif name == "gate_key":
        for count, closed in itertools.product((0, 1, 300) if where.quick else (0, 1, 300, 5000), (0, 1)):
            yield (
                f"{count} matrices, hold_closed={bool(closed)}",
                partial(_gate_arguments, count, bool(closed)),
                1e-6,
                "highest",
            )
    elif name == "low_rank_apply_":
        sizes = ((40, 24, 8),) if where.quick else ((40, 24, 8), (512, 1000, 64), (1000, 512, 256))
        for (rows, cols, r), scaled, precision in itertools.product(sizes, (True, False), PRODUCTS):
            for dtype in (torch.float32, torch.bfloat16):
                bound = max(PRODUCTS[precision], ROUNDING[dtype])
                yield (
                    f"{rows} x {cols}, rank {r}, X in {dtype}, scale={scaled}, {precision}",
                    partial(_apply_arguments, rows, cols, r, scaled, dtype),
                    bound,
                    precision,
                )
    elif name == "column_sumsq":
        for shape in ((2, 70, 5), (1, 1, 1)) if where.quick else ((2, 70, 5), (3, 4096, 512), (300, 513, 64)):
            yield (
                f"{shape}",
                lambda device, shape=shape: (
                    (draw(*shape, seed=3).to(device),),
                    {},
                ),
                SUMS,
                "highest",
            )
    elif name == "symmetric_product":
        sizes = ((70, 33), (64, 64)) if where.quick else ((70, 33), (1024, 1024), (5632, 2048))
        for (rows, cols), dtype, beta in itertools.product(sizes, ROUNDING, (0.0, -4.775)):
            if dtype != torch.float64 and (rows == cols or not beta):
                yield (
                    f"{rows} x {cols} in {dtype}, beta={beta}",
                    partial(_symmetric_arguments, rows, cols, dtype, beta),
                    max(PRODUCTS["highest"], ROUNDING[dtype]),
                    "highest",
                )
    elif name in ("sign_encode_", "sign_decode_"):
        sizes = ((37, 5), (0, 1)) if where.quick else ((37, 5), (0, 1), (16, 2), (20_000, 8))
        for (blocks, count), dtype in itertools.product(sizes, ROUNDING):
            make = _encode_arguments if name == "sign_encode_" else _decode_arguments
            yield f"{blocks} blocks of {dtype}, {count}", partial(make, blocks, count, dtype), 0.0, "highest"
    else:
        raise AssertionError(f"{name} is new in curvadion_kernels.OPS; give it cases here")


VARIANT = {"momentum_norm_": "store", "local_step_": "gated"}


def _elementwise_arguments(
    name: str,
    shapes: Any,
    wide: torch.dtype,
    low: torch.dtype,
    aligned: bool,
    variant: bool,
    device: torch.device,
) -> Arguments:
    x, g = (on(device, values, aligned=aligned) for values in elementwise(shapes, wide, low))
    if name == "momentum_norm_":
        watch = [draw(9, 9, seed=99).to(device)]
        return (x, g), {"decay": 0.9, "watch": watch, "store": variant}
    key = torch.zeros((), dtype=torch.int64, device=device) if variant else None
    return (x, g), {"decay": 0.99, "step_size": 0.1, "key": key}


def _gate_arguments(count: int, closed: bool, device: torch.device) -> Arguments:
    sums = torch.cat([draw(count, seed=1).square(), torch.zeros(2)])
    last = draw(count, seed=2).abs()
    tau = torch.full((count,), 0.5)
    return (sums.to(device), last.to(device), tau.to(device)), {"hold_closed": closed}


def _symmetric_arguments(
    rows: int, cols: int, dtype: torch.dtype, beta: float, device: torch.device
) -> Arguments:
    A = draw(2, rows, cols, seed=4) / rows**0.5
    if beta:
        A = A + A.mT
    return (A.to(device, dtype),), {"alpha": 2.0315 if beta else 1.0, "beta": beta}


def _blocks(blocks: int, dtype: torch.dtype) -> Tensor:
    """Return blocks from denormal numbers to near the largest, and of zeros, a NaN and an infinity."""
    x = draw(blocks, 128, seed=10)
    x *= torch.logspace(-42, 36, max(blocks, 1))[:blocks, None]
    for k, value in enumerate((0.0, math.nan, math.inf)):
        x[7 + k : 8 + k, 3:] = value
    return x.to(dtype).view(-1)


def _encode_arguments(blocks: int, less: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    e, x = _blocks(blocks, dtype), _blocks(blocks, torch.float32).to(dtype).flip(0)
    return (e.to(device), x[: max(0, len(x) - less)].to(device)), {}


def _decode_arguments(blocks: int, count: int, dtype: torch.dtype, device: torch.device) -> Arguments:
    payloads = [
        OPS["sign_encode_"].reference(_blocks(blocks, torch.float32).roll(128 * k), torch.empty(0))
        for k in range(count)
    ]
    return (torch.empty(128 * blocks, dtype=dtype, device=device), torch.stack(payloads).to(device)), {}


def _apply_arguments(
    rows: int, cols: int, r: int, scaled: bool, dtype: torch.dtype, device: torch.device
) -> Arguments:
    transposed, B = rows < cols, 2
    m, n = max(rows, cols), min(rows, cols)
    X = [draw(rows, cols, seed=k, dtype=dtype).to(device) for k in range(B)]
    M, P = draw(B, rows, cols, seed=5).to(device), (draw(B, m, r, seed=6) / math.sqrt(m)).to(device)
    Q, R = draw(B, n, r, seed=7).to(device), draw(B, n, r, seed=8).to(device)
    scale = draw(B, r, seed=9).to(device) if scaled else None
    factors = {"transposed": transposed, "decay": 0.99, "step_size": 0.1, "feedback": 0.1, "scale": scale}
    return (X, M, P, None if scaled else Q, R), factors


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors of nested arguments or results, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def against_the_reference(
    where: Where, name: str, make: Callable[[torch.device], Arguments], bound: float, precision: str
) -> str:
    """Run the kernel on the device and the definition on the CPU; compare results and what was changed."""
    worst = 0.0
    found = []
    with products(precision):
        for function, device in (
            (OPS[name].triton, where.device),
            (OPS[name].reference, torch.device("cpu")),
        ):
            arguments, named = make(device)
            out = function(*arguments, **named)
            found.append(tensors_in([out, arguments, named]))
        where.wait()
    for mine, theirs in zip(*found, strict=True):
        worst = max(worst, difference(mine, theirs))
    return expect(worst <= bound, f"apart by {worst:.1e} of the largest entry; at most {bound:.1e}")


def kernels(where: Where) -> Iterator[Check]:
    """Every kernel against its definition in plain torch."""
    why = None
    try:
        if where.device.type == "cpu" and not where.interpret:
            raise RuntimeError("there is no GPU; --interpret runs the kernels in Triton's interpreter")
        choose("triton", where.device)
    except RuntimeError as error:
        why = str(error)
    if where.device.type == "cuda":
        yield Check("kernels='auto' takes Triton on this GPU", lambda: _auto(where))
    for name in OPS:
        for label, make, bound, precision in cases(name, where):
            run = partial(against_the_reference, where, name, make, bound, precision)
            yield Check(f"{name}: {label}", run if why is None else partial(_left_out, why))


def _auto(where: Where) -> str:
    ops = choose("auto", where.device)
    return expect(ops.kernels == "triton", f"{ops.kernels}, because {ops.why}")


def _left_out(why: str) -> str:
    raise LeftOut(why)


# ---- part 3: every mode of the step against the CPU

SHAPES = {"tall": (48, 20), "wide": (20, 48), "square": (32, 32), "twin": (48, 20)}
EXPERTS = {"experts": (3, 20, 12)}
VECTORS = {"bias": ("adamw", (7,)), "embedding": ("lion", (11, 4))}
SCALES = [1.0, 0.2, 0.2, 2.0, 0.2, 0.2, 0.1, 4.0, 0.2, 0.3]
BASE: dict[str, Any] = {"lr": 0.05, "tau": 0.4, "momentum": 0.9, "rank_fraction": 0.5, "max_local_steps": 5}
# Options that all runs set, and those of which the combinations of all choices are run.
COMBINED = ("consensus", "local_update", "gate", "gate_lag")
FIXED = (*BASE, *COMBINED, "kernels", "algorithm", "check_every", "batch_dims")
OUTER = {"consensus": "outer", "local_update": "muon"}
# One run each, for options that are no choice from a table.
SINGLE: list[dict[str, Any]] = [
    {"weight_decay": 0.1, "local_lr_scale": 0.5},
    {"rank_multiple_of": 4, "error_feedback": False},
    {"betas": (0.8, 0.9), "eps": 1e-6, "local_update": "normuon"},
    {"warmup_steps": 3, "min_local_steps": 2},
    {"gate_every": 3},
    {"gate_every": None},
    {"target_sync_rate": 0.4},
    {"momentum_dtype": torch.bfloat16},
    {"payload_dtype": torch.bfloat16},
    {"local_update": "muon", "nesterov": True, "newton_schulz_steps": 6},
    {"local_update": "muon", "splits": 2},
    {"local_update": "dion", "max_local_steps": 0, "owners": "always", "replica_gbit": 400.0},
    {"local_update": "dion", "splits": 2, "split_along": "inputs"},
    {"local_update": "muon", "newton_schulz_dtype": torch.float32, "owner_dtype": torch.bfloat16},
    {**OUTER, "outer_lr": 0.7, "outer_momentum": 0.6},
    {**OUTER, "outer_fragments": 3},
    {**OUTER, "outer_delay": 3, "outer_bits": 1, "outer_residual_kept": 0.5},
    {**OUTER, "outer_on_host": True, "outer_fragments": 2, "outer_delay": 1},
]
EXACT = {torch.float64: 1e-6, torch.float32: 2e-3}  # rounding, times the condition of P
# On a GPU Newton-Schulz runs in bfloat16; elsewhere in float32.
COARSE = 5e-2
# Few bits: a value that rounds to the other level is off by a step until the next synchronization.
FEW_BITS = {torch.float64: 1e-3, torch.float32: 0.3}


def modes_of_the_step() -> Iterator[dict[str, Any]]:
    """Yield options: all combinations of the tables, then each other choice and option by itself."""
    lags = OPTIMIZER_OPTIONS["gate_lag"].choices
    assert lags is not None
    for values in itertools.product(CONSENSUS, RULES, SIGNALS, lags):
        yield dict(zip(COMBINED, values, strict=True))
    for name, allowed in {**GROUP_OPTIONS, **OPTIMIZER_OPTIONS}.items():
        if name not in FIXED:
            for choice, rule in itertools.product(allowed.choices or (), ("gradient", "muon")):
                outer = OUTER if name.startswith("outer_") else {}
                yield {**outer, "local_update": rule, name: choice}
    yield from SINGLE


def tolerance(options: Mapping[str, Any], dtype: torch.dtype) -> float:
    """Return how far the way of X on the GPU may be from that on the CPU, relative to its length."""
    rounded = [options.get(name) for name in ("momentum_dtype", "payload_dtype")]
    coarse = dtype == torch.float32 and options.get("local_update", "gradient") not in ("gradient", "dion")
    coarse |= torch.bfloat16 in rounded
    few = CODECS[options.get("outer_bits", 32)] is not None
    return max(EXACT[dtype], COARSE if coarse else 0.0, FEW_BITS[dtype] if few else 0.0)


@dataclass
class Run:
    """What a run of all replicas came to.

    Attributes:
        start, X: parameters before the first step and after the last `synchronize()`, of each replica.
        decisions: which steps were synchronized.
    """

    start: list[Tensor]
    X: list[list[Tensor]]
    decisions: list[bool]


class Replica:
    """Parameters, prescribed gradients and an optimizer."""

    def __init__(
        self,
        number: int,
        group: Any,
        options: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        width: int = 1,
    ):
        self.number, self.width = number, width
        values = {**SHAPES, **EXPERTS, **{name: shape for name, (_, shape) in VECTORS.items()}}
        shapes = {name: tuple(width * s for s in shape) for name, shape in values.items()}
        self.params = {
            name: nn.Parameter(draw(*shape, seed=i, dtype=dtype).to(device))
            for i, (name, shape) in enumerate(shapes.items())
        }
        groups: list[dict[str, Any]] = [{"params": [(name, self.params[name]) for name in SHAPES]}]
        groups += [{"params": [(name, self.params[name]) for name in EXPERTS], "batch_dims": 1}]
        groups += [
            {"params": [(name, self.params[name])], "algorithm": algorithm, "lr": 0.01}
            for name, (algorithm, _) in VECTORS.items()
        ]
        self.optimizer = CurvaDion(groups, replicate_mesh=group, **{**BASE, **options})
        self.decisions: list[bool] = []

    def gradients(self, t: int) -> list[Tensor]:
        """Return the gradients of step t."""
        G = []
        for i, p in enumerate(self.params.values()):
            common = draw(*p.shape, seed=1000 + 100 * t + i)
            own = draw(*p.shape, seed=100_000 * (1 + self.number) + 100 * t + i)
            G.append((SCALES[t % len(SCALES)] * (common + 0.5 * own)).to(p))
        return G

    def step(self, t: int, G: list[Tensor] | None = None) -> None:
        """Take a step with the gradients of step t."""
        for p, g in zip(self.params.values(), self.gradients(t) if G is None else G, strict=True):
            p.grad = g
        self.optimizer.step()
        self.decisions.append(bool(self.optimizer.metrics()["curvadion/synchronized"]))

    @property
    def X(self) -> list[Tensor]:
        """The parameters."""
        return [p.detach() for p in self.params.values()]


def train(
    options: Mapping[str, Any], device: torch.device, dtype: torch.dtype, steps: int, replicas: int = 2
) -> Run:
    """Train replicas in threads of this process."""

    def one(group: ThreadGroup) -> tuple[list[Tensor], Replica]:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        replica = Replica(group.rank, group, options, device, dtype)
        start = [x.cpu().clone() for x in replica.X]
        for t in range(steps):
            replica.step(t)
        replica.optimizer.synchronize()
        return start, replica

    done = ThreadGroup.run(replicas, one)
    return Run(done[0][0], [[x.cpu() for x in r.X] for _, r in done], done[0][1].decisions)


def deviation(run: Run, other: Run) -> float:
    """Return how far the parameters of replica 0 came apart, relative to how far they went."""
    pairs = list(zip(run.X[0], other.X[0], other.start, strict=True))
    apart = math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b, _ in pairs))
    way = math.sqrt(sum(float((b.double() - s.double()).square().sum()) for _, b, s in pairs))
    return apart / way if math.isfinite(apart) else math.inf


def against_the_cpu(where: Where, options: Mapping[str, Any], dtype: torch.dtype) -> str:
    """Take the same steps on the device and on the CPU."""
    cpu = train({**options, "kernels": "reference"}, torch.device("cpu"), dtype, where.steps)
    run = train(options, where.device, dtype, where.steps)
    expect(digest(run.X[0]) == digest(run.X[1]), "replicas differ after synchronize()")
    opened = f"{sum(run.decisions)} of {len(run.decisions)} steps synchronized"
    expect(run.decisions == cpu.decisions, f"{opened}; on the CPU {cpu.decisions}, here {run.decisions}")
    apart, bound = deviation(run, cpu), tolerance(options, dtype)
    return expect(apart <= bound, f"{opened}; apart by {apart:.1e} of the way, at most {bound:.1e}")


def modes(where: Where) -> Iterator[Check]:
    """Every mode of the step against the same run on the CPU: in float64 the logic, in float32 the GPU's
    arithmetic."""
    for options in modes_of_the_step():
        try:
            Replica(0, ThreadGroup.of(2)[0], options, torch.device("cpu"), torch.float32)
        except ValueError:  # these contradict one another, and are refused
            continue
        words = ", ".join(f"{name}={value}" for name, value in options.items())
        for dtype in (torch.float32, torch.float64):
            yield Check(f"{dtype}: {words}", partial(against_the_cpu, where, options, dtype))
