"""What GPUs and CPU cores do in a second, and what a local step's kernels read and write."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second.

    Attributes:
        bfloat16, float32, float64: FLOPs of products.
        solve32, solve64: FLOPs of triangular solves.
        cholesky: FLOPs of Cholesky factors.
        memory: bytes read and written.
        reduced: bytes read for norms by themselves.
        inside: bytes that leave it for others in its machine, and in an all-reduce, which crosses machines
            over all their network cards at once.
        across: bytes that leave it in an all-to-all of more GPUs than a machine has.
        operation, call: seconds that an operation and a collective take of the host, where the device waits
            for it.
        device: whose kernels, and whose choice between owners and all together, are meant.
        householder: FLOPs of Householder's QR, on CPUs alone.
    """

    bfloat16: float
    float32: float
    float64: float
    memory: float
    inside: float
    across: float
    cholesky: float
    solve32: float
    solve64: float
    reduced: float
    operation: float = 0.0
    call: float = 0.0
    device: str = "cuda"
    householder: float = 1e12


# H100 SXM: half of its dense peak in bfloat16, three quarters of its memory's, NVLink, 400 Gbit/s of network
# for each GPU. A core of a Xeon with AMX, gloo on one machine: by `benchmarks/sharded.py --only ceilings`.
RATES = {
    "h100": Rates(
        5e14, 5e13, 4e13, 2.5e12, 3.7e11, 5e10, cholesky=5e12, solve32=5e13, solve64=4e13, reduced=2.5e12
    ),
    "cpu": Rates(
        3.3e11,
        1.15e11,
        6e10,
        1e10,
        1.6e9,
        1.6e9,
        cholesky=1e10,
        solve32=3e10,
        solve64=1.5e10,
        reduced=2.3e9,
        operation=3e-6,
        call=1e-3,
        device="cpu",
        householder=4e10,
    ),
}


@dataclass(frozen=True)
class Kernels:
    """Bytes that a local step reads and writes for an element of a matrix, its norms and its step along a
    direction of `width` bytes an element; those that it reads for norms alone."""

    matrix: Callable[[float], float]
    norms: float


KERNELS = {
    "cuda": Kernels(lambda width: 20 + width, 0.0),  # m, with norms: 12; X: 8 and the direction
    "cpu": Kernels(lambda width: 20 + 20, 8.0),  # decay and sum of m: 20; decay and step of X, in float32: 20
}
