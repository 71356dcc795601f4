"""3,000 steps in bfloat16 with float32 momentum beside the same in float64: loss, drift, orthonormal columns.

python tests/long_bf16.py --steps 3000 --plot docs/images/long_bf16.png
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from matplotlib.figure import Figure

from curvadion import LOW_COMMUNICATION, CurvaDion
from curvadion.report.drawing import COLORS, DASHES, draw, log_axis, panels
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
EVERY = 50  # steps between points of the curves


@dataclass
class Course:
    """What became of a run.

    Attributes:
        steps: at which the others were taken, the last one after `synchronize()`.
        loss: of the mean of the replicas, on all data.
        drift: how far a replica is from that mean, relative.
        columns: the largest | ||q_j|| - 1 |.
    """

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    columns: list[float] = field(default_factory=list)


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


def train(mode: str, dtype: torch.dtype, steps: int) -> Course:
    """The worse of two replicas, at any time."""
    inputs, targets = problem()
    start = Net(dtype)

    def replica(group: ThreadGroup) -> Course:
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
        generator, course = torch.Generator().manual_seed(group.rank), Course()

        def whole() -> Tensor:
            return torch.cat([p.detach().double().flatten() for p in net.parameters()])

        @torch.no_grad()
        def note(step: int, own: Tensor) -> None:
            """Take down what the mean of the replicas is, which the model holds."""
            course.steps.append(step)
            course.loss.append(float((net(inputs.to(dtype)).double() - targets).square().mean()))
            course.drift.append(float((own - whole()).norm() / whole().norm()))
            Qs = [opt.state[m]["Q"].double() for m in matrices if "Q" in opt.state[m]]
            lengths = [float((Q.norm(dim=0) - 1).abs().max()) for Q in Qs]
            course.columns.append(max(lengths, default=0.0))

        for step in range(steps):
            for part in opt.param_groups:
                part["lr"] = (0.01, 1e-3)[part["algorithm"] == "adamw"] * max(0.02, 1 - step / steps)
            some = torch.randint(len(inputs), (BATCH,), generator=generator)
            opt.zero_grad()
            (net(inputs[some].to(dtype)).double() - targets[some]).square().mean().backward()
            opt.step()
            if step % EVERY == EVERY - 1:
                own = whole()
                with opt.consensus():
                    note(step + 1, own)
        own = whole()
        opt.synchronize()
        note(steps, own)
        return course

    courses = ThreadGroup.run(REPLICAS, replica)
    worst = {name: list(map(max, *(getattr(c, name) for c in courses))) for name in CURVES}
    return Course(courses[0].steps, **worst)


CURVES = {
    "loss": "loss of the replicas' mean",
    "drift": "relative distance from the mean",
    "columns": "Q's columns: | length - 1 |",
}


def picture(found: dict[str, tuple[Course, Course]]) -> Figure:
    """Draw all curves, of bfloat16 solid and of float64 dashed."""
    figure, axes = panels(1, len(CURVES), height=4.2, label="")
    for ax, (name, words) in zip(axes[0], CURVES.items(), strict=True):
        for color, (mode, courses) in zip(COLORS, found.items(), strict=False):
            for course, dash, of in zip(courses, DASHES, ("bfloat16", "float64"), strict=False):
                # Without the last point, the end once more, after synchronize(). Of the others, the worst of
                # four: synchronizations fall on every eighth step, so that single ones would zigzag.
                some = 1 if name == "loss" else 4
                steps, values = course.steps[:-1][some - 1 :: some], getattr(course, name)[:-1]
                worst = [max(values[k : k + some]) for k in range(0, len(steps) * some, some)]
                points = [point for point in zip(steps, worst, strict=True) if point[1] > 0]
                if points:
                    ax.plot(*zip(*points, strict=True), dash, color=color, linewidth=1, label=f"{mode}, {of}")
        if name == "columns":
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        else:
            log_axis(ax, "y")
        ax.set_xlabel("step")
        ax.set_title(words, loc="left")
    figure.legend(*axes[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="length of the runs")
    parser.add_argument("--mode", default="", choices=["", *MODES], help="this one alone")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all curves, as a PNG file")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="keep all curves there, as JSON, or take them from it",
    )
    options = parser.parse_args()
    before = json.loads(options.data.read_text()) if options.data and options.data.exists() else {}
    print("| mode | loss, bf16 | loss, fp64 | drift, bf16 | drift, fp64 | columns of Q, bf16 |")
    print("|---|---|---|---|---|---|")
    bad, found = [], dict[str, tuple[Course, Course]]()
    for mode in [options.mode] if options.mode else MODES:
        if mode in before:
            half, full = (Course(**course) for course in before[mode])
        else:
            half, full = train(mode, torch.bfloat16, options.steps), train(mode, torch.float64, options.steps)
        found[mode] = half, full
        if options.data:
            kept = {name: [asdict(course) for course in courses] for name, courses in found.items()}
            options.data.write_text(json.dumps(kept))
        print(
            f"| {mode} | {half.loss[-1]:.2e} | {full.loss[-1]:.2e} | {half.drift[-1]:.1e} | "
            f"{full.drift[-1]:.1e} | {max(half.columns):.0e} |",
            flush=True,
        )
        # bfloat16 has eight bits: weights end within 2^-8 of where they should be, and so do outputs.
        close = half.loss[-1] < 1.5 * full.loss[-1] + 1e-3 and half.drift[-1] < full.drift[-1] + 0.02
        if not close and mode not in UNBOUNDED:
            bad.append(mode)
        if not max(half.columns) < 1e-5:
            bad.append(f"{mode}: columns")
    if options.plot and (drawn := draw(picture, found, "python " + " ".join(sys.argv))):
        options.plot.write_bytes(drawn)
    if bad:
        sys.exit(f"out of bounds: {', '.join(bad)}")


if __name__ == "__main__":
    main()
