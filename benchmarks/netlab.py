r"""Emulate 2 to 4 sites joined by slow links on one Linux machine, and count what crosses them.

    sudo python benchmarks/netlab.py run --sites 2 --mbit 200 --delay-ms 20 -- \
        python scripts/train.py --steps 50
    sudo python benchmarks/netlab.py clean      # namespaces that a killed run left behind

`run` starts the command once in each site with what torch.distributed and gloo want to find in the
environment. From Python:

    with Lab(2, mbit=200, delay_ms=20) as lab:
        processes = [lab.start(site, command) for site in range(2)]
        ...
        lab.wire.mbit = 1000                    # while it runs
        print(lab.wire.counts().payload)        # bytes[from][to]

A site is a network namespace whose only way out is a TUN device; the wire between them is a thread of this
process. Each site has one uplink: packets leave it one after the other at `mbit`, wait in a buffer of
`buffer_ms` (what does not fit is dropped) and arrive `delay_ms` later, give or take `jitter_ms`, in order.
Downlinks are not limited, which a ring does not notice. No tc qdisc is needed.

TCP segments cross in the large pieces in which the kernel hands them to a device that segments by itself, so
that a thread of Python carries 1 Gbit/s and more; rate and counts are those of the packets of `mtu` bytes
that a real device would cut them into. With `loss` the kernel cuts them itself, for packets to be lost one by
one. TCP is the machine's own, with its congestion control and its limits on buffers; a connection remembers
the link it has known, so after changing one make new connections.
"""

import argparse
import fcntl
import heapq
import os
import platform
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NETWORK = "10.77.0"  # inside the namespaces, where nothing else is: two labs may both have it
PREFIX = "curvadion"
PORT = 29511

# <linux/if_tun.h>, <linux/virtio_net.h>
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
VIRTIO = struct.Struct(
    "=BBHHHH"
)  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset: before each frame
TCP = 6


# ---- the wire's arithmetic: no clock, no device


@dataclass(frozen=True)
class Frame:
    """What one frame from a TUN device is on a real wire.

    Attributes:
        target: site that it goes to.
        packets: number of packets.
        bytes: of these, with IP and TCP headers; a link layer's own are not counted.
        payload: bytes of them that TCP carries for the application.
    """

    target: int
    packets: int
    bytes: int
    payload: int


def parse(frame: bytes, sites: int) -> Frame | None:
    """Read the headers of a frame; None for what goes to no site (IPv6's own traffic, broadcasts)."""
    _, gso_type, _, gso_size, _, _ = VIRTIO.unpack_from(frame)
    ip = len(VIRTIO.pack(0, 0, 0, 0, 0, 0))
    if (
        len(frame) < ip + 20
        or frame[ip] >> 4 != 4
        or frame[ip + 16 : ip + 19] != bytes(map(int, NETWORK.split(".")))
    ):
        return None
    target = frame[ip + 19] - 1
    if not 0 <= target < sites:
        return None
    size, header = len(frame) - ip, (frame[ip] & 15) * 4
    if frame[ip + 9] != TCP:
        return Frame(target, 1, size, 0)
    header += (frame[ip + header + 12] >> 4) * 4
    payload = size - header
    packets = -(-payload // gso_size) if gso_type and gso_size else 1
    return Frame(target, packets, payload + packets * header, payload)


Matrix = list[list[int]]


@dataclass(frozen=True)
class Counts:
    """What arrived, as [from site][to site], and how many packets were dropped. Subtract an earlier one to
    count from there."""

    packets: Matrix
    bytes: Matrix
    payload: Matrix
    dropped: int

    def __sub__(self, before: "Counts") -> "Counts":
        def difference(new: Matrix, old: Matrix) -> Matrix:
            return [
                [a - b for a, b in zip(row, other, strict=True)] for row, other in zip(new, old, strict=True)
            ]

        pairs = ((self.packets, before.packets), (self.bytes, before.bytes), (self.payload, before.payload))
        return Counts(*(difference(new, old) for new, old in pairs), self.dropped - before.dropped)


class Wire:
    """The links between sites. Time comes in as an argument; attributes may be changed while it runs.

    Args:
        mbit: rate of a site's uplink in 10^6 bit/s; None: unlimited.
        delay_ms: from the uplink's end to any other site.
        jitter_ms: the delay is uniform in delay_ms +- jitter_ms, never negative; order between two sites is
            kept.
        loss: share of packets that vanish.
        buffer_ms: how long a packet may wait for its uplink.
    """

    def __init__(
        self,
        sites: int,
        *,
        mbit: float | None = None,
        delay_ms: float = 0.0,
        jitter_ms: float = 0.0,
        loss: float = 0.0,
        buffer_ms: float = 250.0,
        seed: int = 0,
    ):
        rules = [
            ("sites", 2 <= sites <= 4, "2, 3 or 4", sites),
            ("mbit", mbit is None or mbit > 0, "positive, or None for unlimited", mbit),
            ("delay_ms", delay_ms >= 0, "0 or more", delay_ms),
            ("jitter_ms", jitter_ms >= 0, "0 or more", jitter_ms),
            ("loss", 0 <= loss < 1, "at least 0 and below 1", loss),
            ("buffer_ms", buffer_ms > 0, "positive", buffer_ms),
        ]
        for name, holds, rule, got in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}; got {got}")
        self.sites, self.mbit, self.delay_ms, self.jitter_ms, self.loss, self.buffer_ms = (
            sites,
            mbit,
            delay_ms,
            jitter_ms,
            loss,
            buffer_ms,
        )
        self._random = random.Random(seed)
        self._queue: list[tuple[float, int, int, Frame, bytes]] = []
        self._number = 0
        self._free = [0.0] * sites  # when the uplink has sent all it was given
        self._last = [[0.0] * sites for _ in range(sites)]
        self._packets, self._bytes, self._payload = ([[0] * sites for _ in range(sites)] for _ in range(3))
        self._dropped = 0

    def put(self, now: float, source: int, data: bytes) -> None:
        """Take a frame from a site at `now` (seconds)."""
        frame = parse(data, self.sites)
        if frame is None:
            return
        start = max(now, self._free[source])
        if start - now > self.buffer_ms / 1e3 or (self.loss and self._random.random() < self.loss):
            self._dropped += frame.packets
            return
        sent = start + (frame.bytes * 8 / (self.mbit * 1e6) if self.mbit else 0.0)
        self._free[source] = sent
        delay = self.delay_ms + (
            self._random.uniform(-self.jitter_ms, self.jitter_ms) if self.jitter_ms else 0.0
        )
        arrives = max(sent + max(0.0, delay) / 1e3, self._last[source][frame.target])
        self._last[source][frame.target] = arrives
        self._number += 1
        heapq.heappush(self._queue, (arrives, self._number, source, frame, data))

    def take(self, now: float) -> list[tuple[int, bytes]]:
        """Return (site, frame) of all that has arrived by `now`, in order, and count it."""
        arrived = []
        while self._queue and self._queue[0][0] <= now:
            _, _, source, frame, data = heapq.heappop(self._queue)
            self._packets[source][frame.target] += frame.packets
            self._bytes[source][frame.target] += frame.bytes
            self._payload[source][frame.target] += frame.payload
            arrived.append((frame.target, data))
        return arrived

    def next_arrival(self) -> float | None:
        """Return when the next frame arrives; None if there is none on the way."""
        return self._queue[0][0] if self._queue else None

    def counts(self) -> Counts:
        """Return what has arrived so far."""
        return Counts(
            *([list(row) for row in matrix] for matrix in (self._packets, self._bytes, self._payload)),
            self._dropped,
        )


# ---- the sites


def why_not() -> str | None:
    """Return why this process cannot make sites, and what to try; None if it can."""
    if platform.system() != "Linux":
        return (
            f"sites are network namespaces, which Linux alone has; this is {platform.system()}; try a Linux "
            "machine or container"
        )
    if os.geteuid() != 0:
        return (
            f"making network namespaces needs root; this is user {os.geteuid()}; try sudo, with the same "
            "python"
        )
    if shutil.which("ip") is None:
        return "sites are made with the command `ip`, which is not there; install the package iproute2"
    if not Path("/dev/net/tun").exists():
        return (
            "the wire needs /dev/net/tun, which is not there; try `modprobe tun`, or for a container "
            "--device /dev/net/tun"
        )
    return None


def ip(*arguments: object) -> str:
    """Run `ip` and return what it prints."""
    done = subprocess.run(["ip", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        hint = (
            "; a container needs --cap-add NET_ADMIN --cap-add SYS_ADMIN"
            if "permitted" in done.stderr
            else ""
        )
        raise RuntimeError(f"ip {' '.join(map(str, arguments))}: {done.stderr.strip()}{hint}")
    return done.stdout


def namespaces(pid: int | None = None) -> list[str]:
    """Return the names of the sites of a process; None: of all processes that have ended."""
    found = [line.split()[0] for line in ip("netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]

    def wanted(owner: str) -> bool:
        return owner == str(pid) if pid is not None else not Path("/proc", owner).exists()

    return [name for name in found if wanted(name.split("-")[1])]


class Lab:
    """Sites and the wire between them, for the time of a `with`. One at a time in a process. All gone after,
    with what runs in them.

    Args:
        mtu: of the sites' devices.
        sysctls: set in each site, such as {"net.ipv4.tcp_slow_start_after_idle": 0}.
        link: what `Wire` takes.
    """

    def __init__(self, sites: int, *, mtu: int = 1500, sysctls: dict[str, object] | None = None, **link: Any):
        if not 576 <= mtu <= 65000:
            raise ValueError(f"mtu must be between 576 and 65000; got {mtu}")
        self.wire = Wire(sites, **link)
        self.sites, self._mtu, self._sysctls = sites, mtu, sysctls or {}
        self._names = [f"{PREFIX}-{os.getpid()}-{site}" for site in range(sites)]

    def __enter__(self) -> "Lab":
        reason = why_not()
        if reason:
            raise RuntimeError(reason)
        self._processes: list[subprocess.Popen] = []
        self._devices: list[int] = []
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        with ExitStack() as stack:
            stack.callback(self._remove)
            for site in range(self.sites):
                self._make(site)
            self._thread = threading.Thread(target=self._carry, name="wire", daemon=True)
            self._thread.start()
            stack.callback(self._join)
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        deaf = {signal.SIGINT, signal.SIGTERM}  # an impatient second Ctrl-C would leave namespaces behind
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, deaf)
        try:
            self._stack.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def address(self, site: int) -> str:
        """Return a site's IP address."""
        return f"{NETWORK}.{site + 1}"

    def start(self, site: int, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """Start a process in a site, as rank `site` of one process a site; options are those of Popen."""
        environment = {
            **os.environ,
            "RANK": str(site),
            "WORLD_SIZE": str(self.sites),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": "eth0",
            **options.pop("env", {}),
        }
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._names[site], *command], env=environment, **options
        )
        self._processes.append(process)
        return process

    def check(self) -> None:
        """Raise if the wire has broken."""
        if self._failure is not None:
            raise RuntimeError(f"the wire broke: {self._failure}") from self._failure

    def _make(self, site: int) -> None:
        name, device = self._names[site], f"cvd{os.getpid()}-{site}"
        ip("netns", "add", name)
        self._devices.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
        fcntl.ioctl(
            self._devices[-1],
            TUNSETIFF,
            struct.pack("16sH22s", device.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR, b""),
        )
        if not self.wire.loss:
            fcntl.ioctl(self._devices[-1], TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
        ip("link", "set", device, "netns", name)
        ip("-n", name, "link", "set", device, "name", "eth0")
        ip("-n", name, "address", "add", f"{self.address(site)}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "eth0", "mtu", self._mtu, "txqueuelen", 10000, "up")
        for key, value in self._sysctls.items():
            ip("netns", "exec", name, "sh", "-c", f"echo {value} > /proc/sys/{key.replace('.', '/')}")

    def _carry(self) -> None:
        with suppress(OSError, AttributeError):  # the wire must not wait for those that wait for it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -15)
        sites = {device: site for site, device in enumerate(self._devices)}
        try:
            while not self._stop.is_set():
                arrival = self.wire.next_arrival()
                wait = 0.05 if arrival is None else min(0.05, max(0.0, arrival - time.monotonic()))
                for device in select.select(self._devices, [], [], wait)[0]:
                    for _ in range(16):
                        try:
                            data = os.read(device, 1 << 17)
                        except BlockingIOError:
                            break
                        self.wire.put(time.monotonic(), sites[device], data)
                for site, data in self.wire.take(time.monotonic()):
                    os.write(self._devices[site], data)
        except BaseException as error:
            self._failure = error

    def _end(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _join(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _remove(self) -> None:
        for device in self._devices:
            os.close(device)
        for name in namespaces(os.getpid()):
            ip("netns", "delete", name)


# ---- the command


def add_link_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what makes links more or less like real ones."""
    parser.add_argument(
        "--jitter-ms", type=float, default=0.0, help="the delay is uniform within so much of --delay-ms"
    )
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets that vanish")
    parser.add_argument(
        "--buffer-ms",
        type=float,
        default=250.0,
        help="how long a packet may wait for its uplink before it is dropped",
    )
    parser.add_argument("--mtu", type=int, default=1500, help="bytes in a packet")
    parser.add_argument(
        "--sysctl",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set in every site; may be repeated",
    )


def link_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_link_arguments` added, for `Lab`."""
    pairs = [setting.partition("=") for setting in arguments.sysctl]
    for key, equals, _ in pairs:
        if not equals:
            raise SystemExit(
                f"--sysctl must be KEY=VALUE; got {key!r}; try net.ipv4.tcp_slow_start_after_idle=0"
            )
    options = {name: getattr(arguments, name) for name in ("jitter_ms", "loss", "buffer_ms", "mtu")}
    return {**options, "sysctls": {key: value for key, _, value in pairs}}


def leave_on_sigterm() -> None:
    """Make SIGTERM end this process as an error would, so that namespaces are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def wait_for_all(processes: Sequence[subprocess.Popen], lab: Lab) -> int:
    """Wait until all have ended or one has failed; return its exit status."""
    while True:
        lab.check()
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return abs(failed[0]) if failed else 0
        time.sleep(0.05)


def main() -> int:
    """Run a command in every site, or clean up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("clean", help="remove the namespaces of runs that were killed")
    run = actions.add_parser("run", help="run a command once in each site")
    run.add_argument("--sites", type=int, default=2, help="2 to 4")
    run.add_argument("--mbit", type=float, help="10^6 bit/s of a site's uplink; none: unlimited")
    run.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    add_link_arguments(run)
    run.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    arguments = parser.parse_args()
    reason = why_not()
    if reason:
        raise SystemExit(reason)
    if arguments.action == "clean":
        for name in namespaces():
            ip("netns", "delete", name)
            print(f"removed {name}")
        return 0
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("run needs a command; put it after --")
    leave_on_sigterm()
    try:
        lab = Lab(
            arguments.sites, mbit=arguments.mbit, delay_ms=arguments.delay_ms, **link_options(arguments)
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        with lab:
            status = wait_for_all([lab.start(site, command) for site in range(arguments.sites)], lab)
            counts = lab.wire.counts()
    except (KeyboardInterrupt, RuntimeError) as error:
        raise SystemExit(str(error) or 130) from None
    print(
        f"payload bytes [from][to]: {counts.payload}; with headers: {counts.bytes}; packets dropped: "
        f"{counts.dropped}"
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
