"""3,000 steps in bfloat16 with float32 momentum beside the same in float64: loss, drift, orthonormal columns.

python tests/long_bf16.py --steps 3000
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from curvadion import LOW_COMMUNICATION, CurvaDion
from curvadion.sharding.group import ThreadGroup

MODES: dict[str, dict[str, Any]] = {
    "gradient steps": {"tau": 0.1},
    "local Dion": {"tau": math.inf, "max_local_steps": 7, "local_update": "dion"},
    "low communication": LOW_COMMUNICATION,
    "under way": LOW_COMMUNICATION(outer_delay=4),
}
# Steps of the size of a gradient are lost where they are below 2^-9 of a weight: shown, and not bounded.
UNBOUNDED = ("gradient steps",)
REPLICAS, BATCH = 2, 64


def problem() -> tuple[Tensor, Tensor]:
    """Inputs, and what a fixed network of the same form makes of them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2048, 16, generator=generator, dtype=torch.float64)
    first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((32, 16), (8, 32))
    )
    return inputs, torch.tanh(inputs @ first.T / 4) @ second.T / 6


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(16, 32).to(dtype), nn.Linear(32, 8).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def train(mode: str, dtype: torch.dtype, steps: int) -> dict[str, float]:
    """Losses at the end, how far replicas are apart then, and the largest | ||q_j|| - 1 | on the way."""
    inputs, targets = problem()
    start = Net(dtype)

    def replica(group: ThreadGroup) -> dict[str, float]:
        net = copy.deepcopy(start)
        matrices = [net.first.weight, net.second.weight]
        groups = [
            {"params": matrices},
            {"params": [net.first.bias, net.second.bias], "algorithm": "adamw", "lr": 1e-3},
        ]
        options = {"lr": 0.01, "weight_decay": 0.0, "momentum_dtype": torch.float32, **MODES[mode]}
        if dtype == torch.float64:
            options["momentum_dtype"] = None
        opt = CurvaDion(groups, replicate_mesh=group, **options)
        generator, columns = torch.Generator().manual_seed(group.rank), 0.0
        for step in range(steps):
            for part in opt.param_groups:
                part["lr"] = (0.01, 1e-3)[part["algorithm"] == "adamw"] * max(0.02, 1 - step / steps)
            some = torch.randint(len(inputs), (BATCH,), generator=generator)
            opt.zero_grad()
            (net(inputs[some].to(dtype)).double() - targets[some]).square().mean().backward()
            opt.step()
            if step % 100 == 99 and (Qs := [opt.state[m]["Q"] for m in matrices if "Q" in opt.state[m]]):
                columns = max([columns, *(float((Q.double().norm(dim=0) - 1).abs().max()) for Q in Qs)])
        own = torch.cat([p.detach().double().flatten() for p in net.parameters()])
        opt.synchronize()
        mean = torch.cat([p.detach().double().flatten() for p in net.parameters()])
        with torch.no_grad():
            loss = float((net(inputs.to(dtype)).double() - targets).square().mean())
        return {"loss": loss, "drift": float((own - mean).norm() / mean.norm()), "columns": columns}

    results = ThreadGroup.run(REPLICAS, replica)
    return {key: max(r[key] for r in results) for key in results[0]}


def rows(steps: int, only: str) -> Iterator[tuple[str, dict[str, float], dict[str, float]]]:
    for mode in [mode for mode in MODES if only in mode]:
        yield mode, train(mode, torch.bfloat16, steps), train(mode, torch.float64, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--mode", default="", choices=["", *MODES], help="this one alone")
    options = parser.parse_args()
    print("| mode | loss, bf16 | loss, fp64 | drift, bf16 | drift, fp64 | columns of Q, bf16 |")
    print("|---|---|---|---|---|---|")
    bad = []
    for mode, half, full in rows(options.steps, options.mode):
        print(
            f"| {mode} | {half['loss']:.2e} | {full['loss']:.2e} | {half['drift']:.1e} | "
            f"{full['drift']:.1e} | {half['columns']:.0e} |",
            flush=True,
        )
        # bfloat16 has eight bits: weights end within 2^-8 of where they should be, and so do outputs.
        close = half["loss"] < 1.5 * full["loss"] + 1e-3 and half["drift"] < full["drift"] + 0.02
        if not close and mode not in UNBOUNDED:
            bad.append(mode)
        if not half["columns"] < 1e-5:
            bad.append(f"{mode}: columns")
    if bad:
        sys.exit(f"out of bounds: {', '.join(bad)}")


if __name__ == "__main__":
    main()
