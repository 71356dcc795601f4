r"""Loss against bytes: K replicas of a small GPT under a list of settings, at equal tokens, and controls.

    python benchmarks/convergence.py --tables headline --seeds 0 1 2 --text FOLDER
    python benchmarks/convergence.py --tables headline --seeds 0 --backend processes    # scripts/train.py's
    python benchmarks/convergence.py --check benchmarks/results/convergence.jsonl    # the same losses today?
    curvadion report benchmarks/results/convergence.jsonl

One JSON line per finished run goes to --out; what is there already is not run again. "simulation" is one
optimizer for each replica, all in one process, on a CPU core or a GPU (benchmarks/simulation.py); "processes"
is torchrun and one process per replica.

Loss is in nats per byte, of the mean of all replicas, on held-out text. Bytes are those that leave one
replica. Controls are part of each
run: synchronous training, AdamW, no synchronization at all, and for each gate that is steered to a rate the
fixed interval of that rate. If no synchronization is as good as synchronous training, gradients leak between
replicas: all runs become invalid.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from oracles import Oracle
from simulation import Replicas, Setting
from torch import nn
from torch.nn import functional as F

from curvadion.cli import HelpFormatter
from curvadion.gate.trouble import NonFiniteError
from curvadion.report.display import hardware
from curvadion.report.files import replace_file
from curvadion.report.studies import is_baseline
from curvadion.sharding.ledger import WIRE

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from gpt import GPT  # noqa: E402
from text import ByteText  # noqa: E402
from train import learning_rate  # noqa: E402

# Learning rates and momentum of the baselines were tuned one at a time on the same text,
# at K = 4, batch 16 and 600 steps: see docs/results.md.
SHARED_LR = {"lr": 0.02, "adamw_lr": 1e-2}
MUON = Setting("Muon every step", baseline=True, momentum=0.9, **SHARED_LR)
# The best found when learning rate and momentum were changed together, to those of OURS, with Nesterov:
# changing one of MUON's numbers at a time had missed it.
BEST = replace(MUON, name="Muon every step, Nesterov", lr=0.03, momentum=0.8, nesterov=True)
NEVER = Setting("no synchronization", interval=math.inf, momentum=0.8, **SHARED_LR)
CONTROLS = [MUON, Setting("AdamW every step", baseline=True, rule="adamw", adamw_lr=3e-3), NEVER]
OURS = Setting("1 bit every 8 steps", momentum=0.8, lr=0.03, adamw_lr=1e-2, bits=1, interval=8, outer_lr=1.4)
SHARED_RULE = {"rank_fraction": 0.25, "momentum": 0.95, "consensus": "average", "gate": "rmmc", "tau": 0.3}
RELEASED = Setting("the released code's rule, tau 0.3", rule="dion", warmup=20, **SHARED_RULE, **SHARED_LR)
PAPER = Setting("the paper's text, tau 0.3", rule="gradient", warmup=20, **SHARED_RULE, **SHARED_LR)
PLAIN = replace(OURS, name="1 bit every 8 steps, outer 1.0", outer_lr=1.0)


POLAR = {"newton_schulz": "polar_express"}


def variant(name: str, of: Setting = OURS, **changes: Any) -> Setting:
    return replace(of, name=name, **changes)


NESTEROV = variant("1 bit, Nesterov", nesterov=True)
KEPT = variant("1 bit, Nesterov, residual kept by half", NESTEROV, kept=0.5)


def with_numbers(name: str, of: Setting, outer_lr: float, **numbers: float) -> Setting:
    """Return a setting with these numbers, to three digits; a baseline has no outer learning rate."""
    numbers |= {} if of.baseline else {"outer_lr": outer_lr}
    return variant(name, of, **{key: float(f"{value:.3g}") for key, value in numbers.items()})


def trials(
    of: Setting,
    count: int = 10,
    around: tuple[float, float, float, float] = (0.03, 0.01, 0.18, 1.4),
    spread: float = 1.0,
    seed: int = 2026,
) -> list[Setting]:
    """Return `count` settings whose learning rates and momentum are drawn at random, the same for all; one
    that is no baseline also draws its outer learning rate. `around`: the learning rate, AdamW's, 1 - momentum
    and the outer learning rate in the middle; the first two are drawn within 2^spread of it."""
    draw = random.Random(seed)
    *rates, middle_new, middle_outer = around
    found = []
    for i in range(count):
        lr, adamw_lr = (m * 2 ** draw.uniform(-spread, spread) for m in rates)
        momentum = 1 - middle_new * 2 ** draw.uniform(-1.2 * spread, 1.2 * spread)
        outer_lr = draw.uniform(middle_outer - 0.4, middle_outer + 0.4)
        name = f"{of.name}, trial {i}"
        found.append(with_numbers(name, of, outer_lr, lr=lr, adamw_lr=adamw_lr, momentum=momentum))
    return found


def side(of: Setting, rule: str = "NorMuon") -> str:
    """Return how names of settings with this rule begin, of the baseline and of ours."""
    return f"{rule} every step" if of.baseline else f"1 bit, {rule}"


def normuon(of: Setting, trial: int | str) -> Setting:
    """Return a trial's setting with NorMuon for Muon."""
    return variant(f"{side(of)}, trial {trial}", of, rule="normuon")


def second(of: Setting) -> list[Setting]:
    """Return the trials of a second search, of NorMuon, around what the first found for it."""
    return [normuon(one, f"2.{i}") for i, one in enumerate(trials(of, 8, (0.07, 0.016, 0.25, 1.8)))]


def third(of: Setting) -> list[Setting]:
    """Return the trials of a third: closer around what was best, with higher outer learning rates."""
    found = trials(of, 8, (0.04, 0.018, 0.27, 2.5), spread=0.6, seed=2027)
    return [normuon(one, f"3.{i}") for i, one in enumerate(found)]


def again(of: Setting) -> list[Setting]:
    """Return a setting and four around it, for conditions that may want other numbers: learning rates lower
    or higher, alone or with as much less or more that is new in the momentum, and a lower outer one."""
    found = [of]
    scales = ((0.6, 1, 1), (0.6, 0.6, 0.75), (1.6, 1, 0.75), (1.6, 1.4, 1))
    for i, (rate, new, outer) in enumerate(scales):
        numbers = {"lr": of.lr * rate, "adamw_lr": of.adamw_lr * rate}
        numbers["momentum"] = 1 - (1 - of.momentum) * new
        found.append(with_numbers(f"{side(of)}, again {i}", of, of.outer_lr * outer, **numbers))
    return found


def lowered(of: Setting, end: float, decay: float = 1.0, scale: float = 1.0) -> Setting:
    """Return a setting whose learning rates, so many times as high, fall to `end` of that over the last
    `decay` of the run."""
    name = f"{side(of)}, down to {end}"
    name += f" over the last {decay}" if decay != 1 else ""
    name += f", lr {scale} times" if scale != 1 else ""
    return with_numbers(
        name, of, of.outer_lr, lr=of.lr * scale, adamw_lr=of.adamw_lr * scale, end=end, decay=decay
    )


def in_turn(
    search: Callable[[Setting], list[Setting]], baseline: Setting = BEST, ours: Setting = KEPT
) -> list[Setting]:
    """Return the trials of a search, of the baseline and of ours in turn."""
    return [one for pair in zip(search(baseline), search(ours), strict=True) for one in pair]


# The best of the random search.
SEARCHED = trials(BEST)[2]
LLOYD = "lloyd:4:128"
# What the random search found for KEPT.
FAST = {"lr": 0.058, "adamw_lr": 0.018, "momentum": 0.7}


def long(name: str, codec: str, interval: float, outer: tuple[float, float], **changes: Any) -> Setting:
    """Return KEPT with this codec, interval, and outer learning rate and momentum."""
    lr, momentum = outer
    name = f"{name}, outer {lr} / {momentum}"
    return variant(
        name, KEPT, codec=codec, interval=interval, outer_lr=lr, outer_momentum=momentum, **changes
    )


RARE = variant("", KEPT, bits=2, outer_lr=1.0, outer_momentum=0.5)
KEPT_FAST = trials(KEPT)[6]
# The best of NorMuon's two searches, on either side.
NORMUON, KEPT_NORMUON = second(BEST)[4], second(KEPT)[0]
HALF_PERCENT = variant("2 bits every 36 steps, outer 1.0 / 0.5", RARE, interval=36)
HALF_NORMUON = variant("2 bits every 36 steps, NorMuon", HALF_PERCENT, rule="normuon")
WHOLE = variant("32 bits every 8 steps, NorMuon", KEPT_NORMUON, bits=32, kept=0.0, outer_lr=1.4)
TENTH_PERCENT = variant("2 bits every 144 steps, outer 1.0 / 0.5", RARE, interval=144)

TABLES: dict[str, list[Setting]] = {
    "controls": [],
    "headline": [
        BEST,
        Setting("Dion every step, full rank", baseline=True, rule="dion", momentum=0.9, **SHARED_LR),
        Setting("Dion every step, rank 1/4", True, "dion", rank_fraction=0.25, momentum=0.95, **SHARED_LR),
        PAPER,
        RELEASED,
        variant("32 bits every 100 steps", PLAIN, bits=32, interval=100, lr=0.02),
        OURS,
    ],
    "gates": [
        *(variant(f"1 bit, {gate} gate", gate=gate) for gate in ("rmmc", "directional", "drift")),
        variant("1 bit, rmmc gate, tau ~ lr²", gate="rmmc", threshold_power=2),
        variant("1 bit, drift gate, threshold ~ lr", gate="drift", threshold_power=1),
        # These two give about as many synchronizations as every 8th step.
        variant("1 bit, qsr gate", gate="qsr", interval=3.4),
        variant("1 bit, late gate", gate="late", interval=16),
    ],
    "bits": [
        *(variant(f"{bits} bits every 8 steps", bits=bits) for bits in (32, 4)),
        variant("4 bits every 27 steps", bits=4, interval=27),
        variant("2 bits every 14 steps", bits=2, interval=14),
        variant("64 of 4096 every 2 steps", bits=-64, interval=2),
        variant("1 bit every 8 steps, no error feedback", error_feedback=False),
        variant("1 bit, one stage, every 16 steps", two_stages=False, interval=16),
        variant("1 bit there, 2 back, every 12 steps", mean_bits=2, interval=12),
        variant("1 bit in 8 fragments, one every step", fragments=8),
    ],
    "rules": [
        variant("1 bit, full-rank Dion", rule="dion"),
        variant("1 bit, Dion of rank 1/4", rule="dion", rank_fraction=0.25),
        variant("1 bit, AdamW", rule="adamw", adamw_lr=6e-3),
        variant("1 bit, gradient", rule="gradient"),
        variant("1 bit, Nesterov inside", nesterov=True),
        variant("1 bit, momentum averaged, every 16 steps", at_synchronization="average", interval=16),
        variant("1 bit, momentum reset", at_synchronization="reset"),
    ],
    "outer": [
        PLAIN,
        variant("1 bit, outer 1.0 / 0.5", outer_lr=1.0, outer_momentum=0.5),
        variant("1 bit, outer 1.8", outer_lr=1.8),
        *(variant(f"1 bit, {delay} steps under way", delay=delay) for delay in (1, 2, 4, 7)),
    ],
    "sensitivity": [
        variant("1 bit, lr 0.02", lr=0.02),
        variant("1 bit, lr 0.042", lr=0.042),
        variant("1 bit, momentum 0.9", momentum=0.9),
        variant("1 bit every 4 steps", interval=4),
        variant("1 bit every 16 steps", interval=16),
        *(variant(f"the released code's rule, tau {tau}", RELEASED, tau=tau) for tau in (0.1, 0.6, 1.0)),
        variant("1 bit, Dion of rank 1/2", rule="dion", rank_fraction=0.5),
    ],
    "polynomials": [
        MUON,
        OURS,
        variant("Muon every step, Polar Express", MUON, **POLAR),
        variant("Muon every step, Polar Express in 6 rounds", MUON, newton_schulz_steps=6, **POLAR),
        variant("1 bit, Polar Express", **POLAR),
        variant("1 bit, Polar Express in 6 rounds", newton_schulz_steps=6, **POLAR),
    ],
    "rounding": [
        variant(
            f"{of.name}, bfloat16, {method}",
            of,
            newton_schulz_dtype="bfloat16",
            newton_schulz_method=method,
        )
        for of in (
            BEST,
            OURS,
            variant("Nesterov, Polar Express in 6 rounds", BEST, newton_schulz_steps=6, **POLAR),
        )
        for method in ("gram", "standard")
    ],
    "search": [KEPT, *trials(BEST), *trials(KEPT)],
    "levers": [
        NESTEROV,
        KEPT,
        *(variant(f"1 bit, Nesterov, {n} rounds", NESTEROV, newton_schulz_steps=n) for n in (2, 3, 4)),
        variant("Muon every step, Nesterov, 3 rounds", BEST, newton_schulz_steps=3),
        variant("1 bit, Nesterov, outer 1.8 to 1.0", NESTEROV, outer_lr=1.8, outer_lr_end=1.0),
        variant("1 bit, Nesterov, outer 1.2 to 1.6", NESTEROV, outer_lr=1.2, outer_lr_end=1.6),
        *(variant(f"1 bit, Nesterov, agreement {s}", NESTEROV, shrink=s) for s in (0.5, 1.0)),
        variant("1 bit, Nesterov, early gate", NESTEROV, gate="early", interval=12),
    ],
    "codecs": [
        *(
            variant(f"{codec} every {interval} steps", KEPT, codec=codec, interval=interval)
            for codec, interval in (
                ("top:1/8:1", 4),
                ("hadamard:1024>sign:128", 8),
                ("lloyd:4:128", 16),
                ("top:1/8:1", 8),
                ("sign:128", 18),
                ("top:1/16:1", 3),
                ("ternary:1280", 12),
                ("top:1/16:1", 5),
                ("top:1/8:1", 32),
                ("sign:128", 72),
                ("top:64/4096:2", 16),
                ("part:2>sign:128", 4),
                ("dct2:64>top:64/4096:2", 4),
                ("stochastic:128:1", 8),
                ("top:1/64:1", 8),
                ("lloyd:4:128", 30),
            )
        ),
    ],
    "frontier": [
        variant("2 bits every 36 steps", KEPT, codec=LLOYD, interval=36),
        variant("2 bits every 36 steps, outer 1.7", KEPT, codec=LLOYD, interval=36, outer_lr=1.7),
        long("2 bits every 36 steps", LLOYD, 36, (1.0, 0.5)),
        long("2 bits every 16 steps", LLOYD, 16, (1.0, 0.5)),
        long("2 bits every 36 steps", LLOYD, 36, (1.0, 0.7)),
        long("2 bits every 16 steps, lr 0.058", LLOYD, 16, (1.2, 0.3), **FAST),
        long("2 bits every 36 steps, lr 0.058", LLOYD, 36, (1.0, 0.5), **FAST),
        long("1 bit every 8 steps, lr 0.058", "", 8, (1.2, 0.2), **FAST),
        long("4 bits every 30 steps", "lloyd:16:128", 30, (1.0, 0.5)),
        long("2 bits every 144 steps", LLOYD, 144, (1.0, 0.5)),
        long("1 bit of vectors every 8 steps, lr 0.058", "vector:8/8", 8, (1.4, 0.0), **FAST),
        long("2 bits every 36 steps", LLOYD, 36, (0.7, 0.8)),
        long("2 bits every 100 steps", LLOYD, 100, (1.0, 0.7)),
        *(
            variant(f"{name}, nothing kept", of, kept=0.0)
            for name, of in (
                ("2 bits every 16 steps", long("", LLOYD, 16, (1.0, 0.5))),
                ("2 bits every 36 steps", long("", LLOYD, 36, (1.0, 0.5))),
            )
        ),
        long("4 bits every 30 steps, lr 0.058", "lloyd:16:128", 30, (1.0, 0.5), **FAST),
        long("1 bit every 18 steps", "", 18, (1.0, 0.5)),
        variant("1 bit, sawtooth", KEPT, sawtooth=0.4),
        variant("1.6 bits every 27 steps", KEPT, codec="ternary:1280", interval=27),
    ],
    # Fewer bits more often, at equal bytes, with the numbers of trial 6 and of NorMuon's preset.
    "often": [
        variant(
            f"{codec} every {interval} steps, {numbers}, outer {outer}",
            of,
            codec=codec,
            interval=interval,
            outer_lr=outer,
        )
        for of, numbers, codec, interval, outer in (
            (KEPT_FAST, "trial 6", "vector:8/16", 4, 1.8),
            (KEPT_FAST, "trial 6", "vector:8/16", 4, 1.4),
            (KEPT_FAST, "trial 6", "part:2>sign:128", 4, 1.8),
            (KEPT_FAST, "trial 6", "vector:8/32", 2, 1.4),
            (KEPT_FAST, "trial 6", "part:4>sign:128", 2, 1.8),
            (KEPT_NORMUON, "NorMuon", "part:2>sign:128", 4, 2.09),
            (KEPT_NORMUON, "NorMuon", "part:2>sign:128", 4, 2.5),
        )
    ],
    # Short intervals while the learning rate is high, with the numbers of trial 6.
    "early": [variant("1 bit, early gate, trial 6", KEPT_FAST, gate="early", interval=12.5)],
    # Each matrix is sent when it has the largest score, or with the most bits; "staleness" is the clock.
    "chosen": [
        *(
            variant(f"1 bit, a half every 4 steps by {score}", KEPT_FAST, fragments=2, choice=score)
            for score in ("staleness", "drift", "rmmc", "change")
        ),
        *(
            variant(f"2 bits or none every 8 steps by {score}", KEPT_FAST, choice=score, rich=0.5)
            for score in ("staleness", "drift", "change")
        ),
        variant("1 bit, an eighth every step by staleness", KEPT_FAST, fragments=8, choice="staleness"),
    ],
    # NorMuon, with the numbers of the four best trials of Muon, and two more searches around the best.
    "local": [normuon(trials(of)[i], i) for i in (0, 2, 5, 6) for of in (BEST, KEPT)],
    "normuon": in_turn(second),
    "third": in_turn(third),
    # Both sides tuned again, where conditions are not those of the searches: --steps, --replicas, --batch.
    "again": in_turn(again, NORMUON, KEPT_NORMUON),
    # The mean of the last consensus models, with a shorter and later decay.
    "averages": [
        variant(
            f"{side(of)}, decay {decay}, mean of {averaged}",
            of,
            decay=decay,
            averaged=averaged,
        )
        for decay, averaged in ((1.0, 4), (0.5, 8), (0.25, 16), (0.25, 0))
        for of in (NORMUON, KEPT_NORMUON)
    ],
    # Learning rates that fall further than to a tenth, later, or from another height; momenta turned toward
    # the mean at a synchronization, with less momentum and a lower outer learning rate.
    "ends": [
        lowered(of, end, decay, scale)
        for end, decay, scale in ((0.02, 1, 1), (0, 1, 1), (0.02, 0.5, 1), (0.02, 1, 1.4), (0.02, 1, 0.7))
        for of in (NORMUON, KEPT_NORMUON)
    ]
    + [lowered(NORMUON, end, 1, scale) for end, scale in ((0, 1.4), (0.02, 2))]  # around the best of each
    + [lowered(KEPT_NORMUON, end, 0.5, scale) for end, scale in ((0, 1), (0.02, 1.4))],
    "turned": [
        variant(
            "1 bit, NorMuon, momentum turned",
            KEPT_NORMUON,
            momentum=0.69,
            outer_lr=1.9,
            at_synchronization="turn 0.4",
        )
    ],
    # Where the gap comes from: what replicas have of their own, and which parameters.
    "where": [
        WHOLE,
        variant("32 bits every 8 steps, NorMuon, outer 1.8", WHOLE, outer_lr=1.8),
        *(
            variant(f"own {own}, outer {g}", WHOLE, interval=interval, together=g, outer_lr=1.0)
            for own, interval in (("momenta", 1), ("momenta and positions", 8))
            for g in (1.4, 1.8, 2.2, 2.6, 3.2)
        ),
        *(
            variant(f"32 bits every 8 steps, NorMuon, exact {what}", WHOLE, exact=parts)
            for what, parts in (
                ("embedding, head, norms", "embedding,head,norm"),
                ("wq, wk", "wq,wk"),
                ("wv, wo", "wv,wo"),
                ("w1, w3", "w1,w3"),
                ("w2", "w2"),
                ("matrices", ".wq,.wk,.wv,.wo,.w1,.w2,.w3"),
            )
        ),
        *(NORMUON, KEPT_NORMUON),
    ],
    # Embedding, head and norms more seldom; a scale for 1,024 values, and what that saves spent on 7 steps.
    "seldom": [
        *(
            variant(f"1 bit, NorMuon, embedding and head every {8 * n} steps", KEPT_NORMUON, others_every=n)
            for n in (2, 4)
        ),
        *(
            variant(f"sign:1024 every {n} steps, NorMuon", KEPT_NORMUON, codec="sign:1024", interval=n)
            for n in (8, 7)
        ),
    ],
    # Dion2 with the numbers of Muon's best trials; Dion of rank 1/2 that forgets what it leaves out.
    "dion2": [
        variant(
            f"{side(of, 'Dion2')}, trial {i}",
            trials(of)[i],
            rule="dion2",
            rank_fraction=0.5,
            nesterov=False,
        )
        for i in (6, 2)
        for of in (BEST, KEPT)
    ],
    "retention": [
        variant(
            f"1 bit, Dion of rank 1/2, retention {retention}",
            KEPT,
            rule=f"dion, retention {retention}",
            rank_fraction=0.5,
            nesterov=False,
        )
        for retention in (1.0, 0.95, 0.9)
    ],
    # Of how the gap goes with length, size, replicas and batch.
    "law": [BEST, OURS, KEPT_FAST, HALF_PERCENT],
    # Of scripts/gpu_study.sh.
    "gpu": [BEST, OURS, NORMUON, KEPT_NORMUON],
    # To be run on text that nothing was tuned on, with other seeds: --held-out, --seeds 10 11 12.
    "final": [
        *(NORMUON, normuon(trials(BEST)[6], 6), SEARCHED, BEST, KEPT_NORMUON, KEPT_FAST, KEPT, OURS),
        *(HALF_NORMUON, HALF_PERCENT, TENTH_PERCENT),
    ],
    "tuning": [
        replace(MUON, name="Muon every step, momentum 0.8", momentum=0.8),
        replace(MUON, name="Muon every step, lr 0.014", lr=0.014),
        replace(MUON, name="Muon every step, lr 0.028", lr=0.028),
        replace(MUON, name="Muon every step, AdamW lr 0.006", adamw_lr=6e-3),
        replace(MUON, name="Muon every step, AdamW lr 0.02", adamw_lr=2e-2),
        replace(CONTROLS[1], name="AdamW every step, lr 0.006", adamw_lr=6e-3),
        replace(CONTROLS[1], name="AdamW every step, lr 0.0015", adamw_lr=1.5e-3),
    ],
}  # fmt: skip

# How far, in nats, no synchronization must be from synchronous training, at least.
LEAK = 0.02


@dataclass(frozen=True)
class Run:
    """One training run: everything that its result depends on."""

    setting: Setting
    seed: int
    replicas: int
    batch: int
    seq: int
    steps: int
    dim: int
    layers: int
    heads: int
    text: str
    backend: str
    parts: bool = False
    held_out: str = ""

    @property
    def identity(self) -> str:
        """A text that is equal for equal runs; what has its default value is left out, so that a new option
        changes no old run."""
        plain = asdict(Setting(""))
        values = asdict(self) | {
            "setting": {k: v for k, v in asdict(self.setting).items() if v != plain[k] and k != "name"}
        }
        if not self.held_out:
            del values["held_out"]
        return json.dumps(values, sort_keys=True)


def simulate(run: Run, device: str, count: Any = None, evaluations: float = math.inf) -> dict[str, Any]:
    """Train all replicas in this process and return what came out.

    Args:
        count: a shared counter of steps.
        evaluations: stop after so many of the run's, the one before its first step not counted.
    """
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    torch.manual_seed(run.seed)
    text = ByteText(Path(run.text) if run.text else None, max_bytes=20_000_000)
    model = GPT(dim=run.dim, layers=run.layers, heads=run.heads, max_seq=run.seq).to(device)
    kind = Oracle if run.setting.exact or run.setting.together else Replicas
    replicas = kind(model, run.setting, run.replicas)
    unseen = ByteText.whole(Path(run.held_out)) if run.held_out else text
    held_out = unseen.held_out_batches(tokens=65536, batch=32, seq=run.seq, rank=0, ranks=1)

    setting = run.setting
    recent: deque[nn.Module] = deque(maxlen=max(1, setting.averaged))

    @torch.no_grad()
    def held_out_loss() -> float:
        mean = replicas.consensus()
        if len(recent) > 1:
            for p, *others in zip(mean.parameters(), *(m.parameters() for m in recent), strict=True):
                p.copy_(torch.stack(others).mean(0))
        losses = [
            F.cross_entropy(mean(x.to(device)).flatten(0, 1), y.to(device).flatten()) for x, y in held_out
        ]
        return float(torch.stack(losses).mean())

    began, drift, signals = time.perf_counter(), [], []
    curve = [[0, held_out_loss()]]
    for step in range(1, run.steps + 1):
        for g in replicas.G.values():
            g.zero_()
        for k, replica in enumerate(replicas.models):
            part = (k, run.replicas) if run.parts else (0, 1)
            inputs, targets = text.batch(
                batch=run.batch, seq=run.seq, seed=run.seed, rank=k, step=step, part=part
            )
            F.cross_entropy(replica(inputs.to(device)).flatten(0, 1), targets.to(device).flatten()).backward()
        last = step == run.steps and not math.isinf(setting.interval)
        try:
            synchronized = replicas.step(
                learning_rate(step - 1, run.steps, setting.decay, setting.end), last=last
            )
        except NonFiniteError:
            curve.append([step, math.nan])
            break
        if replicas.drift is not None:
            drift.append([step, replicas.drift])
        if replicas.signal is not None:
            signals.append([step, replicas.signal, synchronized])
        if setting.averaged and (step % 8 == 1 if setting.baseline else synchronized):
            recent.append(replicas.consensus())
        if step % max(1, run.steps // 6) == 0 or step == run.steps:
            curve.append([step, held_out_loss()])
            if not math.isfinite(curve[-1][1]) or len(curve) > evaluations:
                break
        if count is not None:
            count.value = step
    return {
        "parameters": replicas.numel,
        "loss": curve[-1][1],
        "wire": replicas.wire,
        "sent": replicas.sent,
        "synchronized": replicas.synchronized,
        "seconds": time.perf_counter() - began,
        "curve": curve,
        "drift": drift[:: max(1, len(drift) // 100)],
        "signal": signals[:: max(1, len(signals) // 300)],
    }


# The attributes of a setting that scripts/train.py has flags for.
SHARED = (
    *(
        "rule",
        "rank_fraction",
        "lr",
        "adamw_lr",
        "momentum",
        "weight_decay",
        "consensus",
        "interval",
        "bits",
        "outer_lr",
    ),
    *("outer_momentum", "gate", "tau", "warmup", "delay", "kept", "nesterov"),
)


def train_flags(setting: Setting) -> list[str]:
    """Return the setting as flags of scripts/train.py. Raises ValueError for one that the optimizer does not
    have."""
    own = replace(Setting("", baseline=setting.baseline), **{name: getattr(setting, name) for name in SHARED})
    odd = [name for name, value in asdict(setting).items() if name != "name" and value != getattr(own, name)]
    odd += ["gate"] if setting.gate not in ("interval", "rmmc") else []
    odd += ["rule"] if setting.baseline and setting.rule not in ("dion", "adamw") else []
    if odd:
        raise ValueError(
            f"processes take what the optimizer has; got {', '.join(odd)} in {setting.name!r}; use "
            "--backend simulation"
        )
    flags: dict[str, Any] = {
        "--lr": setting.lr,
        "--adamw-lr": setting.adamw_lr,
        "--momentum": setting.momentum,
        "--weight-decay": setting.weight_decay,
        "--rank-fraction": setting.rank_fraction,
    }
    if setting.baseline:
        return words(flags | {"--optimizer": setting.rule})
    flags |= {
        "--local-update": setting.rule,
        "--consensus": setting.consensus,
        "--warmup-steps": setting.warmup,
    }
    if setting.consensus == "outer":
        flags |= {
            "--outer-bits": setting.bits,
            "--outer-lr": setting.outer_lr,
            "--outer-momentum": setting.outer_momentum,
        }
        flags |= {"--outer-delay": setting.delay, "--outer-residual-kept": setting.kept}
    if setting.gate == "interval":
        never = 10**9
        flags |= {
            "--max-local-steps": int(setting.interval) - 1 if math.isfinite(setting.interval) else never
        }
    elif setting.tau is None:
        flags |= {"--tau": 0.1, "--target-sync-rate": 1 / setting.interval}
    else:
        flags |= {"--tau": setting.tau}
    return [*words(flags), "--nesterov" if setting.nesterov else "--no-nesterov"]


def words(flags: dict[str, Any]) -> list[str]:
    """Return flags and their values as a command line has them."""
    return [str(part) for pair in flags.items() for part in pair]


def train(run: Run, count: Any = None) -> dict[str, Any]:
    """Train through torchrun and scripts/train.py, one process per replica, and return what came out."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "--seed": run.seed,
            "--replicas": run.replicas,
            "--batch": run.batch,
            "--seq": run.seq,
            "--steps": run.steps,
            "--dim": run.dim,
            "--layers": run.layers,
            "--heads": run.heads,
            "--eval-every": max(1, run.steps // 6),
            "--eval-bytes": 65536,
            "--max-text": 20_000_000,
            "--out": folder,
        }
        flags |= {"--text": run.text} if run.text else {}
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            run.replicas,
        ]
        command = [*torchrun, ROOT / "scripts" / "train.py", *words(flags), *train_flags(run.setting)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [str(word) for word in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output = []
        for line in process.stdout or ():
            output.append(line)
            if count is not None and line.startswith("step "):
                count.value = int(line.split()[1].split("/")[0])
        if process.wait():
            raise RuntimeError(
                f"{run.setting.name}: {' '.join(map(str, command))} failed:\n{''.join(output[-30:])}"
            )
        summary = json.loads((Path(folder) / "summary.json").read_text())
        steps = [json.loads(line) for line in (Path(folder) / "steps.jsonl").read_text().splitlines()]
    totals = {key.rsplit("/", 1)[1]: 0.0 for key in steps[0] if key.startswith("curvadion/bytes/replicate/")}
    for key in totals:
        totals[key] = sum(step[f"curvadion/bytes/replicate/{key}"] for step in steps)
    return {
        "parameters": summary["parameters"],
        "loss": summary["held_out"][-1][1],
        "wire": sum(step["curvadion/wire/replicate"] for step in steps),
        "sent": {key: value for key, value in totals.items() if value},
        "synchronized": int(sum(step["curvadion/synchronized"] for step in steps)),
        "seconds": sum(step["seconds"] for step in steps),
        "curve": summary["held_out"],
        "drift": [[step["step"], step["drift"]] for step in steps if step.get("drift") is not None],
        "signal": [
            [step["step"], step["curvadion/rmmc_max"], bool(step["curvadion/synchronized"])] for step in steps
        ],
    }


def execute(run: Run, device: str, count: Any = None, evaluations: float = math.inf) -> dict[str, Any]:
    """Train, and return the run's line."""
    simulated = run.backend == "simulation"
    result = simulate(run, device, count, evaluations) if simulated else train(run, count)
    sent = result.pop("sent")
    return {
        "study": "convergence",
        "setting": run.setting.name,
        "label": "measured",
        "backend": run.backend,
        "baseline": run.setting.baseline,
        "seed": run.seed,
        "replicas": run.replicas,
        "batch": run.batch,
        "seq": run.seq,
        "steps": run.steps,
        "tokens": run.steps * run.batch * run.seq * run.replicas,
        "wire": result.pop("wire"),
        "dense_wire": 2 * result["parameters"] * run.steps * WIRE["all_reduce"](run.replicas),
        "bytes": sent,
        **result,
        "valid": None,
        "options": {k: v for k, v in asdict(run.setting).items() if k != "name"},
        "model": {"dim": run.dim, "layers": run.layers, "heads": run.heads},
        "text": Path(run.text).name if run.text else "standard library",
        "parts": run.parts,
        **({"held_out": Path(run.held_out).name} if run.held_out else {}),
        "identity": run.identity,
    }


def with_controls(
    settings: Iterable[Setting], controls: Sequence[Setting] = tuple(CONTROLS)
) -> list[Setting]:
    """Return the settings, the controls, and for each gate that is steered to a rate the fixed interval of
    that rate; each once."""
    wanted: dict[str, Setting] = {}
    for setting in [*controls, *settings]:
        steered = setting.gate in ("rmmc", "directional", "drift") and setting.tau is None
        fixed = (
            [replace(setting, gate="interval", threshold_power=0, name=f"{setting.name}: fixed interval")]
            if steered
            else []
        )
        for s in [setting, *fixed]:
            wanted.setdefault(json.dumps({k: v for k, v in asdict(s).items() if k != "name"}), s)
    return list(wanted.values())


def validate(lines: Sequence[dict[str, Any]]) -> None:
    """Set "valid" in all lines: whether, all else equal, no synchronization is clearly worse than synchronous
    training."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        identity = json.loads(line["identity"])
        alike.setdefault(
            json.dumps({k: v for k, v in identity.items() if k not in ("setting", "seed")}), []
        ).append(line)
    for group in alike.values():
        best = {
            s: min((x["loss"] for x in group if is_baseline(x) and x["seed"] == s), default=None)
            for s in {x["seed"] for x in group}
        }
        never = {x["seed"]: x["loss"] for x in group if x["setting"] == NEVER.name}
        known = [loss for loss in best.values() if loss is not None]
        noise = 3 * statistics.stdev(known) if len(known) > 1 else 0.0
        gaps = [never[s] - best[s] for s in never if best[s] is not None]
        for line in group:
            line["valid"] = min(gaps) > max(LEAK, noise) if gaps and line["replicas"] > 1 else None


def read(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file, none if there is none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add(
        "--tables",
        nargs="+",
        default=["headline"],
        choices=sorted(TABLES),
        metavar="TABLE",
        help=f"of settings: {', '.join(TABLES)}",
    )
    add("--settings", nargs="+", metavar="NAME", help="only these of the tables; controls come along")
    add(
        "--backend",
        choices=("simulation", "processes"),
        default="simulation",
        help="one process for all replicas, or one each",
    )
    add("--seeds", nargs="+", type=int, default=[0], help="one run of each setting for each")
    add(
        "--controls-once",
        action="store_true",
        help="controls for the first of the seeds only, where a leak shows",
    )
    add(
        "--leak-control",
        action="store_true",
        help="of the controls take only the one where a leak shows, no synchronization",
    )
    add("--replicas", nargs="+", type=int, default=[4], help="K")
    add("--batch", nargs="+", type=int, default=[16], help="sequences in each replica's step")
    add(
        "--steps",
        nargs="+",
        type=int,
        default=[600],
        help="length of a run and of its learning rate schedule",
    )
    add("--seq", type=int, default=64, help="bytes in a sequence")
    add("--dim", type=int, default=64, help="width of the model")
    add("--layers", type=int, default=2, help="blocks")
    add("--heads", type=int, default=2, help="attention heads")
    add(
        "--text",
        default="",
        help="file or folder to train on (default: the Python standard library's own source)",
    )
    add(
        "--held-out",
        default="",
        help="file or folder to take the loss of, with --backend simulation (default: a part of --text that "
        "is not trained on, which settings are tuned on)",
    )
    add("--parts", action="store_true", help="each replica reads a part of the text of its own")
    add(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 1)),
        help="runs at a time, with --backend simulation on a CPU",
    )
    add("--device", default="cpu", help="of --backend simulation: cpu or cuda")
    add(
        "--check",
        type=Path,
        metavar="FILE",
        help="take this file's runs at these seeds and conditions again, and compare",
    )
    add(
        "--evaluations",
        type=float,
        default=math.inf,
        metavar="N",
        help="with --check: end each run after so many of its evaluations (a run has six)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/convergence.jsonl"),
        help="file that finished runs are appended to",
    )
    return parser.parse_args()


def main() -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    args = parse_args()
    if args.check is not None:
        return check(args)
    settings = [
        s for table in args.tables for s in TABLES[table] if not args.settings or s.name in args.settings
    ]
    controls = [NEVER] if args.leak_control else CONTROLS
    data = {"text": args.text, "backend": args.backend, "parts": args.parts, "held_out": args.held_out}
    shape = {"seq": args.seq, "dim": args.dim, "layers": args.layers, "heads": args.heads}
    runs = [
        Run(setting, seed, replicas=replicas, batch=batch, steps=steps, **shape, **data)
        for seed in args.seeds
        for replicas in args.replicas
        for batch in args.batch
        for steps in args.steps
        for setting in with_controls(
            settings, () if args.controls_once and seed != args.seeds[0] else controls
        )
        if args.backend == "simulation" or runs_in_processes(setting)
    ]
    done = {line["identity"] for line in read(args.out)}
    todo = [run for run in runs if run.identity not in done]
    console = Console(highlight=False)
    console.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them in {args.out} already")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/convergence.py " + shlex.join(sys.argv[1:])
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    jobs = args.jobs if args.backend == "simulation" and args.device == "cpu" else 1
    with (
        multiprocessing.Manager() as manager,
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        overall = progress.add_task("runs", total=len(todo))
        futures: dict[Future, tuple[Run, Any, Any]] = {}
        waiting = list(todo)
        while waiting or futures:
            while waiting and len(futures) < jobs:
                run = waiting.pop(0)
                count = manager.Value("i", 0)
                task = progress.add_task(
                    f"{run.setting.name}, K={run.replicas}, seed {run.seed}", total=run.steps
                )
                futures[pool.submit(execute, run, args.device, count)] = run, count, task
            time.sleep(0.3)
            for future, (run, count, task) in list(futures.items()):
                progress.update(task, completed=count.value)
                if future.done():
                    del futures[future]
                    progress.remove_task(task)
                    progress.advance(overall)
                    line = future.result() | {
                        "date": date.today().isoformat(),
                        "command": command,
                        "hardware": hardware(torch.device(args.device), ROOT),
                    }
                    with args.out.open("a") as file:
                        print(json.dumps(line), file=file)
                    share = line["wire"] / line["dense_wire"] if line["dense_wire"] else 0.0
                    console.print(
                        f"{run.setting.name}, K={run.replicas}, batch {run.batch}, {run.steps} steps, seed "
                        f"{run.seed}: loss {line['loss']:.4f}, {share:.2%} of dense bytes, "
                        f"{line['seconds']:.0f} s"
                    )
    lines = read(args.out)
    validate(lines)
    replace_file(args.out, "".join(json.dumps(line) + "\n" for line in lines))
    invalid = sum(line["valid"] is False for line in lines)
    if invalid:
        raise SystemExit(
            f"{invalid} runs are invalid: no synchronization is as good as synchronous training, so "
            "something leaks"
        )


def run_of(line: dict[str, Any]) -> Run:
    """Return the run that a line is the result of."""
    identity = json.loads(line["identity"])
    return Run(**identity | {"setting": Setting(line["setting"], **identity["setting"])})


def check(args: argparse.Namespace) -> None:
    """Take a file's simulated runs at these seeds and conditions again, and print what came out then and
    now, at the evaluation that both have last."""
    runs = []
    for line in read(args.check):
        run = run_of(line)
        alike = run.replicas in args.replicas and run.batch in args.batch and run.steps in args.steps
        named = not args.settings or run.setting.name in args.settings
        if run.backend == "simulation" and run.seed in args.seeds and named and alike:
            runs.append((run, line))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs if args.device == "cpu" else 1, mp_context=context) as pool:
        futures = [
            (pool.submit(execute, run, args.device, None, args.evaluations), run, then) for run, then in runs
        ]
        for future, run, then in futures:
            now = future.result()
            step, loss = now["curve"][-1]
            before = dict(then["curve"])[step]
            share = [f"{line['wire'] / max(line['dense_wire'], 1):.2%}" for line in (then, now)]
            whole = (
                f"; {then['synchronized']}, {now['synchronized']} synchronized; "
                f"{', '.join(share)} of dense bytes"
            )
            print(
                f"{run.setting.name}, K={run.replicas}, batch {run.batch}, seed {run.seed}, step {step} of "
                f"{run.steps}: loss {before:.4f} then, {loss:.4f} now ({loss - before:+.4f})"
                f"{whole if step == run.steps else ''}; {now['seconds']:.0f} s",
                flush=True,
            )


def runs_in_processes(setting: Setting) -> bool:
    """Say whether the optimizer has everything that the setting asks for."""
    try:
        train_flags(setting)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main()
