"""What crosses replicas in few bits: blocks of values rounded to a uniform grid with one scale each. Pure functions, no ranks.

A codec's error is the caller's to keep (error feedback): `x = decode(encode(x)) + residual`.

Source: Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014, for few bits with error feedback; Karimireddy et al., "Error
Feedback Fixes SignSGD", arXiv:1901.09847, for why that converges.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128  # values that share one bfloat16 scale
# The step of the best uniform grid for a normal distribution, in standard deviations (Max, "Quantizing for minimum distortion", 1960).
NORMAL_STEP = {2: 0.996}


@dataclass(frozen=True)
class Codec:
    """Rounds each block of BLOCK values to 2^bits levels, symmetric around zero and without zero, (code + 1/2 - 2^(bits-1)) * step.

        1 bit: step = 2 mean|x|        2 bits: step = 0.996 sqrt(mean x^2)        4, 8 bits: step = 2 max|x| / 2^bits

    A block of zeros is exact, and a block with a NaN or an infinity decodes to NaN.

    Attributes:
        bits: 1, 2, 4 or 8; or 16, bfloat16 without scales.
    """

    bits: int

    def nbytes(self, numel: int) -> int:
        """Return the bytes of `numel` values, a multiple of BLOCK, scales included."""
        return numel // BLOCK * self._block_bytes

    @property
    def _block_bytes(self) -> int:
        return 2 * BLOCK if self.bits == 16 else 2 + BLOCK * self.bits // 8

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes, (nbytes,) uint8, of a flat tensor whose length is a multiple of BLOCK. Each block's bytes are together."""
        if self.bits == 16:
            return x.to(torch.bfloat16).view(torch.uint8)
        x = x.view(-1, BLOCK)
        levels = 1 << self.bits
        if self.bits == 1:
            step = 2 * x.abs().mean(-1, keepdim=True)
        elif self.bits == 2:
            step = NORMAL_STEP[2] * x.square().mean(-1, keepdim=True).sqrt()
        else:
            step = x.abs().amax(-1, keepdim=True) * (2 / levels)
        step = step.to(torch.bfloat16)
        wide = step.to(x.dtype)
        codes = torch.where(wide > 0, x / wide, 0.0).floor_().add_(levels // 2).nan_to_num_(0.0).clamp_(0, levels - 1).to(torch.uint8)
        per_byte = 8 // self.bits
        shifts = torch.arange(per_byte, dtype=torch.uint8, device=x.device) * self.bits
        packed = (codes.view(len(x), -1, per_byte) << shifts).sum(-1, dtype=torch.uint8)
        return torch.cat([step.view(torch.uint8), packed], dim=-1).view(-1)

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, flat, in `dtype`."""
        if self.bits == 16:
            return payload.view(torch.bfloat16).to(dtype)
        payload = payload.view(-1, self._block_bytes)
        step = payload[:, :2].contiguous().view(torch.bfloat16).to(dtype)
        levels, per_byte = 1 << self.bits, 8 // self.bits
        shifts = torch.arange(per_byte, dtype=torch.uint8, device=payload.device) * self.bits
        codes = (payload[:, 2:].unsqueeze(-1) >> shifts).view(len(payload), BLOCK) & (levels - 1)
        return (codes.to(dtype).add_(0.5 - levels // 2) * step).view(-1)


def padded(x: Tensor, multiple: int) -> Tensor:
    """Return a flat tensor with zeros at its end, so that its length is a multiple."""
    return pad(x, (0, -x.numel() % multiple))
