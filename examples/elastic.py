"""Train a small byte-level model on replicas that may leave and come back.

    curvadion rendezvous --port 29600                          # on a machine that stays
    torchrun --standalone --nproc-per-node 2 examples/elastic.py --name a --store HOST:29600
    torchrun --standalone --nproc-per-node 2 examples/elastic.py --name b --store HOST:29600
    torchrun --standalone --nproc-per-node 2 examples/elastic.py --name c --store HOST:29600

One torchrun for each replica, here of two ranks that share it by FSDP2; `python` in its place is a replica of
one rank. End one of them (kill -9, ctrl-C, pull its plug), watch the others go on, and start it again.
"""

import argparse
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from curvadion import LOW_COMMUNICATION, CurvaDion, ElasticGroup, param_groups_for

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
from gpt import GPT
from text import ByteText


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", required=True, help="of this replica; no other has it")
    parser.add_argument("--store", required=True, metavar="HOST:PORT", help="where replicas meet")
    parser.add_argument("--replicas", type=int, default=3, help="to wait for at the start (default: 3)")
    parser.add_argument("--lease", type=float, default=10, help="seconds of silence of one that has left")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120,
        help="seconds that ranks of a replica wait for one",
    )
    parser.add_argument("--steps", type=int, default=401)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text", type=Path, help="file or folder (default: Python's standard library)")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = GPT(dim=64, layers=2, heads=2)
    rank, ranks = 0, 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=timedelta(seconds=args.timeout))
        rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks > 1:
        mesh = dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    replicas = ElasticGroup(args.store, args.name, expected=args.replicas, lease=args.lease)
    opt = CurvaDion(
        param_groups_for(model, adamw_lr=3e-3), lr=0.03, replicate_mesh=replicas, **LOW_COMMUNICATION
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / args.steps)
    text, seed = ByteText(args.text), sum(args.name.encode())  # of its own for each replica

    begin = opt.join(schedule=schedule)
    if rank == 0:
        print(f"{args.name} begins at step {begin}", flush=True)
    for step in range(begin, args.steps):
        inputs, targets = text.batch(batch=args.batch, seq=128, seed=seed, rank=rank, step=step)
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        replicas.tokens += targets.numel()
        opt.step()
        opt.zero_grad()
        schedule.step()
        if rank == 0 and opt.metrics()["curvadion/synchronized"]:
            print(f"step {step}, loss {loss.item():.3f}, {', '.join(replicas.names)} are in", flush=True)
    replicas.leave(finished=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
