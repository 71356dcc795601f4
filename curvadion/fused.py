"""Which matrices a weight is, and how they are stored, where its modules tell: fused projections, weights of
experts, transposed layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

# Linear layers that are two or three of the same size, one after the other, in the libraries that have them.
IN_TWO = frozenset({"gate_up_proj"})
IN_THREE = frozenset({"qkv", "Wqkv", "in_proj_weight"})


def matrix_options(
    shape: Sequence[int], names: Sequence[str], owners: Sequence[nn.Module], holders: Sequence[nn.Module]
) -> dict[str, Any]:
    """Return the options of a group that say which matrices a weight is; none for one like any other.

    Args:
        names: all that it has.
        owners, holders: the modules that own it, and those that hold them.
    """
    options: dict[str, Any] = {}
    if len(shape) == 2:
        if _is_in_out(shape, owners):
            options["weight_layout"] = "in_out"
        splits = _splits(shape, names[0], owners[0], holders[0], in_out=bool(options))
        return options | ({"splits": splits} if splits else {})
    return _of_experts(names[0], owners[0]) if len(shape) == 3 else {}


def _named(owner: nn.Module, pattern: str) -> bool:
    return any(re.search(pattern, cls.__name__) for cls in type(owner).__mro__)


def _is_in_out(shape: Sequence[int], owners: Sequence[nn.Module]) -> bool:
    """Tell whether a weight is the transpose of what `nn.Linear` has: that of a Conv1D, of transformers; or
    one whose bias is as long as its rows, not its columns."""
    if any(isinstance(owner, (nn.Linear, nn.Embedding)) for owner in owners):
        return False
    if any(_named(owner, "^Conv1D$") for owner in owners):
        return True
    biases = [getattr(owner, "bias", None) for owner in owners if _named(owner, "Linear")]
    lengths = {tuple(bias.shape) for bias in biases if isinstance(bias, nn.Parameter)}
    rows, columns = shape
    return rows != columns and lengths == {(columns,)}


def _splits(
    shape: Sequence[int], name: str, owner: nn.Module, holder: nn.Module, *, in_out: bool
) -> int | tuple[int, ...] | None:
    """Return the blocks of a fused projection: by its name and a shape that fits, or by what the attention
    says of itself. Not where parts of heads alternate."""
    outputs, inputs = (shape[1], shape[0]) if in_out else shape
    *path, leaf = name.split(".")
    if isinstance(owner, nn.MultiheadAttention):
        return 3 if leaf == "in_proj_weight" else None
    if leaf != "weight" or not path or not _named(owner, "Linear|^Conv1D$"):
        return None
    if path[-1] in IN_TWO:
        return 2 if outputs % 2 == 0 else None
    size = getattr(holder, "split_size", None)  # of GPT-2
    if path[-1] == "c_attn" and isinstance(size, int) and outputs in (2 * size, 3 * size):
        return outputs // size
    if path[-1] in IN_THREE and outputs == 3 * inputs and _named(holder, "Attention"):
        return None if getattr(holder, "head_first", False) else 3
    if path[-1] == "qkv_proj":  # of Phi-3 and its like
        config = getattr(holder, "config", None)
        counts = [getattr(config, "num_attention_heads", 0), getattr(holder, "num_key_value_heads", 0)]
        queries, keys = (n * getattr(holder, "head_dim", 0) for n in counts)
        return (queries, keys, keys) if keys and queries + 2 * keys == outputs else None
    return None


def _of_experts(name: str, owner: nn.Module) -> dict[str, Any]:
    """Return the options of weights of experts, one matrix for each, of the kinds whose layout is known:
    those of torchtitan, and those of transformers that say how they are stored."""
    leaf = name.rpartition(".")[2]
    if _named(owner, "^GroupedExperts$"):
        known = re.fullmatch(r"w[123](_[A-Z]+)?|mlp[12]_weight(_[A-Z]+)?", leaf)
        return {"batch_dims": 1} if known else {}
    in_out = getattr(owner, "is_transposed", None)
    if not isinstance(in_out, bool) or not re.fullmatch("(gate_up|gate|up|down)_proj", leaf):
        return {}
    options: dict[str, Any] = {"batch_dims": 1}
    if in_out:
        options["weight_layout"] = "in_out"
    if (
        leaf == "gate_up_proj"
        and getattr(owner, "has_gate", False)
        and getattr(owner, "is_concatenated", False)
    ):
        options["splits"] = 2
    return options
