"""What is projected, by nominal sizes: models and links. Known without torch."""

import math
from dataclasses import dataclass

# ---- models


@dataclass(frozen=True)
class Model:
    """Shapes of the matrices that Dion updates, and the number of parameters of everything else (AdamW)."""

    matrices: tuple[tuple[int, int], ...]
    scalars: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(m * n for m, n in self.matrices) + self.scalars


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Llama-style decoder: untied embeddings, attention, SwiGLU, RMSNorm, no biases.

    Heads change no shape. The default vocabulary is GPT-2's 50257, rounded up to a multiple of 128.
    """

    dim: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int = 50304

    def matrices(self) -> dict[tuple[int, int], int]:
        """Return how many hidden matrices there are of each shape (out, in)."""
        count = {(self.dim, self.dim): 4 * self.layers}  # q, k, v, o
        for shape, per_layer in (((self.ffn, self.dim), 2), ((self.dim, self.ffn), 1)):  # w1 and w3, w2
            count[shape] = count.get(shape, 0) + per_layer * self.layers
        return count

    def others(self) -> list[tuple[int, ...]]:
        """Return the shapes of everything else: embedding, head, norms."""
        return [(self.vocabulary, self.dim)] * 2 + [(self.dim,)] * (2 * self.layers + 1)

    @property
    def model(self) -> Model:
        """The matrices one by one, and the number of all other parameters."""
        matrices = tuple(shape for shape, count in self.matrices().items() for _ in range(count))
        return Model(matrices, sum(math.prod(shape) for shape in self.others()))

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.model.parameters


# The one table of sizes: `curvadion_configs.models` and `benchmarks/timing.py` take theirs from it.
SIZES = {
    "160m": Decoder(dim=768, layers=12, heads=12, ffn=2048),
    "350m": Decoder(dim=1024, layers=20, heads=16, ffn=2816),
    "720m": Decoder(dim=1536, layers=20, heads=12, ffn=4096),
    "1b3": Decoder(dim=2048, layers=22, heads=16, ffn=5632),
}


# ---- links


@dataclass(frozen=True)
class Link:
    """A nominal link.

    Args:
        gbit: Gbit/s of one NIC, each way.
        rtt_ms: round trip in ms.
        per_gpu: every GPU has a NIC of its own; else those of a replica share one.
    """

    gbit: float
    rtt_ms: float
    per_gpu: bool = False

    def nics(self, shards: int) -> int:
        """Return how many NICs a replica of that many GPUs has."""
        return shards if self.per_gpu else 1


LINKS = {
    "infiniband-per-gpu": Link(400, 0.005, per_gpu=True),
    "infiniband": Link(400, 0.005),
    "ethernet-100": Link(100, 0.05),
    "ethernet-25": Link(25, 0.1),
    "ethernet-10": Link(10, 0.1),
    "metro": Link(10, 2),
    "cross-datacentre-10": Link(10, 40),
    "cross-datacentre-2": Link(2, 40),
    "cross-datacentre": Link(1, 40),
    "internet": Link(0.1, 100),
}

# ---- payloads

# What a synchronized step may send; a pseudo-gradient's bits follow the prefix.
WHOLE_PAYLOADS, OUTER = ("average", "low-rank", "parameters", "dense"), "outer-"

# Local rules whose work is known, and those of them that move Q (`Rule.uses_Q`, a test compares).
KNOWN_RULES, MOVES_Q = ("gradient", "dion", "muon", "normuon"), ("dion",)
