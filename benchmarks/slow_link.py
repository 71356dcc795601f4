"""Measure training steps of replicas at different sites over emulated slow links, and the bytes that cross.

    sudo python benchmarks/slow_link.py                        # default grid, under 8 minutes on 2 cores
    sudo python benchmarks/slow_link.py --full --json FILE     # every combination of SITES, MBIT and DELAY_MS
    sudo python benchmarks/slow_link.py --sites 2 --mbit 100,none --delay-ms 40 --settings dense,curvadion
    python benchmarks/slow_link.py --model                     # no root: a cost model of the same links

One rank a site, each a replica of the same small GPT on a CPU, gloo over TCP over `netlab.py`'s wire.
Settings take turns on every link. Local and synchronized steps are timed apart: a setting that synchronizes
after H - 1 local steps is measured with LOCAL_STEPS of them, and

    seconds_per_step = ((H - 1) seconds_local + seconds_synchronized) / H

from the medians, and so for bytes. A setting with outer_delay takes whole intervals, and has the median of
their means in place of seconds_synchronized. `compute_seconds` is forward and backward in these very steps:
all sites share this machine's cores, at a raised priority, so that other work on the machine disturbs them
less; where it differs between settings, it did, and a note says so.

Bytes per site and step, from three counts: what TCP carried (`wire_bytes_per_step`), the same with IP and TCP
headers, and acknowledgements (`packet_bytes_per_step`), and what CurvaDion's ledger says
(`ledger_bytes_per_step`). gloo puts 48 bytes before each of its messages, which only the gate notices: its 8
bytes are 152 between 2 sites.

What to know about gloo: it all-reduces in a ring, whatever the size, in 2 segments a rank or more, of at most
1 MiB, two at a time, and sends a segment only when the receiver has said that it waits for it. An all-reduce
of k ranks and S segments so takes 2 S (k - 1) / k times the one-way delay beside the time for its bytes, and
with 40 ms no link carries more than 2 MiB in 80 ms one way, 210 Mbit/s. Only a single element, the gate's,
goes round in 2 (k - 1) delays.

The cost model: seconds measured without a link (k processes, loopback), and for each collective its wire
bytes at the link's rate and its delays as above. It knows no slow start, no loss and no acknowledgements. Its
lines say "cost model", the others "emulated".
"""

import argparse
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import netlab
import torch
from timing import ROOT, describe_run, names, spread

from curvadion import LOW_COMMUNICATION
from curvadion.projection import formulas

# What is measured. "overrides" goes to param_groups_for, the rest to CurvaDion. The gate must follow the
# schedule alone (tau=inf), so that local and synchronized steps can be timed apart.
SETTINGS: dict[str, dict[str, Any]] = {
    # bfloat16 gradients all-reduced in each step
    "dense": {"overrides": {"": "adamw"}, "max_local_steps": 0, "payload_dtype": torch.bfloat16},
    # Dion in each step
    "dion": {"max_local_steps": 0, "payload_dtype": torch.bfloat16},
    # local Dion steps, parameters and moments averaged in float32 in every 30th
    "average": {"local_update": "dion", "tau": math.inf, "max_local_steps": 29},
    # the recommended settings: one bit per parameter in every 8th step, nothing in between
    "curvadion": dict(LOW_COMMUNICATION),
    # the same, each synchronization under way for 4 steps
    "under way": {**LOW_COMMUNICATION, "outer_delay": 4},
}

SITES, MBIT, DELAY_MS = (2, 4), (100.0, 300.0, 1000.0, None), (0.0, 10.0, 40.0)
FEW_MBIT, FEW_DELAY_MS = (100.0, 1000.0), (0.0, 40.0)  # of 4 sites, without --full
LOCAL_STEPS = 3  # between synchronized ones, where they are measured
SYNCHRONOUS_STEPS = 2  # in a turn of a setting that always synchronizes
SEGMENT = 1 << 20  # gloo's largest
STEADY = 1.2  # the same forward and backward may take so much longer under one setting than under another

Link = tuple[float | None, float]  # mbit, delay_ms


class Message(NamedTuple):
    """One collective: its kind, the bytes of the buffer, and those that leave a rank for it."""

    collective: str
    buffer: int
    wire: float


# ---- settings


def interval_of(name: str) -> int:
    """Return how many steps there are from one synchronized step to the next."""
    options = SETTINGS[name]
    local = options.get("max_local_steps")
    if local is None or (local > 0 and options.get("tau") != math.inf):
        raise SystemExit(
            f"a setting must synchronize by the schedule alone; got {options} for {name!r}; "
            "set tau=inf and max_local_steps"
        )
    return local + 1


def overlaps(name: str) -> bool:
    """Say whether a synchronization goes on during later steps, so that no step can be timed apart."""
    return SETTINGS[name].get("outer_delay", 0) > 0


def turn_of(name: str) -> list[int]:
    """Return the numbers of steps in the parts of a setting's turn; all but the last are of local steps."""
    if overlaps(name):
        return [interval_of(name)]
    return [LOCAL_STEPS, 1] if interval_of(name) > 1 else [SYNCHRONOUS_STEPS]


def at_interval(local: float | None, synchronized: float, interval: int) -> float:
    """Return the mean over one synchronized step and the local ones before it."""
    return synchronized if local is None else ((interval - 1) * local + synchronized) / interval


# ---- cost model

# Time for bytes and trips over a link is that of `curvadion.projection`. The number of trips differs on
# purpose: there it is an ideal ring's or recursive doubling's, here gloo's, with which links are measured.


def delays(collective: str, ranks: int, nbytes: int) -> int:
    """Return how many one-way delays a collective of gloo's takes (see the module's text)."""
    if collective == "broadcast":  # binomial tree; the receiver speaks first
        return 2 * math.ceil(math.log2(ranks))
    if collective == "all_to_all":  # everybody with everybody at once
        return 2
    if collective == "all_gather":
        return 2 * (ranks - 1)
    if nbytes <= 8:
        return 2 * (ranks - 1)
    segments = max(2, math.ceil(nbytes / SEGMENT / ranks)) * ranks
    return 2 * segments * (ranks - 1) // ranks


def link_seconds(messages: Sequence[Message], ranks: int, mbit: float | None, delay_ms: float) -> float:
    """Return what a link adds to a step that sends these messages one after the other."""
    wire = sum(message.wire for message in messages)
    waits = sum(delays(message.collective, ranks, message.buffer) for message in messages)
    return formulas.link_seconds(wire, mbit / 1e3 if mbit else math.inf, waits, delay_ms / 1e3)


# ---- one rank


class Training:
    """A replica under one setting: its own model and optimizer, random tokens."""

    def __init__(self, name: str, arguments: argparse.Namespace, group: Any):
        from gpt import GPT
        from torch import distributed as dist

        from curvadion import CurvaDion, param_groups_for

        torch.manual_seed(0)  # replicas start equal
        self.model = GPT(
            dim=arguments.dim,
            layers=arguments.layers,
            heads=max(1, arguments.dim // 32),
            max_seq=arguments.seq,
        )
        options = dict(SETTINGS[name])
        if options["max_local_steps"] and not overlaps(name):
            options["max_local_steps"] = LOCAL_STEPS
            if "gate_every" in options:
                options["gate_every"] = LOCAL_STEPS + 1
        groups = param_groups_for(self.model, overrides=options.pop("overrides", None))
        self.optimizer = CurvaDion(groups, replicate_mesh=group, **options)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.shape = (arguments.batch, arguments.seq + 1)
        self.tokens = torch.Generator().manual_seed(1 + dist.get_rank())
        self.messages: list[Message] = []
        self._record = self.optimizer.ledger.record
        self.optimizer.ledger.record = self._overhear  # type: ignore[method-assign]

    def _overhear(self, collective: str, ranks: int, axis: str, purpose: str, nbytes: int) -> None:
        before = self._sent()
        self._record(collective, ranks, axis, purpose, nbytes)
        if axis == "replicate":
            self.messages.append(Message(collective, nbytes, self._sent() - before))

    def _sent(self) -> float:
        return sum(nbytes for (axis, _), nbytes in self.optimizer.ledger.wire.items() if axis == "replicate")

    def step(self) -> dict[str, Any]:
        """Take a step and return what it took."""
        batch = torch.randint(256, self.shape, generator=self.tokens)
        self.messages.clear()
        sent, begin = self._sent(), time.perf_counter()
        logits = self.model(batch[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        computed = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "seconds": time.perf_counter() - begin,
            "compute": computed - begin,
            "synchronized": bool(self.optimizer.metrics()["curvadion/synchronized"]),
            "ledger": self._sent() - sent,
            "messages": list(self.messages),
        }


def rank_main(arguments: argparse.Namespace) -> None:
    """Take steps as told on stdin, a JSON line each time; say what they took on stdout."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    with suppress(PermissionError):  # without root, which the cost model does not need
        os.nice(-5)
    dist.init_process_group("gloo")
    trainings: dict[str, Training] = {}
    for line in sys.stdin:
        name, count = json.loads(line)
        if name is None:
            group = dist.new_group()
            trainings = {name: Training(name, arguments, group) for name in arguments.settings}
            for name, training in trainings.items():
                for _ in range(
                    interval_of(name) if overlaps(name) else 1
                ):  # the first one is always synchronized
                    training.step()
            answer: Any = next(iter(trainings.values())).parameters
        else:
            answer = [trainings[name].step() for _ in range(count)]
        print(json.dumps(answer), flush=True)


# ---- all ranks


class Ranks:
    """The processes, one a site; they step together."""

    def __init__(self, processes: list[subprocess.Popen]):
        self.processes = processes

    def _ask(self, name: str | None, count: int) -> list[Any]:
        for process in self.processes:
            process.stdin.write(json.dumps([name, count]) + "\n")
            process.stdin.flush()
        answers = []
        for site, process in enumerate(self.processes):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(
                    f"the process of site {site} ended early, exit code {process.wait()}; "
                    "its messages are above"
                )
            answers.append(json.loads(line))
        return answers

    def connect(self) -> int:
        """Begin anew, with new connections, as TCP remembers its link. Returns the number of parameters."""
        return self._ask(None, 0)[0]

    def steps(self, name: str, count: int) -> list[list[dict[str, Any]]]:
        """Take so many steps; return what they took, by site."""
        return self._ask(name, count)


@contextmanager
def ranks_of(sites: int, arguments: argparse.Namespace, lab: netlab.Lab | None) -> Iterator[Ranks]:
    """Start the ranks, in the lab's sites or on this machine's loopback."""
    sizes = [f"--{key}={getattr(arguments, key)}" for key in ("dim", "layers", "batch", "seq")]
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--rank",
        f"--settings={','.join(arguments.settings)}",
        *sizes,
    ]
    folders = [ROOT / "scripts", ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders if str(folder)),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # which would complain of names that no server resolves
    }
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = []
    try:
        if lab is None:
            with socket.create_server(("127.0.0.1", 0)) as server:
                environment |= {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(server.getsockname()[1]),
                    "WORLD_SIZE": str(sites),
                }
        for site in range(sites):
            if lab is not None:
                processes.append(lab.start(site, command, env=environment, **pipes))
            else:
                processes.append(
                    subprocess.Popen(command, env={**os.environ, **environment, "RANK": str(site)}, **pipes)
                )
        yield Ranks(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Samples:
    """What the steps of one kind, local or synchronized, of one setting took on one link."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.compute: list[float] = []
        self.ledger: list[float] = []  # these three by step, means over the sites
        self.payload = self.packets = 0.0  # sums over the steps, means over the sites
        self.messages: list[Message] = []

    def add(self, steps: list[list[dict[str, Any]]], crossed: netlab.Counts | None, each: int = 1) -> None:
        """Add steps, by site, and what crossed the wire meanwhile; each stands for so many."""
        sites = len(steps)
        for together in zip(*steps, strict=True):
            self.seconds.append(sum(step["seconds"] for step in together) / sites)
            self.compute.append(sum(step["compute"] for step in together) / sites)
            self.ledger.append(sum(step["ledger"] for step in together) / sites)
            self.messages = [Message(*message) for message in together[0]["messages"]]
        if crossed is not None:
            self.payload += sum(map(sum, crossed.payload)) / sites / each
            self.packets += sum(map(sum, crossed.bytes)) / sites / each

    def mean(self, quantity: str) -> float:
        """Return the mean over the steps of "ledger", "payload" or "packets"."""
        total = getattr(self, quantity)
        return (sum(total) if isinstance(total, list) else total) / len(self.seconds)


def mean_step(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one step in place of several: means."""
    means = {key: sum(step[key] for step in steps) / len(steps) for key in ("seconds", "compute", "ledger")}
    return {**means, "messages": [message for step in steps for message in step["messages"]]}


Kinds = dict[str, Samples]  # "local" (of gated settings only) and "synchronized"


def measure(
    ranks: Ranks, settings: Sequence[str], rounds: int, counts: Callable[[], netlab.Counts | None]
) -> dict[str, Kinds]:
    """Let the settings take turns; return their samples."""
    found: dict[str, Kinds] = {name: {} for name in settings}
    for _ in range(rounds):
        for name in settings:
            parts = turn_of(name)
            for part, count in enumerate(parts):
                kind = "synchronized" if part == len(parts) - 1 else "local"
                before = counts()
                steps = ranks.steps(name, count)
                after = counts()
                expected = [
                    kind == "synchronized" and (number == 0 or not overlaps(name)) for number in range(count)
                ]
                if [step["synchronized"] for step in steps[0]] != expected:
                    raise RuntimeError(
                        f"setting {name!r} took another branch than its schedule says; set tau=inf in it"
                    )
                crossed = after - before if after is not None and before is not None else None
                whole = [[mean_step(of_site)] for of_site in steps] if overlaps(name) else steps
                found[name].setdefault(kind, Samples()).add(whole, crossed, count if overlaps(name) else 1)
    return found


# ---- results


def result(
    name: str, kinds: Kinds, label: str, sites: int, link: Link, dropped: int | None
) -> dict[str, Any]:
    """Return the row of one setting on one link."""
    mbit, delay_ms = link
    local, synchronized = kinds.get("local"), kinds["synchronized"]
    interval = interval_of(name)
    emulated = label == "emulated"

    def seconds(samples: Samples | None) -> dict[str, float] | None:
        if samples is None:
            return None
        added = 0.0 if emulated else link_seconds(samples.messages, sites, mbit, delay_ms)
        return spread([second + added for second in samples.seconds])

    def mean(quantity: str) -> float:
        return at_interval(local.mean(quantity) if local else None, synchronized.mean(quantity), interval)

    seconds_local, seconds_synchronized = seconds(local), seconds(synchronized)
    compute = spread([second for samples in kinds.values() for second in samples.compute])
    assert seconds_synchronized is not None and compute is not None
    return {
        "label": label,
        "sites": sites,
        "mbit": mbit,
        "delay_ms": delay_ms,
        "setting": name,
        "options": {key: str(value) for key, value in SETTINGS[name].items()},
        "interval": interval,
        "seconds_local": seconds_local,
        "seconds_synchronized": seconds_synchronized,
        "seconds_per_step": at_interval(
            seconds_local and seconds_local["median"], seconds_synchronized["median"], interval
        ),
        "compute_seconds": compute["median"],
        "wire_bytes_per_step": mean("payload") if emulated else None,
        "packet_bytes_per_step": mean("packets") if emulated else None,
        "ledger_bytes_per_step": mean("ledger"),
        "packets_dropped": dropped,
        "steps": sum(len(samples.seconds) for samples in kinds.values()),
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        raise SystemExit(
            "the table is drawn with rich, which is missing: pip install 'curvadion[report]'"
        ) from None
    table = Table(
        title=f"seconds a step, {rows[0]['label']} links; "
        "local and synchronized: median (10th to 90th percentile)"
    )
    for heading in (
        "sites",
        "Mbit/s",
        "ms",
        "setting",
        "every",
        "local",
        "synchronized",
        "per step",
        "dense /",
        "compute",
    ):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for heading in ("ledger kB", "wire kB", "wire / ledger", "with headers"):
        table.add_column(heading, justify="right")
    dense = {
        (row["sites"], row["mbit"], row["delay_ms"]): row["seconds_per_step"]
        for row in rows
        if row["setting"] == "dense"
    }

    def timing(value: dict[str, float] | None) -> str:
        return "" if value is None else f"{value['median']:.3f} ({value['p10']:.3f} to {value['p90']:.3f})"

    for before, row in zip([None, *rows], rows, strict=False):
        link = (row["sites"], row["mbit"], row["delay_ms"])
        if before is not None and link != (before["sites"], before["mbit"], before["delay_ms"]):
            table.add_section()
        ledger, wire = row["ledger_bytes_per_step"], row["wire_bytes_per_step"]
        table.add_row(
            str(row["sites"]),
            f"{row['mbit']:g}" if row["mbit"] else "unlimited",
            f"{row['delay_ms']:g}",
            row["setting"],
            str(row["interval"]),
            timing(row["seconds_local"]),
            timing(row["seconds_synchronized"]),
            f"{row['seconds_per_step']:.3f}",
            f"{dense[link] / row['seconds_per_step']:.2f}" if link in dense else "",
            f"{row['compute_seconds']:.3f}",
            f"{ledger / 1e3:.1f}",
            f"{wire / 1e3:.1f}" if wire is not None else "",
            f"{wire / ledger:.4f}" if wire is not None else "",
            f"{row['packet_bytes_per_step'] / ledger:.4f}" if wire is not None else "",
        )
    computes: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        computes.setdefault((row["sites"], row["mbit"], row["delay_ms"]), []).append(row["compute_seconds"])
    disturbed = [link for link, seconds in computes.items() if max(seconds) > STEADY * min(seconds)]
    # A table for people is as wide as it must be, also in a file.
    console = Console()
    Console(width=max(console.width, 190)).print(table)
    for sites, mbit, delay_ms in disturbed:
        link = f"{sites} sites, {mbit or 'unlimited'} Mbit/s, {delay_ms:g} ms"
        print(
            f"{link}: compute differs by more than {STEADY - 1:.0%} between settings; "
            "other work disturbed it, so measure it again"
        )


def numbers(text: str, option: str) -> list[float | None]:
    """Split a comma-separated list of numbers; "none" is None."""
    try:
        return [None if part.strip() == "none" else float(part) for part in text.split(",")]
    except ValueError:
        raise SystemExit(
            f"{option} must be numbers with commas between them, none for unlimited; got {text!r}"
        ) from None


def parse_arguments() -> argparse.Namespace:
    """Return the checked arguments, with `links` by number of sites."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="store_true", help="compute with a cost model what a link adds; needs no root"
    )
    parser.add_argument(
        "--full", action="store_true", help="every combination; without it 4 sites have fewer links"
    )
    parser.add_argument("--sites", help=f"comma-separated; none: {','.join(map(str, SITES))}")
    parser.add_argument(
        "--mbit", help="comma-separated rates of a site's uplink, 10^6 bit/s; none for unlimited"
    )
    parser.add_argument("--delay-ms", help="comma-separated one-way delays")
    parser.add_argument("--settings", help=f"comma-separated, of {', '.join(SETTINGS)}; none: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every setting on every link")
    parser.add_argument("--dim", type=int, default=160, help="width of the model, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model")
    parser.add_argument("--batch", type=int, default=4, help="sequences a site and step")
    parser.add_argument("--seq", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--json", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--commit", help="what to note as the commit; none: ask git")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    netlab.add_link_arguments(parser)
    parser.set_defaults(seed=0, interpret=False)
    arguments = parser.parse_args()
    known = tuple(
        name for name in SETTINGS if not (arguments.model and overlaps(name))
    )  # a sum of seconds knows no overlap
    arguments.settings = names(arguments.settings, known, known, "--settings")
    for name in arguments.settings:
        interval_of(name)
    if arguments.rounds < 1:
        raise SystemExit(f"--rounds must be positive; got {arguments.rounds}")
    if arguments.dim < 32 or arguments.dim % 32:
        raise SystemExit(f"--dim must be a multiple of 32, the width of a head; got {arguments.dim}")
    sites = numbers(arguments.sites or ",".join(map(str, SITES)), "--sites")
    arguments.links = {}
    for count in sites:
        if count not in (2, 3, 4):
            raise SystemExit(f"--sites must be of 2, 3, 4; got {arguments.sites}")
        few = count == 4 and not arguments.full
        rates = numbers(arguments.mbit, "--mbit") if arguments.mbit else list(FEW_MBIT if few else MBIT)
        waits = (
            numbers(arguments.delay_ms, "--delay-ms")
            if arguments.delay_ms
            else list(FEW_DELAY_MS if few else DELAY_MS)
        )
        if None in waits or any(wait < 0 for wait in waits if wait is not None):
            raise SystemExit(f"--delay-ms must be 0 or more; got {arguments.delay_ms}")
        if any(rate is not None and rate <= 0 for rate in rates):
            raise SystemExit(f"--mbit must be positive, or none for unlimited; got {arguments.mbit}")
        arguments.links[int(count)] = [(rate, wait) for wait in waits for rate in rates]
    return arguments


def run_sites(sites: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of all links between so many sites."""
    with ExitStack() as stack:
        lab = (
            None
            if arguments.model
            else stack.enter_context(netlab.Lab(sites, **netlab.link_options(arguments)))
        )
        ranks = stack.enter_context(ranks_of(sites, arguments, lab))
        measured: dict[str, Kinds] = {}
        for mbit, delay_ms in arguments.links[sites]:
            dropped, label = None, "cost model"
            if lab is not None:
                lab.wire.mbit, lab.wire.delay_ms, label = mbit, delay_ms, "emulated"
            if lab is not None or not measured:
                parameters = ranks.connect()
                before = lab.wire.counts() if lab is not None else None
                measured = measure(
                    ranks,
                    arguments.settings,
                    arguments.rounds,
                    lab.wire.counts if lab is not None else lambda: None,
                )
            if lab is not None and before is not None:
                lab.check()
                dropped = (lab.wire.counts() - before).dropped
            sizes = {"parameters": parameters, "tokens_per_step": sites * arguments.batch * arguments.seq}
            for name in arguments.settings:
                yield result(name, measured[name], label, sites, (mbit, delay_ms), dropped) | sizes


def main() -> None:
    """Measure, or compute, every link."""
    arguments = parse_arguments()
    if arguments.rank:
        rank_main(arguments)
        return
    reason = None if arguments.model else netlab.why_not()
    if reason:
        raise SystemExit(f"{reason}; or --model, a cost model that needs none of this")
    netlab.leave_on_sigterm()
    described = describe_run(arguments, torch.device("cpu"))
    run = {key: described[key] for key in ("torch", "python", "commit", "date", "command")}
    run["hardware"] = f"{platform.machine()} CPU, {os.cpu_count()} cores for all sites, one thread each"
    if not arguments.model:
        run["congestion_control"] = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    rows = []
    try:
        for sites in arguments.links:
            for row in run_sites(sites, arguments):
                rows.append(row | run)
                link = f"{sites} sites, {row['mbit'] or 'unlimited'} Mbit/s, {row['delay_ms']:g} ms"
                print(
                    f"{row['label']}: {link}, {row['setting']}: {row['seconds_per_step']:.3f} s a step",
                    flush=True,
                )
                if arguments.json:
                    with arguments.json.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if rows:
            show(rows)


if __name__ == "__main__":
    main()
