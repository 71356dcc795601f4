"""The command `curvadion doctor`: looks at the ranks, the links and the options before a run does.

    curvadion doctor                                                # this process alone
    torchrun --nproc-per-node 4 -m curvadion doctor --replicas 2    # on several nodes with --nnodes etc.
    torchrun --nproc-per-node 4 -m curvadion doctor --build train:build_optimizer

It ends with 1 if something would not work, which every rank learns.
"""

import argparse

from curvadion.projection.nominal import SIZES

# By name on the command line: an attribute of `curvadion`, or none of its options.
PRESETS = {
    "low-communication": "LOW_COMMUNICATION",
    "low-communication-kept": "LOW_COMMUNICATION_KEPT",
    "lower-communication": "LOWER_COMMUNICATION",
    "lowest-communication": "LOWEST_COMMUNICATION",
    "none": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `curvadion doctor`."""
    add = parser.add_argument
    about = "K, copies of the model (default: the number of machines, on one machine 2 if that divides)"
    add("--replicas", type=int, help=about)
    about = "options to try (default %(default)s: the recommended settings)"
    add("--preset", choices=PRESETS, default="low-communication", help=about)
    about = "options beside or in place of the preset's, such as max_local_steps=15"
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help=about)
    about = "call this on every rank for an optimizer, in place of that of a small stand-in for a model"
    add("--build", metavar="MODULE:FUNCTION", help=about)
    about = "model to project bytes and seconds for, over the links as measured (default %(default)s)"
    add("--model", choices=SIZES, default="160m", help=about)
    about = "seconds that a forward and backward of that model take (default: by FLOPs of an H100)"
    add("--compute-seconds", type=float, help=about)
    for name, value in {"dim": 256, "ffn": 688, "layers": 2, "vocabulary": 1024}.items():
        add(f"--{name}", type=int, default=value, help="of the stand-in (default %(default)s)")
    about = "seconds after which a rank that does not answer is given up (default %(default)g)"
    add("--timeout", type=float, default=60.0, help=about)


def main(args: argparse.Namespace) -> int:
    """Run `curvadion doctor`; return 1 if something would not work."""
    from curvadion.doctor.command import run  # with torch; `curvadion doctor --help` is without

    return run(args)
