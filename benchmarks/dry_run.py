"""What a local step holds, sends and computes at any scale: shapes only, ranks that are not there.

    python benchmarks/dry_run.py                                   # 160m and 1b3 on 8, 64 and 1024 shards
    python benchmarks/dry_run.py --models 1b3 --shards 64 --rules muon dion

One replica, parameters sharded by `fully_shard` over all ranks, as torch.float32; Newton-Schulz and what
goes to owners in bfloat16, as on a GPU. Counted on one rank of FakeTensorMode: the parameters' and the
state's bytes, the storages that a step makes and has at the same time (transient), the bytes that leave the
rank over the shards, collectives, FLOPs of products (those of torch.linalg left out).
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peak_memory import PeakMemory
from timing import MODELS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from curvadion import CurvaDion
from curvadion.cli import HelpFormatter
from curvadion.projection.nominal import Decoder


class Weights(nn.Module):
    """The parameters of a model, by kind."""

    def __init__(self, model: Decoder):
        super().__init__()
        each = [shape for shape, count in model.matrices().items() for _ in range(count)]
        self.matrices = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in each)
        self.others = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in model.others())


def nbytes(tensor: torch.Tensor) -> int:
    """Return the bytes of this rank's part."""
    part = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return part.numel() * part.element_size()


def count(model: Decoder, shards: int, rule: str, rank_fraction: float) -> dict[str, Any]:
    """Take a local step as one rank of so many, and return what it took."""
    dist.init_process_group("fake", rank=0, world_size=shards, store=FakeStore())
    mesh = dist.init_device_mesh("cpu", (shards,))  # torch makes none under FakeTensorMode
    half = {"newton_schulz_dtype": torch.bfloat16} if rule in ("muon", "normuon", "dion2") else {}
    try:
        with FakeTensorMode():
            weights = Weights(model)
            fully_shard(weights, mesh=mesh)
            groups = [
                {"params": list(weights.matrices.parameters()), "local_update": rule, **half},
                {"params": list(weights.others.parameters()), "algorithm": "adamw"},
            ]
            opt = CurvaDion(
                groups, tau=math.inf, check_every=0, consensus="outer", rank_fraction=rank_fraction
            )
            state = sum(
                nbytes(t)
                for values in opt.state.values()
                for t in values.values()
                if isinstance(t, torch.Tensor)
            )
            for _ in range(2):
                for p in weights.parameters():
                    p.grad = torch.zeros_like(p)
                with FlopCounterMode(display=False) as flops, PeakMemory() as memory:
                    opt.step()
            before = dict(opt.ledger.calls)
            opt.step()
            calls = sum(n - before[key] for key, n in opt.ledger.calls.items())
            return {
                "parameters": sum(nbytes(p) for p in weights.parameters()),
                "state": state,
                "transient": memory.peak,
                "wire": sum(opt.ledger.last_step_wire.values()),
                "calls": calls,
                "flops": flops.get_total_flops(),
            }
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Print a table, and write a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["160m", "1b3"], help="which decoders")
    parser.add_argument("--shards", nargs="+", type=int, default=[8, 64, 1024], help="ranks of a replica")
    parser.add_argument("--rules", nargs="+", default=["muon", "dion"], help="of local steps")
    parser.add_argument("--rank-fraction", type=float, default=0.25, help="of Dion's P and R")
    parser.add_argument("--out", type=Path, help="a .jsonl file to append to")
    args = parser.parse_args()
    print("model  shards  rule   parameters  state    transient  wire over shards  calls  TFLOP")
    for name in args.models:
        for shards in args.shards:
            for rule in args.rules:
                found = count(MODELS[name], shards, rule, args.rank_fraction)
                mb = [found[key] / 1e6 for key in ("parameters", "state", "transient", "wire")]
                print(
                    f"{name:6} {shards:6}  {rule:6} {mb[0]:8.0f} MB {mb[1]:6.0f} MB {mb[2]:7.0f} MB "
                    f"{mb[3]:12.0f} MB {found['calls']:8} {found['flops'] / 1e12:8.2f}",
                    flush=True,
                )
                if args.out is not None:
                    case = {"study": "dry_run", "model": name, "shards": shards, "rule": rule, **found}
                    with args.out.open("a") as file:
                        file.write(json.dumps({**case, "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
