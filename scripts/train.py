r"""Train a byte-level Llama-style GPT with CurvaDion, or with one of its controls.

It is also the example for your own loop.

One machine, 2 replicas x 2 FSDP2 shards on CPU (GPUs are used when there are any; then one process for each):

    torchrun --nproc-per-node 4 scripts/train.py
    torchrun --nproc-per-node 4 scripts/train.py --optimizer dion       # a control: synchronized every step
    torchrun --nproc-per-node 4 scripts/train.py --tau 0.2 --consensus average --local-update gradient
    torchrun --nproc-per-node 4 scripts/train.py --text ~/books

Two machines, one replica on each; the same on both, HOST being the name of either:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id run1 \
        scripts/train.py

Writes to --out: steps.jsonl (a line per step), summary.json, report/index.html. Compare runs with
`curvadion report RUN RUN ...`.
"""

import argparse
import os
import time
from concurrent.futures import Future
from contextlib import closing, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from gpt import GPT
from text import ByteText
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import LambdaLR

import curvadion
from curvadion import CurvaDion, param_groups_for
from curvadion.cli import HelpFormatter
from curvadion.consensus import CODECS, CONSENSUS
from curvadion.options import OPTIMIZER_OPTIONS
from curvadion.report.display import Display, hardware
from curvadion.report.page import write_report
from curvadion.rules import RULES
from curvadion.state.newest import load_newest, saved_steps

PRESETS = ("LOW_COMMUNICATION", "LOW_COMMUNICATION_KEPT", "LOWER_COMMUNICATION", "LOWEST_COMMUNICATION")
# The options that a preset has and a flag changes.
OF_PRESETS = (
    *("tau", "local_update", "momentum", "nesterov", "consensus", "max_local_steps", "gate_every"),
    *("outer_bits", "outer_lr", "outer_momentum", "outer_delay", "outer_residual_kept"),
)


def codec_name(text: str) -> int | str:
    """Return the name of a codec: a number of bits, or what `register_codec` was given."""
    return int(text) if text.isdigit() else text


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the preset's options with what flags change, without what these leave no use for."""
    preset = dict(getattr(curvadion, args.preset))
    given = {name: getattr(args, name) for name in OF_PRESETS if getattr(args, name) is not None}
    if args.optimizer != "curvadion":  # replicas never differ
        kept = {name: given.get(name, preset[name]) for name in ("tau", "local_update", "momentum")}
        return kept | {"max_local_steps": 0}
    if given.get("tau", float("inf")) < float("inf"):
        preset |= {"max_local_steps": None, "gate_every": 1}
    left_out = {"nesterov"} if given.get("local_update", "muon") not in ("muon", "normuon") else set()
    if given.get("consensus", "outer") != "outer":
        left_out |= {name for name in preset if name.startswith("outer")}
    return {name: value for name, value in preset.items() if name not in left_out} | given


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add = parser.add_argument_group("optimizer").add_argument
    optimizer_help = "dion and adamw are the controls: CurvaDion's own code, synchronized every step"
    add("--optimizer", choices=("curvadion", "dion", "adamw"), default="curvadion", help=optimizer_help)
    preset_help = "curvadion's settings; the options below that say so change them"
    add("--preset", choices=PRESETS, default=PRESETS[0], help=preset_help)
    tau_help = "synchronize when the momentum's relative change exceeds this (default: never)"
    add("--tau", type=float, help=tau_help)
    add("--target-sync-rate", type=float, help="steer tau so that this share of the steps is synchronized")
    local_help = "what a matrix does on a local step; gradient is the paper's text (default: the preset's)"
    add("--local-update", choices=tuple(RULES), help=local_help)
    consensus_help = "how replicas become equal again (default: outer, as the preset has it)"
    add("--consensus", choices=tuple(CONSENSUS), help=consensus_help)
    add("--outer-lr", type=float, help="learning rate of --consensus outer (default: the preset's)")
    momentum_help = "Nesterov momentum of --consensus outer (default: the preset's)"
    add("--outer-momentum", type=float, help=momentum_help)
    bits_help = "bits per parameter of --consensus outer (default: the preset's)"
    add("--outer-bits", type=codec_name, choices=tuple(CODECS), help=bits_help)
    delay_help = (
        "steps for which a synchronization of --consensus outer is under way (default: 0, which waits for it)"
    )
    add("--outer-delay", type=int, help=delay_help)
    kept_help = (
        "share of its rounding residual that a replica keeps in its parameters (default: the preset's)"
    )
    add("--outer-residual-kept", type=float, help=kept_help)
    add(
        "--local-lr-scale",
        type=float,
        default=1.0,
        help="learning rate of matrices on local steps, relative to --lr",
    )
    add(
        "--rank-fraction",
        type=float,
        default=0.25,
        help="rank of the update relative to the matrix's shorter side",
    )
    add("--warmup-steps", type=int, default=0, help="first steps, all of them synchronized")
    most_help = (
        "synchronize after this many local steps in a row (default: the preset's, no bound with --tau)"
    )
    add("--max-local-steps", type=int, help=most_help)
    every_help = "ask the gate on every n-th step (default: where --max-local-steps says so, 1 with --tau)"
    add("--gate-every", type=int, help=every_help)
    lag_help = "1: local steps do not wait for the gate's answer, the next one reads it"
    add("--gate-lag", type=int, default=0, choices=OPTIMIZER_OPTIONS["gate_lag"].choices, help=lag_help)
    add("--lr", type=float, default=0.02, help="peak learning rate of matrices")
    add("--adamw-lr", type=float, default=6e-3, help="peak learning rate of embedding, head and norms")
    add("--momentum", type=float, help="mu (default: the preset's)")
    nesterov_help = "G + mu m for m, with --local-update muon or normuon (default: the preset's)"
    add("--nesterov", action=argparse.BooleanOptionalAction, help=nesterov_help)
    add("--weight-decay", type=float, default=0.01, help="decoupled weight decay")

    add = parser.add_argument_group("model and data").add_argument
    add("--dim", type=int, default=160, help="width of the model")
    add("--layers", type=int, default=4, help="number of blocks")
    add("--heads", type=int, default=5, help="attention heads")
    text_help = "file or folder to train on (default: the Python standard library's own source)"
    add("--text", type=Path, help=text_help)
    add("--max-text", type=int, default=8_000_000, help="bytes of it that are read at most, evenly spread")
    add("--seq", type=int, default=128, help="bytes in a sequence")
    add("--batch", type=int, default=8, help="sequences on each rank in each step")

    add = parser.add_argument_group("run").add_argument
    add("--steps", type=int, default=300, help="length of the run and of its learning rate schedule")
    add("--seed", type=int, default=0, help="fixes initial weights and batches")
    replicas_help = (
        "copies of the model (default: one a machine, on a single one 2, or a process each if these are odd)"
    )
    add("--replicas", type=int, help=replicas_help)
    add(
        "--eval-every",
        type=int,
        default=100,
        help="steps between evaluations on held-out text; 0: first and last only",
    )
    add("--eval-bytes", type=int, default=32768, help="held-out bytes in an evaluation")
    add(
        "--layers-every",
        type=int,
        default=10,
        help="steps between lines with the RMMC of every matrix; 0: none",
    )
    add("--out", type=Path, help="folder for the run's files (default: runs/ and the optimizer's name)")
    add("--checkpoint", type=Path, help="folder to save to, at the end and every --checkpoint-every steps")
    add("--checkpoint-every", type=int, default=0, help="steps between checkpoints; 0: only at the end")
    async_help = (
        "save every --checkpoint-every steps while training goes on, and without a synchronization: what all "
        "replicas were equal in last; --consensus outer, or average with --max-local-steps 0"
    )
    add("--save-async", action="store_true", help=async_help)
    add("--resume", action="store_true", help="go on from the newest checkpoint that can be loaded, or start")
    add("--compile", action="store_true", help="torch.compile each block")
    timeout_help = (
        "seconds after which a collective gives up on a rank that does not come, on all meshes; longer than "
        "anything that one rank does alone"
    )
    add("--timeout", type=float, default=300.0, help=timeout_help)
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint, the folder to resume from")
    if not args.timeout > 0:
        parser.error(f"--timeout must be positive, in seconds; got {args.timeout:g}")
    args.options = options_of(args)
    name = args.optimizer if args.optimizer != "curvadion" else f"curvadion-{args.options['local_update']}"
    args.out = args.out or Path("runs") / name
    return args


def start(replicas: int | None, timeout: float) -> tuple[torch.device, DeviceMesh]:
    """Set up this process's device and the mesh: replicas, CurvaDion's axis, times shards, FSDP2's own."""
    if "RANK" not in os.environ:
        raise SystemExit(f"start this with torchrun, for example: torchrun --nproc-per-node 4 {__file__}")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu")
    if accelerator is not None and accelerator.type != "mps":  # which has no collectives
        device = torch.device(accelerator.type, int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.accelerator.device_count():
            raise SystemExit(
                f"each process needs its own device; this machine has {torch.accelerator.device_count()}, so "
                f"start torchrun with --nproc-per-node {torch.accelerator.device_count()}"
            )
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        device_id=None if device.type == "cpu" else device,
        timeout=timedelta(seconds=timeout),
    )
    world = dist.get_world_size()
    machines = world // int(os.environ["LOCAL_WORLD_SIZE"])
    replicas = replicas or (machines if machines > 1 else 2 if world % 2 == 0 else world)
    if world % replicas:
        raise SystemExit(f"--replicas must divide the number of processes, got {replicas} and {world}")
    # Neighbouring ranks share a replica, so that shards stay within a machine.
    return device, init_device_mesh(
        device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard")
    )


def build_model(args: argparse.Namespace, device: torch.device, mesh: DeviceMesh) -> GPT:
    # All ranks draw the same weights before sharding: replicas must start equal, and shards of a CPU mesh
    # that are initialized afterwards would all get the same rows.
    torch.manual_seed(args.seed)
    model = GPT(dim=args.dim, layers=args.layers, heads=args.heads, max_seq=args.seq).to(device)
    policy = MixedPrecisionPolicy()
    if device.type != "cpu":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.layers:
        if args.compile:
            block.compile()
        fully_shard(block, mesh=mesh["shard"], mp_policy=policy)
    return fully_shard(model, mesh=mesh["shard"], mp_policy=policy)  # FSDP2 never sees the replicate axis


def build_optimizer(args: argparse.Namespace, model: nn.Module, mesh: DeviceMesh) -> CurvaDion:
    everything = {"": "adamw"} if args.optimizer == "adamw" else None
    return CurvaDion(
        param_groups_for(model, adamw_lr=args.adamw_lr, overrides=everything),
        lr=args.lr,
        replicate_mesh=mesh["replicate"],
        warmup_steps=args.warmup_steps,
        target_sync_rate=args.target_sync_rate,
        gate_lag=args.gate_lag,
        local_lr_scale=args.local_lr_scale,
        **args.options,
        rank_fraction=args.rank_fraction,
        weight_decay=args.weight_decay,
    )


def learning_rate(step: int, steps: int, decay: float = 1.0, end: float = 0.1) -> float:
    """Rise over the first 5 % of the run, then fall linearly to `end` of the peak, over the last `decay` of
    the steps that are left."""
    warmup = max(1, steps // 20)
    falling = decay * (steps - warmup)
    fallen = max(0, step - (steps - falling)) / max(1, falling)
    return min((step + 1) / warmup, 1 - (1 - end) * fallen)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device) -> Tensor:
    logits = model(inputs.to(device))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.to(device).flatten())


@torch.no_grad()
def evaluate(
    model: nn.Module, opt: CurvaDion, batches: list[tuple[Tensor, Tensor]], device: torch.device
) -> float:
    """Return the held-out loss, in nats a byte, of the one model that all replicas average to."""
    with opt.consensus():
        loss = torch.stack([loss_of(model, x, y, device) for x, y in batches]).mean()
    dist.all_reduce(loss, op=dist.ReduceOp.SUM)
    return loss.item() / dist.get_world_size()


def sum_over_shards(
    loss: Tensor, metrics: dict[str, float], drift: tuple[float, float] | None, mesh: DeviceMesh
) -> tuple[float, dict[str, float], float | None]:
    """Return this replica's loss, the metrics with byte counts summed over its ranks, and its drift.

    Crosses no replica axis.
    """
    counts = [key for key in metrics if "bytes" in key or "wire" in key]
    values = torch.tensor(
        [0.0, *(drift or (0.0, 0.0)), *(metrics[key] for key in counts)],
        dtype=torch.float64,
        device=loss.device,
    )
    values[0] = loss / mesh["shard"].size()
    dist.all_reduce(values, group=mesh["shard"].get_group())
    mean_loss, own, common, *sums = values.tolist()
    return (
        mean_loss,
        metrics | dict(zip(counts, sums, strict=True)),
        (own / common) ** 0.5 if common else None,
    )


def save(folder: Path, step: int, model: nn.Module, opt: CurvaDion, schedule: LambdaLR) -> None:
    opt.synchronize()  # replicas become one again; a checkpoint of several would be a patchwork
    model_state, opt_state = get_state_dict(model, opt)
    state = {"model": model_state, "optimizer": opt_state, "step": step, "schedule": schedule.state_dict()}
    dcp.save(state, checkpoint_id=place_for(folder, step))


class AsyncSaver:
    """Saves what all replicas hold alike while training goes on; one save at a time."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")  # the save's own: training sends meanwhile
        self.under_way: Future[Any] | None = None

    def save(self, folder: Path, step: int, model: nn.Module, opt: CurvaDion, schedule: LambdaLR) -> None:
        self.wait()
        with opt.common_state():  # parameters are X_0 inside; the run does not notice
            model_state, opt_state = get_state_dict(model, opt)
            state = {"model": model_state, "optimizer": opt_state}
            state |= {"step": step, "schedule": schedule.state_dict()}
            path = place_for(folder, step)
            self.under_way = dcp.async_save(state, checkpoint_id=path, process_group=self.group)

    def wait(self) -> None:
        """Wait for the save under way; raises what it met."""
        if self.under_way is not None:
            self.under_way.result()
            self.under_way = None


def place_for(folder: Path, step: int) -> Path:
    """Return the folder of a checkpoint; one there that was passed over no longer counts as complete."""
    path = folder / f"step-{step}"
    if dist.get_rank() == 0:  # which lets the others write, and writes .metadata last
        (path / ".metadata").unlink(missing_ok=True)
    return path


def load_last(folder: Path, model: nn.Module, opt: CurvaDion, schedule: LambdaLR) -> int:
    """Load the newest checkpoint that can be read, and return its step; 0 if there is none yet."""

    def load_one(step: int) -> None:
        load(folder / f"step-{step}", model, opt, schedule)

    step = load_newest(saved_steps(folder), load_one, opt.loading, partial(print, flush=True))
    if step is None and dist.get_rank() == 0:
        print(f"--resume found no checkpoint in {folder}; starts from the beginning", flush=True)
    return step or 0


def load(folder: Path, model: nn.Module, opt: CurvaDion, schedule: LambdaLR) -> None:
    model_state, opt_state = get_state_dict(model, opt)
    state = {"model": model_state, "optimizer": opt_state, "step": 0, "schedule": schedule.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    schedule.load_state_dict(state["schedule"])


@record
def main() -> None:
    args = parse_args()
    device, mesh = start(args.replicas, args.timeout)
    try:
        train(args, device, mesh)
    except KeyboardInterrupt:  # which torchrun hands to every rank
        if dist.get_rank() == 0:
            print("interrupted; --resume goes on from the newest checkpoint in --checkpoint", flush=True)
        os._exit(130)  # at once: what takes groups down would wait for ranks that are gone
    dist.barrier()  # rank 0 writes the report; a rank that leaves meanwhile takes its connections with it
    dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device, mesh: DeviceMesh) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    text = ByteText(args.text, max_bytes=args.max_text)
    held_out = text.held_out_batches(
        tokens=args.eval_bytes, batch=args.batch, seq=args.seq, rank=rank, ranks=ranks
    )
    model = build_model(args, device, mesh)
    opt = build_optimizer(args, model, mesh)
    schedule = LambdaLR(opt, lambda step: learning_rate(step, args.steps))
    first = load_last(args.checkpoint, model, opt, schedule) if args.resume else 0
    if args.save_async and not opt.keeps_common_state:
        got = args.options.get("consensus")
        raise SystemExit(f"--save-async needs --consensus outer, or --max-local-steps 0; got {got}")
    saver = AsyncSaver() if args.checkpoint and args.save_async else None

    summary = {
        "arguments": {
            k: str(v) if isinstance(v, Path) or v == float("inf") else v
            for k, v in (vars(args) | args.options).items()
            if k != "options"
        },
        "replicas": mesh["replicate"].size(),
        "shards": mesh["shard"].size(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": text.name,
        "hardware": hardware(device, Path(__file__).parent),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "held_out": [],
    }
    tau = args.options["tau"]
    display = (
        Display(args.out, steps=args.steps, tau=tau, start=first, summary=summary) if rank == 0 else None
    )

    def held_out_loss(step: int) -> None:
        loss = evaluate(model, opt, held_out, device)
        if display is not None:
            display.held_out(step, loss)

    with closing(display) if display is not None else nullcontext():  # which gives the cursor back
        held_out_loss(first)
        for step in range(first + 1, args.steps + 1):
            began = time.perf_counter()
            inputs, targets = text.batch(batch=args.batch, seq=args.seq, seed=args.seed, rank=rank, step=step)
            loss = loss_of(model, inputs, targets, device)
            loss.backward()
            lr = schedule.get_last_lr()[0]
            opt.step()
            schedule.step()
            opt.zero_grad()

            metrics = opt.metrics()
            apart = opt.drift() if metrics["curvadion/synchronized"] else None
            replica_loss, metrics, drift = sum_over_shards(loss.detach(), metrics, apart, mesh)
            seconds = time.perf_counter() - began
            if display is not None:
                index = int(metrics["curvadion/rmmc_argmax"])
                matrix = opt.matrix_names[index] if index >= 0 else None
                tokens = args.batch * args.seq * ranks
                rmmc = opt.named_rmmc() if args.layers_every and step % args.layers_every == 0 else None
                seen = {
                    "lr": lr,
                    "tokens": tokens,
                    "seconds": seconds,
                    "matrix": matrix,
                    "rmmc": rmmc,
                    "drift": drift,
                }
                display.step(step, loss=replica_loss, metrics=metrics, **seen)
            if step == args.steps or (args.eval_every and step % args.eval_every == 0):
                held_out_loss(step)
            due = args.checkpoint_every and step % args.checkpoint_every == 0
            if args.checkpoint and step == args.steps:
                if saver is not None:
                    saver.wait()
                save(args.checkpoint, step, model, opt, schedule)
            elif args.checkpoint and due:
                (saver.save if saver is not None else save)(args.checkpoint, step, model, opt, schedule)

    if display is not None:
        write_report([args.out])


if __name__ == "__main__":
    main()
