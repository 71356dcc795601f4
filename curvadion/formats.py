"""Formats of numbers, by name and without torch: bytes in memory, bits on the wire."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A floating-point dtype: bytes of an element, and by how much the smallest number above 1 exceeds 1."""

    bytes: int
    eps: float


# By the names of torch's dtypes.
FORMATS = {
    "float64": Format(8, 2.0**-52),
    "float32": Format(4, 2.0**-23),
    "bfloat16": Format(2, 2.0**-7),
    "float16": Format(2, 2.0**-10),
}


def name_of(dtype: object) -> str:
    """Return the name of a torch.dtype: "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


# The values of `outer_bits` that are numbers; those of codecs that round blocks of values to a grid.
GRID_BITS = (8, 4, 2)
OUTER_BITS = (32, 16, *GRID_BITS, 1)
BLOCK = 128  # values that share a scale


def bits_per_value(bits: int, block: int = BLOCK) -> float:
    """Return the bits on the wire of a value with `outer_bits=bits`: its own, and of 8 and fewer its part of
    a bfloat16, the scale that `block` values share."""
    return bits + (16 / block if bits <= 8 else 0.0)
