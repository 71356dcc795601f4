"""Codecs that the study tries: few levels, rotations, the largest of many, a part at a time. No ranks.

A codec is named by its stages from the outermost to the one that packs bytes, with their arguments:

    sign:BLOCK[:rms]            -s, s; s the mean |x| of a block, the best for normal values, or rms
    ternary:BLOCK[:laplace]     -s, 0, s; five values in a byte; BLOCK a multiple of 5
    lloyd:LEVELS:BLOCK[:laplace]  the best levels for a normal (a Laplace) distribution; 4 or 16 of them
    stochastic:BLOCK:REACH      -s, s at random, so that the mean is x where |x| < s = REACH rms; or "max"
    top:K/N:BITS[:BLOCK]        the K largest of each N values: place and sign, and (2 bits) one of two sizes
    vector:BITS/N[:BLOCK]       of N values the nearest of 2^BITS vectors that normal values were clustered to
    hadamard:N>..., dct:N>..., dct2:N>...  an orthogonal transform of N (N x N) values before the rest
    part:COUNT>...              of each block only one of COUNT parts, another one in each outer step

such as "hadamard:1024>sign:128", "dct2:64>top:64/4096:2", "part:4>sign:128".

All scales are bfloat16. A block of zeros is exact, one with a NaN or an infinity decodes to none that are
finite. What a codec leaves out is the caller's to keep and send later (error feedback).

Source: Max, "Quantizing for minimum distortion", 1960, and Jayant and Noll, "Digital Coding of Waveforms",
1984, for levels; Linde, Buzo and Gray, "An Algorithm for Vector Quantizer Design", 1980, for vectors;
Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", arXiv:2105.08339, for rotations; Peng et al.,
"DeMo: Decoupled Momentum Optimization", arXiv:2411.19870, for the cosine transform; Sarfi et al.,
"SparseLoCo", arXiv:2508.15706, for the largest of chunks at 2 bits.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvadion.sharding.journey import Codec

# Levels with the least mean square error for variance 1, the positive ones; and that error.
NORMAL = {3: (0.0, 1.2240), 4: (0.4528, 1.5104)}
NORMAL[16] = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326)
LAPLACE = {3: (0.0, 1.4142), 4: (0.4198, 1.8340)}
SEED = 20261127


def both(positive: tuple[float, ...]) -> tuple[float, ...]:
    """Return levels on both sides of zero, in ascending order."""
    return tuple(sorted({sign * level + 0.0 for level in positive for sign in (-1, 1)}))


def pack(codes: Tensor, base: int) -> Tensor:
    """Return codes below `base`, (n, k), as bytes, as many codes in each as fit; k must fill the last."""
    powers = _powers(base, codes.device)
    return (codes.view(len(codes), -1, len(powers)) * powers).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, base: int) -> Tensor:
    """Return the codes, int64, that `pack` was given."""
    powers = _powers(base, packed.device)
    return (packed.to(torch.int64).unsqueeze(-1) // powers % base).flatten(1)


def per_byte(base: int) -> int:
    """Return how many codes below `base` a byte holds."""
    return int(math.log(256.5, base))


def _powers(base: int, device: torch.device) -> Tensor:
    return base ** torch.arange(per_byte(base), device=device)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return codes of so many bits, (n, k), as bytes, one behind the other; k bits must fill the last."""
    digits = codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device) & 1
    return pack(digits.flatten(1), 2)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Return the codes, int64, that `pack_bits` was given."""
    digits = unpack(packed, 2).view(len(packed), -1, bits)
    return (digits << torch.arange(bits, device=packed.device)).sum(-1)


def as_bytes(scales: Tensor) -> Tensor:
    """Return scales, (n, k), as bfloat16, (n, 2 k) bytes."""
    return scales.to(torch.bfloat16).view(torch.uint8)


def as_scales(payload: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the `count` scales at the begin of each row."""
    raw = payload[:, : 2 * count].reshape(-1).clone()  # aligned, also where rows are odd
    return raw.view(torch.bfloat16).view(-1, count).to(dtype)


class Stage:
    """What all of them share."""

    def at(self, turn: int) -> Any:
        """Return the codec of the outer step with this number."""
        return self


@dataclass(frozen=True)
class Levels(Stage):
    """Rounds each value to the nearest of a few levels, times a scale s for each block.

        value = levels[code] s,   code of x: the nearest level to x / s

    s begins as the block's root mean square and is then fitted to the codes, `fits` times:
    s = <x, levels[code]> / <levels[code], levels[code]>.

    Attributes:
        levels: ascending.
        block: values that share a scale; they must fill whole bytes.
        fits: 0 leaves the root mean square.
    """

    levels: tuple[float, ...]
    block: int = 128
    fits: int = 2

    def __post_init__(self) -> None:
        if self.block < 1 or self.block % per_byte(len(self.levels)):
            raise ValueError(
                f"a block of {len(self.levels)} levels must fill whole bytes; got {self.block}; try a "
                f"multiple of {per_byte(len(self.levels))}"
            )

    @property
    def bits_per_value(self) -> float:
        """Bits on the wire, the scale included."""
        return (8 * (self.block // per_byte(len(self.levels))) + 16) / self.block

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8, of a flat tensor whose length is a multiple of block; each block's are
        together."""
        x = x.view(-1, self.block)
        scale = x.square().mean(-1, keepdim=True).sqrt()
        levels = x.new_tensor(self.levels)
        for _ in range(self.fits):
            fitted = levels[self.codes(x, scale)]
            scale = (x * fitted).sum(-1, keepdim=True) / fitted.square().sum(-1, keepdim=True).clamp_(
                min=1e-30
            )
        scale = scale.to(torch.bfloat16)
        codes = self.codes(x, scale.to(x.dtype))
        return torch.cat([as_bytes(scale), pack(codes, len(levels))], -1).view(-1)

    def codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return the places of the nearest levels."""
        levels = x.new_tensor(self.levels)
        return torch.bucketize(_over(x, scale), (levels[1:] + levels[:-1]) / 2, right=True)

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, flat, in `dtype`."""
        payload = payload.view(-1, 2 + self.block // per_byte(len(self.levels)))
        codes = unpack(payload[:, 2:], len(self.levels))
        levels = torch.tensor(self.levels, dtype=dtype, device=payload.device)
        return (levels[codes] * as_scales(payload, 1, dtype)).view(-1)


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale, zero where the scale is; contiguous."""
    return torch.where(scale == 0, 0.0, x / scale)


@dataclass(frozen=True)
class Stochastic(Levels):
    """Rounds each value to -s or s, at random: s with probability (1 + x / s) / 2, cut off at 0 and 1.

    So the mean is x where |x| <= s. What is drawn is a hash of the bits of x and its place in the buffer:
    the same in a repetition, and another in another replica.

    Attributes:
        reach: s in root mean squares; None for max |x|, with which nothing is cut off. From about 1.25 on it
            adds more than it leaves out, and with error feedback the residual grows without bound.
    """

    levels: tuple[float, ...] = (-1.0, 1.0)
    reach: float | None = 1.0

    def encode(self, x: Tensor) -> Tensor:
        x = x.view(-1, self.block)
        if self.reach is None:
            scale = x.abs().amax(-1, keepdim=True)
        else:
            scale = x.square().mean(-1, keepdim=True).sqrt() * self.reach
        scale = scale.to(torch.bfloat16)
        codes = _over(x, scale.to(x.dtype)).add(1).div(2) > uniform(x)
        return torch.cat([as_bytes(scale), pack(codes, 2)], -1).view(-1)


def uniform(x: Tensor) -> Tensor:
    """Return numbers in [0, 1) that are a hash of the bits of x, float32 or float64, and of its places."""
    bits = x.view(torch.int32).to(torch.int64) if x.dtype == torch.float32 else x.view(torch.int64)
    h = bits.reshape(-1) + 0x1E3779B97F4A7C15 * torch.arange(1, x.numel() + 1, device=x.device)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):  # as SplitMix64 mixes
        h = (h ^ (h >> shift & (1 << 64 - shift) - 1)) * factor
    h = h ^ (h >> 31 & (1 << 33) - 1)
    return ((h & (1 << 24) - 1).to(x.dtype) / (1 << 24)).view(x.shape)


@dataclass(frozen=True)
class Top(Stage):
    """The `kept` largest of each `chunk` values: place, sign, and with 2 bits which of two sizes.

    The sizes are the means of the kept |x| of a block that are below, and above, the mean of all of them.

    Attributes:
        kept, chunk: chunk is a power of two.
        bits: 1 for the sign only, 2 for a size too.
        block: values that share the sizes, a multiple of chunk.
    """

    kept: int
    chunk: int
    bits: int
    block: int

    def __post_init__(self) -> None:
        if self.chunk & (self.chunk - 1) or self.block % self.chunk or self.bits not in (1, 2):
            raise ValueError(
                "a chunk must be a power of two that divides the block, and a value have 1 or 2 bits; got "
                f"{self}; try top:64/4096:2"
            )
        if not 0 < self.kept <= self.chunk or self._bits_of_block % 8:
            raise ValueError(f"what is kept of a block must fill whole bytes; got {self}; try top:64/4096:2")

    @property
    def _code(self) -> int:
        return self.chunk.bit_length() - 1 + self.bits

    @property
    def _bits_of_block(self) -> int:
        return self.block // self.chunk * self.kept * self._code

    @property
    def bits_per_value(self) -> float:
        """Bits on the wire, the sizes included."""
        return (self._bits_of_block + 16 * self.bits) / self.block

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8, of a flat tensor whose length is a multiple of block; each block's are
        together."""
        chunks = x.view(-1, self.chunk)
        places = chunks.abs().topk(self.kept, -1).indices
        values = chunks.gather(-1, places).view(-1, self.block // self.chunk * self.kept)
        sizes, codes = values.abs(), places.view(values.shape) << self.bits | (values < 0)
        mean = sizes.mean(-1, keepdim=True)
        if self.bits == 1:
            scales = mean
        else:
            large = sizes > mean
            count = large.sum(-1, keepdim=True)
            above = torch.where(large, sizes, 0).sum(-1, keepdim=True)
            below = (mean * sizes.shape[-1] - above) / (sizes.shape[-1] - count).clamp_(min=1)
            # Where all are equal none is above.
            scales = torch.cat([below, torch.where(count > 0, above / count.clamp(min=1), below)], -1)
            codes = codes | large << 1
        return torch.cat([as_bytes(scales), pack_bits(codes, self._code)], -1).view(-1)

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, flat, in `dtype`."""
        payload = payload.view(-1, 2 * self.bits + self._bits_of_block // 8)
        scales = as_scales(payload, self.bits, dtype)
        codes = unpack_bits(payload[:, 2 * self.bits :], self._code)
        sizes = scales.gather(-1, codes >> 1 & 1) if self.bits == 2 else scales.expand(codes.shape)
        values = torch.where((codes & 1).bool(), -sizes, sizes).reshape(-1, self.kept)
        # Zeros, and NaN where a block is not finite.
        rest = (scales * 0).sum(-1, keepdim=True).repeat(1, self.block).view(-1, self.chunk)
        return rest.scatter_(-1, (codes >> self.bits).view(-1, self.kept), values).view(-1)


@dataclass(frozen=True)
class Vectors(Stage):
    """Rounds each `length` values to the nearest of 2^bits vectors, times a scale for each block.

    The scale is fitted as that of `Levels`.

    Attributes:
        bits: of the vectors' number.
        block: values that share a scale, a multiple of length; the codes must fill whole bytes.
    """

    bits: int
    length: int
    block: int

    def __post_init__(self) -> None:
        if self.bits < 1 or self.length < 1 or self.block % self.length or self._bits_of_block % 8:
            raise ValueError(
                f"a block must be a multiple of the vectors, whose codes fill whole bytes; got {self}; try "
                "vector:8/16"
            )

    @property
    def _bits_of_block(self) -> int:
        return self.block // self.length * self.bits

    @property
    def bits_per_value(self) -> float:
        """Bits on the wire, the scale included."""
        return (self._bits_of_block + 16) / self.block

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8, of a flat tensor whose length is a multiple of block; each block's are
        together."""
        x = x.view(-1, self.block)
        book = codebook(self.bits, self.length).to(x)
        scale = x.square().mean(-1, keepdim=True).sqrt()
        codes = nearest(_over(x, scale).view(-1, self.length), book).view(len(x), -1)
        fitted = book[codes].view(x.shape)
        scale = (x * fitted).sum(-1, keepdim=True) / fitted.square().sum(-1, keepdim=True)
        return torch.cat([as_bytes(scale), pack_bits(codes, self.bits)], -1).view(-1)

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, flat, in `dtype`."""
        payload = payload.view(-1, 2 + self._bits_of_block // 8)
        book = codebook(self.bits, self.length).to(payload.device, dtype)
        values = book[unpack_bits(payload[:, 2:], self.bits)].view(len(payload), self.block)
        return (values * as_scales(payload, 1, dtype)).view(-1)


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """Return the places of the nearest vectors of a codebook, (k, n), to the rows of x, (m, n)."""
    offset = book.square().sum(-1) / 2
    return torch.cat([(part @ book.T - offset).argmax(-1) for part in x.split(1 << 14)])


@functools.cache
def codebook(bits: int, length: int) -> Tensor:
    """Return 2^bits vectors, (2^bits, length), by k-means of normal ones; rounded, so that what the last bits
    of a sum are does not matter."""
    generator = torch.Generator().manual_seed(SEED)
    samples = torch.randn((128 << bits, length), generator=generator)
    book = samples[: 1 << bits].clone()
    for _ in range(20):
        codes = nearest(samples, book)
        count = torch.bincount(codes, minlength=len(book)).unsqueeze(-1)
        sums = torch.zeros_like(book).index_add_(0, codes, samples)
        book = torch.where(count > 0, sums / count.clamp(min=1), book)
    return book.mul(256).round().div(256).to(torch.float64)


# ---- before the rest


@dataclass(frozen=True)
class Rotated(Stage):
    """Applies an orthogonal transform to x before another codec, and its inverse after it.

    Attributes:
        inner: the codec.
        kind: of `ROTATIONS`.
        size: of the transform.
    """

    inner: Any
    kind: str
    size: int

    @property
    def block(self) -> int:
        """Values that go together."""
        return math.lcm(self.inner.block, ROTATIONS[self.kind].length(self.size))

    @property
    def bits_per_value(self) -> float:
        """Bits on the wire."""
        return self.inner.bits_per_value

    def at(self, turn: int) -> "Rotated":
        return replace(self, inner=self.inner.at(turn))

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8, of a flat tensor whose length is a multiple of block."""
        return self.inner.encode(ROTATIONS[self.kind].forward(x, self.size).reshape(-1))

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, flat, in `dtype`."""
        return ROTATIONS[self.kind].backward(self.inner.decode(payload, dtype), self.size).reshape(-1)


class Hadamard:
    """y = H diag(s) x / sqrt(n), s random signs, the same on all ranks and for all blocks of n values."""

    @staticmethod
    def length(size: int) -> int:
        return size

    @staticmethod
    def forward(x: Tensor, size: int) -> Tensor:
        return Hadamard.walsh(x.view(-1, size) * _signs(size).to(x))

    @staticmethod
    def backward(y: Tensor, size: int) -> Tensor:
        return Hadamard.walsh(y.view(-1, size)) * _signs(size).to(y)

    @staticmethod
    def walsh(x: Tensor) -> Tensor:
        """Return x H / sqrt(n), (m, n)."""
        rows, size = x.shape
        half = 1
        while half < size:
            pairs = x.view(rows, -1, 2, half)
            x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
            half *= 2
        return x.reshape(rows, size) / math.sqrt(size)


class Cosine:
    """The orthonormal DCT-II of n values."""

    @staticmethod
    def length(size: int) -> int:
        return size

    @staticmethod
    def forward(x: Tensor, size: int) -> Tensor:
        return x.view(-1, size) @ _cosines(size).to(x).T

    @staticmethod
    def backward(y: Tensor, size: int) -> Tensor:
        return y.view(-1, size) @ _cosines(size).to(y)


class Cosine2:
    """The same of the columns and rows of n x n values."""

    @staticmethod
    def length(size: int) -> int:
        return size * size

    @staticmethod
    def forward(x: Tensor, size: int) -> Tensor:
        C = _cosines(size).to(x)
        return C @ x.view(-1, size, size) @ C.T

    @staticmethod
    def backward(y: Tensor, size: int) -> Tensor:
        C = _cosines(size).to(y)
        return C.T @ y.view(-1, size, size) @ C


ROTATIONS: dict[str, Any] = {"hadamard": Hadamard, "dct": Cosine, "dct2": Cosine2}


@functools.cache
def _signs(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(2, (size,), generator=generator).mul(2).sub(1).to(torch.float64)


@functools.cache
def _cosines(size: int) -> Tensor:
    """Return C, (n, n): y = C x is the DCT-II."""
    k, i = torch.arange(size, dtype=torch.float64).unsqueeze(1), torch.arange(size, dtype=torch.float64)
    C = torch.cos(math.pi / size * (i + 0.5) * k) * math.sqrt(2 / size)
    C[0] /= math.sqrt(2)
    return C


@dataclass(frozen=True)
class Part(Stage):
    """Sends one of `count` parts of each block, chosen by a permutation that all ranks share and by the turn.

    The rest decodes to zero: it stays in the residual until its turn. A block with a NaN or an infinity
    anywhere is told in any turn.

    Attributes:
        inner: the codec of a part.
        turn: the number of the outer step.
    """

    inner: Any
    count: int
    turn: int = 0

    @property
    def block(self) -> int:
        """Values of which a part fills the inner codec's block."""
        return self.inner.block * self.count

    @property
    def bits_per_value(self) -> float:
        """Bits on the wire of a value, also where it is not sent."""
        return self.inner.bits_per_value / self.count

    def at(self, turn: int) -> "Part":
        return replace(self, inner=self.inner.at(turn // self.count), turn=turn % self.count)

    def _places(self, device: torch.device) -> Tensor:
        places = _permutation(self.block).to(device)
        return places[self.turn * self.inner.block :][: self.inner.block]

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8, of a flat tensor whose length is a multiple of block; each block's are
        together."""
        x = x.view(-1, self.block)
        wrong = (x * 0).sum(-1, keepdim=True)  # zero, or NaN
        return self.inner.encode((x[:, self._places(x.device)] + wrong).view(-1))

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, flat, in `dtype`."""
        sent = self.inner.decode(payload, dtype).view(-1, self.inner.block)
        values = (sent * 0).sum(-1, keepdim=True).repeat(1, self.block)
        values[:, self._places(payload.device)] = sent
        return values.view(-1)


@functools.cache
def _permutation(length: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(SEED))


@dataclass(frozen=True)
class ThereAndBack(Stage):
    """One codec for what each replica sends, and another, `back`, for the mean, of the same buffer.

    Attributes:
        inner: the first.
    """

    inner: Any
    back: Any

    @property
    def block(self) -> int:
        """Values that fill blocks of both."""
        return math.lcm(self.inner.block, self.back.block)

    @property
    def bits_per_value(self) -> float:
        """Bits on the wire of what each replica sends."""
        return self.inner.bits_per_value

    def at(self, turn: int) -> "ThereAndBack":
        return ThereAndBack(at(self.inner, turn), at(self.back, turn))

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes of the first."""
        return self.inner.encode(x)

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values of bytes of the first."""
        return self.inner.decode(payload, dtype)


def at(codec: Any, turn: int) -> Any:
    """Return the codec of the outer step with this number: the same, unless it is one that takes turns."""
    return codec.at(turn) if isinstance(codec, Stage) else codec


# ---- names


def _levels(count: int, block: int, shape: str) -> Levels:
    table = {"normal": NORMAL, "laplace": LAPLACE}[shape]
    if count not in table:
        raise ValueError(f"levels are tabulated for {sorted(table)}; got {count}; try 4")
    return Levels(both(table[count]), block)


def _sign(block: str = "128", scale: str = "mean") -> Levels:
    return Levels((-1.0, 1.0), int(block), fits={"mean": 1, "rms": 0}[scale])


def _ternary(block: str = "160", shape: str = "normal") -> Levels:
    return _levels(3, int(block), shape)


def _lloyd(levels: str = "4", block: str = "128", shape: str = "normal") -> Levels:
    return _levels(int(levels), int(block), shape)


def _stochastic(block: str = "128", reach: str = "1") -> Stochastic:
    return Stochastic(block=int(block), reach=None if reach == "max" else float(reach))


def _top(of: str, bits: str = "2", block: str = "") -> Top:
    kept, chunk = map(int, of.split("/"))
    return Top(kept, chunk, int(bits), int(block) if block else max(chunk, 1024))


def _vector(of: str, block: str = "512") -> Vectors:
    bits, length = map(int, of.split("/"))
    return Vectors(bits, length, int(block))


def _part(count: str, inner: Codec) -> Part:
    return Part(inner, int(count))


def _rotation(kind: str) -> Callable[[str, Codec], Rotated]:
    return lambda size, inner: Rotated(inner, kind, int(size))


PACKING: dict[str, Callable[..., Codec]] = {
    "sign": _sign,
    "ternary": _ternary,
    "lloyd": _lloyd,
    "stochastic": _stochastic,
    "top": _top,
    "vector": _vector,
}
BEFORE: dict[str, Callable[[str, Codec], Codec]] = {
    "part": _part,
    **{kind: _rotation(kind) for kind in ROTATIONS},
}


def codec_named(name: str) -> Codec:
    """Return the codec of a name as at the top of this file. Raises ValueError for another."""
    *before, last = name.split(">")
    kind, *values = last.split(":")
    try:
        codec = PACKING[kind](*values)
        for stage in reversed(before):
            kind, size = stage.split(":")
            codec = BEFORE[kind](size, codec)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"a codec's name is its stages, such as 'hadamard:1024>sign:128'; got {name!r} ({error}); see "
            "benchmarks/rounding.py"
        ) from error
    return codec
