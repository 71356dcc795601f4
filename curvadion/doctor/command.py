"""What `curvadion doctor` does, on every rank."""

import argparse
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from curvadion.doctor import machine
from curvadion.doctor.findings import FAULT, FINE, WARNING, Finding, bad, show
from curvadion.doctor.trial import (
    Steps,
    called,
    options_of,
    refusal,
    stand_in,
    warnings_of,
)
from curvadion.optimizer import CurvaDion
from curvadion.projection import add_arguments
from curvadion.projection.command import Case
from curvadion.projection.formulas import PAYLOADS
from curvadion.sharding.group import gather
from curvadion.sharding.survey import measure, timeout_of

LARGE = 16 * 2**20  # bytes of the all-reduce by which bandwidth is measured


def run(args: argparse.Namespace) -> int:
    """Run `curvadion doctor`; return 1 if something would not work."""
    device = machine.device_of(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(device, args.timeout):
        for look in (look_at_ranks, look_at_links, look_at_steps):
            findings: list[Finding] = []
            with warnings_of(findings):
                try:
                    look(args, device, findings)
                except Exception as error:  # whatever it is: other ranks are told, rather than left waiting
                    findings.append(refusal(error))
            by_rank = gather(findings)
            if not dist.is_initialized() or dist.get_rank() == 0:
                show(by_rank)
            if bad(by_rank):
                return 1
    return 0


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """Have a process group inside where torchrun has started this process."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield
    finally:
        dist.destroy_process_group()


def replicas_of(args: argparse.Namespace, machines: int, ranks: int) -> int:
    """Return K.

    Raises ValueError if it does not divide the number of ranks.
    """
    replicas = args.replicas or (machines if machines > 1 else 2 - ranks % 2)
    if replicas < 1 or ranks % replicas:
        raise ValueError(f"--replicas must divide the {ranks} ranks; got {replicas}; try {1 + (ranks > 1)}")
    return replicas


def look_at_ranks(args: argparse.Namespace, device: torch.device, findings: list[Finding]) -> None:
    """Look at each rank by itself, and at what all must have in common."""
    findings += machine.look(device)
    mine = machine.versions(), device.type, socket.gethostname()
    versions, kinds, hosts = zip(*gather(mine), strict=True)
    for name in sorted({name for found in versions for name in found}):
        if len(different := {found.get(name, "none") for found in versions}) > 1:
            text = f"all ranks must have the same {name}; got {', '.join(sorted(different))}; install one"
            findings.append(Finding(FAULT, "versions", text))
    if len(set(kinds)) > 1:
        text = f"all ranks must have the same kind of device; got {', '.join(sorted(set(kinds)))}"
        findings.append(Finding(FAULT, "device", text))
    if not dist.is_initialized():
        text = "one process; under torchrun also ranks and links: torchrun ... -m curvadion doctor"
        return findings.append(Finding(FINE, "ranks", text))
    ranks, machines = len(hosts), len(set(hosts))
    replicas = replicas_of(args, machines, ranks)
    size = ranks // replicas
    where = f"{ranks} on {machines} machine{'s' * (machines > 1)}, {dist.get_backend()}"
    text = f"{where}: {replicas} replica{'s' * (replicas > 1)} of {size}"
    findings.append(Finding(FINE, "ranks", text))
    if any(len(set(hosts[i : i + size])) > 1 for i in range(0, ranks, size)):
        text = (
            "a replica is spread over machines: what its ranks tell each other, FSDP's traffic among it, "
            "crosses the link; number the ranks by machine, or take more replicas"
        )
        findings.append(Finding(WARNING, "ranks", text))


def look_at_links(args: argparse.Namespace, device: torch.device, findings: list[Finding]) -> None:
    """Measure the links between replicas and inside one."""
    if not dist.is_initialized():
        return
    ranks = dist.get_world_size()
    args.replicas = replicas_of(args, len(set(gather(socket.gethostname()))), ranks)
    mesh = init_device_mesh(
        device.type, (args.replicas, ranks // args.replicas), mesh_dim_names=("replicate", "shard")
    )
    args.gbit = args.rtt_ms = None
    for name, about in (("replicate", "between replicas"), ("shard", "inside a replica")):
        group = mesh.get_group(name)
        if group.size() == 1:
            continue
        latency, _ = measure(group, device, 8, 20)
        _, rate = measure(group, device, LARGE, 3)
        both = gather((latency, rate))
        latency, rate = max(t for t, _ in both), sum(rate for _, rate in both) / len(both)
        text = (
            f"8 bytes take {1e3 * latency:.3g} ms; {8 * rate / 1e9:.3g} Gbit/s leave each rank, all at once"
        )
        findings.append(Finding(FINE, about, text))
        if name == "replicate":
            args.gbit, args.rtt_ms = 8 * rate / 1e9 * mesh.size(1), 1e3 * latency
    # A group of one waits for nobody, and has torch's own timeout.
    groups = [group for name in ("replicate", "shard") if (group := mesh.get_group(name)).size() > 1]
    if waits := {str(timeout_of(group, device)) for group in groups}:
        text = f"groups of init_device_mesh wait {', '.join(sorted(waits))} for a rank"
        findings.append(Finding(FINE, "timeout", text))


def look_at_steps(args: argparse.Namespace, device: torch.device, findings: list[Finding]) -> None:
    """Build an optimizer, take steps, and project those of a larger model."""
    optimizer = built(args, device)
    if args.build:
        findings.append(Finding(FINE, "parameters", f"\n{optimizer.explain()}"))
    steps = Steps(optimizer)
    findings += steps.findings()
    if optimizer.replicas > 1 and args.gbit and not args.build:
        findings.append(projected(args, steps))


def built(args: argparse.Namespace, device: torch.device) -> CurvaDion:
    """Return the optimizer to try; all ranks have one, or all raise."""
    optimizer, failure = None, ""
    try:
        if args.build:
            optimizer = called(args.build)
        else:
            options = options_of(args.preset, args.set)
            sizes = {name: getattr(args, name) for name in ("dim", "ffn", "layers", "vocabulary")}
            optimizer = stand_in(device, args.replicas or 1, options, **sizes)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    failures = gather(failure)
    if optimizer is None or any(failures):
        raise RuntimeError(failure or f"another rank failed: {next(filter(None, failures))}")
    return optimizer


def projected(args: argparse.Namespace, steps: Steps) -> Finding:
    """Return what the formulas of `curvadion project` say of the model that was named, over the links as
    measured and at the interval as seen."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = options_of(args.preset, args.set)
    consensus = options.get("consensus", "average")
    payloads = f"{consensus}-{options.get('outer_bits', 32)}", consensus, "average"
    known = {
        "model": args.model,
        "replicas": args.replicas,
        "shards": dist.get_world_size() // args.replicas,
        "gbit": f"{args.gbit:.3g}",
        "nics": 1,
        "rtt-ms": f"{args.rtt_ms:.3g}",
        "interval": f"{steps.interval:g}",
        "gate-every": options.get("gate_every", 1),  # None: as seldom as synchronized steps
        "payload": next(name for name in payloads if name in PAYLOADS),
        "local-update": options.get("local_update", "gradient"),
        "compute-seconds": args.compute_seconds,
    }
    words = [w for name, v in known.items() if v is not None for w in (f"--{name}", str(v))]
    try:
        case = Case.of(parser.parse_args(words))
    except ValueError as error:  # a rule whose work has no formula is no fault of the run
        return Finding(FINE, "projected", f"nothing: {error}")
    dense, _, own = case.times(case.on(case.link))
    text = (
        f"{args.model}: {own:.3g} s a step, {dense:.3g} s with dense gradients; forward and backward "
        f"{case.compute:.3g} s of it ({case.how}); more: curvadion project {' '.join(words)}"
    )
    return Finding(FINE, "projected", text)
