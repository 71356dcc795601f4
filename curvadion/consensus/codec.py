"""What crosses replicas in few bits: blocks of values rounded to a uniform grid with one scale each. No
ranks.

A codec's error is the caller's to keep (error feedback): `x = decode(encode(x)) + residual`.

Source: Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014, for few bits with error feedback;
Karimireddy et al., "Error Feedback Fixes SignSGD", arXiv:1901.09847, for why that converges.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvadion import formats
from curvadion.allowed import Option
from curvadion.sharding.journey import Codec
from curvadion_kernels import Ops, choose
from curvadion_kernels.reference import SIGN_BLOCK, SIGN_BYTES

# The step of the best uniform grid for a normal distribution, in standard deviations (Max, "Quantizing for
# minimum distortion", 1960).
NORMAL_STEP = {2: 0.996}


@dataclass(frozen=True)
class Grid:
    """Rounds each block of 128 values to 2^bits levels, symmetric around zero and without zero.

        value = (code + 1/2 - 2^(bits-1)) step
        2 bits: step = 0.996 sqrt(mean x^2)    4, 8 bits: step = 2 max|x| / 2^bits

    The step is a bfloat16. A block of zeros is exact, one with a NaN or an infinity to none that are finite.

    Attributes:
        bits: 2, 4 or 8.
    """

    bits: int
    block: ClassVar[int] = formats.BLOCK

    @property
    def bits_per_value(self) -> float:
        """Bits on the wire, the block's scale included."""
        return formats.bits_per_value(self.bits, self.block)

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8, of a flat tensor whose length is a multiple of block; each block's are
        together."""
        x = x.view(-1, self.block)
        levels = 1 << self.bits
        if self.bits == 2:
            # In float64, where no square of a float32 overflows or is lost.
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
            step = NORMAL_STEP[2] / math.sqrt(self.block) * length
        else:
            step = x.abs().amax(-1, keepdim=True) * (2 / levels)
        step = step.to(torch.bfloat16)
        wide = step.to(x.dtype)
        codes = torch.where(wide > 0, x / wide, 0.0).floor_().add_(levels // 2)
        codes = codes.nan_to_num_(0.0).clamp_(0, levels - 1).to(torch.uint8)
        per_byte = 8 // self.bits
        shifts = torch.arange(per_byte, dtype=torch.uint8, device=x.device) * self.bits
        packed = (codes.view(len(x), -1, per_byte) << shifts).sum(-1, dtype=torch.uint8)
        return torch.cat([step.view(torch.uint8), packed], dim=-1).view(-1)

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, flat, in `dtype`."""
        payload = payload.view(-1, 2 + self.block * self.bits // 8)
        step = payload[:, :2].contiguous().view(torch.bfloat16).to(dtype)
        levels, per_byte = 1 << self.bits, 8 // self.bits
        shifts = torch.arange(per_byte, dtype=torch.uint8, device=payload.device) * self.bits
        codes = (payload[:, 2:].unsqueeze(-1) >> shifts).view(len(payload), self.block) & (levels - 1)
        return (codes.to(dtype).add_(0.5 - levels // 2) * step).view(-1)


@dataclass(frozen=True)
class Sign:
    """Rounds each value to its sign times the mean |x| of its block of 128, see `reference.sign_encode_`.

    Attributes:
        ops: where its operations come from.
    """

    ops: Ops = field(default_factory=choose)
    block: ClassVar[int] = SIGN_BLOCK
    bits_per_value: ClassVar[float] = formats.bits_per_value(1, SIGN_BLOCK)

    def on(self, ops: Ops) -> "Sign":
        """Return the same with other operations."""
        return Sign(ops)

    def encode_(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return the bytes of residual + x, whose error is the new residual."""
        return self.ops.sign_encode_(residual, x)

    def decode_(self, values: Tensor, payloads: Tensor) -> None:
        """Replace the values by the mean of what the payloads, one a row, stand for."""
        self.ops.sign_decode_(values, payloads)

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8, of a flat tensor whose length is a multiple of block."""
        return self.encode_(x.clone(), x[:0])

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, flat, in `dtype`."""
        values = payload.new_empty(payload.numel() // SIGN_BYTES * self.block, dtype=dtype)
        self.decode_(values, payload.unsqueeze(0))
        return values


class Bfloat16:
    """Rounds each value to bfloat16."""

    block = formats.BLOCK  # so that buffers are as long as those of the other codecs
    bits_per_value = formats.bits_per_value(16)

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8, of a flat tensor."""
        return x.to(torch.bfloat16).view(torch.uint8)

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, flat, in `dtype`."""
        return payload.view(torch.bfloat16).to(dtype)


# The values of `outer_bits`. None rounds nothing: one all-reduce in the dtype of the computation. A class is
# called with the optimizer's options.
CODECS: dict[int | str, Codec | type[Any] | None] = {
    32: None,
    16: Bfloat16(),
    **{bits: Grid(bits) for bits in formats.GRID_BITS},
    1: Sign(),
}


def register_codec(name: str, codec: Codec | type[Any]) -> None:
    """Make a codec known as `outer_bits=name`, on every rank and before an optimizer is built.

    Args:
        codec: serves all optimizers; or a class that is called with each one's options by name, and may
            declare some in `options`.

    Raises ValueError if the name is taken.
    """
    if name in CODECS:
        raise ValueError(f"a codec's name must be new; got {name!r}, which there is already; choose another")
    CODECS[name] = codec


def codec_of(name: int | str, options: Mapping[str, Any]) -> Codec | None:
    """Return the codec of `outer_bits=name` in an optimizer of these options; None rounds nothing."""
    codec = CODECS[name]
    return codec(options) if isinstance(codec, type) else codec


def bits_per_value(name: int | str, **options: Any) -> float:
    """Return the bits on the wire of a value sent with `outer_bits=name` and options that it declares."""
    declared: Mapping[str, Option] = getattr(CODECS[name], "options", {})
    codec = codec_of(name, {**{key: option.default for key, option in declared.items()}, **options})
    return formats.bits_per_value(32) if codec is None else codec.bits_per_value
