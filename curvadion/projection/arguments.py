"""The options of `curvadion project`: known without torch, so that its page of help is there at once."""

import argparse
from pathlib import Path

from curvadion.projection.nominal import KNOWN_RULES, LINKS, OUTER, SIZES, WHOLE_PAYLOADS
from curvadion.projection.rates import RATES

RATE_HELP = {
    "bfloat16": "FLOPs of bfloat16 products",
    "float32": "FLOPs of float32 products",
    "float64": "FLOPs of float64 products",
    "cholesky": "FLOPs of Cholesky factors",
    "memory": "bytes of memory read and written",
    "inside": "bytes that leave it in an all-reduce, and in an all-to-all inside a machine",
    "across": "bytes that leave it in an all-to-all across machines",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `curvadion project`."""
    _add_model_and_link(parser)
    _add_schedule_and_payload(parser)
    _add_work(parser)
    add = parser.add_argument
    add(
        "--overlap",
        type=float,
        default=0.0,
        help="fraction of the dense all-reduce that the backward hides (default %(default)s)",
    )
    add("--faster", type=float, default=10.0, help="percent, for the break-even link (default %(default)g)")
    add(
        "--published",
        action="store_true",
        help="print the published range, the assumptions that give it, and nothing else",
    )
    add(
        "--measured",
        type=Path,
        metavar="FILE",
        help="JSON lines of emulated runs, to set beside the projection of each, and nothing else",
    )
    add("--picture", type=Path, metavar="FILE.png", help="draw speed-up over bandwidth")


def _add_model_and_link(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    about = f"Llama-style decoder, untied, vocabulary {SIZES['160m'].vocabulary} (default %(default)s)"
    add("--model", choices=SIZES, default="160m", help=about)
    for name in ("dim", "layers", "ffn", "vocabulary"):
        add(f"--{name}", type=int, help="in place of that of --model")
    add("--replicas", type=int, default=2, help="K, the copies of the model (default %(default)s)")
    add("--shards", type=int, default=8, help="GPUs in a replica (default %(default)s)")
    add("--tokens", type=float, default=524288, help="per replica and step (default %(default)s)")
    add("--flops-per-gpu", type=float, default=4e14, help="effective FLOP/s of a GPU (default %(default)g)")
    add("--compute-seconds", type=float, help="T_compute, in place of --tokens and --flops-per-gpu")
    about = "nominal bandwidth and round trip (default %(default)s)"
    add("--link", choices=LINKS, default="cross-datacentre", help=about)
    add("--gbit", type=float, help="of one NIC, each way, in place of the link's")
    add("--rtt-ms", type=float, help="round trip, in place of the link's")
    about = (
        "NICs of a replica: its bandwidth is nics * gbit "
        "(default: --shards where each GPU has its own, else 1)"
    )
    add("--nics", type=int, help=about)


def _add_schedule_and_payload(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--interval", type=float, default=8, help="steps per synchronized step (default %(default)g)"
    )
    rate.add_argument("--rate", type=float, help="synchronized steps per step, in place of --interval")
    about = "steps from one exchange of the gate to the next (default: the same as --interval)"
    add("--gate-every", type=int, help=about)
    about = "outer_delay: steps for which a synchronization is under way (default %(default)s)"
    add("--delay", type=int, default=0, help=about)
    about = f"of a synchronized step: {', '.join(WHOLE_PAYLOADS)}, or {OUTER}BITS (default %(default)s)"
    add("--payload", default="outer-1", help=about)
    about = f"{', '.join(KNOWN_RULES)}; Dion steps move Q, sent then (default %(default)s)"
    add("--local-update", metavar="RULE", default="muon", help=about)
    add("--rank-fraction", type=float, default=0.25, help="of P and R (default %(default)s)")
    add("--rank-multiple-of", type=int, default=1, help="rank is rounded up to it (default %(default)s)")
    about = "of an element of P, R and AdamW gradients (default %(default)s)"
    add("--payload-bytes", type=int, choices=(2, 4), default=4, help=about)
    about = "elements that share a scale in outer-8 and fewer (default: as many as in the codec)"
    add("--block", type=int, help=about)


def _add_work(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hardware", choices=RATES, default="h100", help="rates of the optimizer's own work (default h100)")
    for name, about in RATE_HELP.items():
        add(f"--{name}-per-second", type=float, metavar="RATE", help=f"{about}, of a GPU")
    about = "GPUs of a machine; in a replica of more, all-to-all is across machines (default %(default)s)"
    add("--gpus-per-node", type=int, default=8, help=about)
    about = (
        "of Muon steps: whole matrices have owners (default %(default)s: where the optimizer finds it faster)"
    )
    add("--owners", choices=("auto", "always", "never"), default="auto", help=about)
    about = "of a GPU to other replicas: print what owners of P among all of them save (replica_gbit)"
    add("--replica-gbit", type=float, help=about)
    add("--newton-schulz-steps", type=int, default=5, help="rounds of Muon steps (default %(default)s)")
    about = "time of a symmetric product, of which one triangle is enough, to that of a full one (default 1)"
    add("--symmetric-share", type=float, default=1.0, help=about)
    about = "of Newton-Schulz and on the way to owners (default %(default)s)"
    add("--newton-schulz-dtype", choices=("bfloat16", "float32"), default="bfloat16", help=about)
