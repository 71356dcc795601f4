"""Parameter groups for a whole model: which parameters CurvaDion takes as matrices, and which go to AdamW or
Lion.

What a parameter is depends on the modules that own it and on its number of dimensions, hardly ever on its
sizes: in a byte-level model the vocabulary can be as large as the width, and then every matrix has the head's
shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvadion.sharding.layout import canonical_name

# The last word of the path of a module that turns hidden states into logits, in the model zoos people start
# from.
HEAD_NAMES = frozenset(
    "head heads lm_head lm_heads output output_layer output_projection embed_out unembed unembedding "
    "to_logits logits classifier score".split()
)

MATRICES, EMBEDDINGS, HEAD, CONVOLUTIONS, VECTORS = (
    "matrices",
    "embeddings",
    "head",
    "convolutions",
    "norms_and_biases",
)
UNPLACED = "unplaced"
KINDS = (MATRICES, EMBEDDINGS, HEAD, CONVOLUTIONS, VECTORS, UNPLACED)
UNDECAYED = (EMBEDDINGS, VECTORS)


def param_groups_for(
    model: nn.Module | Iterable[nn.Module],
    *,
    adamw_lr: float | Tensor = 3e-3,
    scalar_algorithm: Literal["adamw", "lion"] = "adamw",
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    r"""Sort a model's trainable parameters into groups for :class:`CurvaDion`.

    ==================  ===================================================  ==============================
    group ``name``      parameters                                           options
    ==================  ===================================================  ==============================
    matrices            2-D weights of linear layers and attention modules   ``"dion"``; lr of the optimizer
    embeddings          embedding tables; also the head, if they are tied    ``"adamw"``, no weight decay
    head                the untied output projection                         ``"adamw"``
    convolutions        convolution kernels                                  ``"adamw"``
    norms_and_biases    0- and 1-D parameters, whatever their module         ``"adamw"``, no weight decay
    ==================  ===================================================  ==============================

    The head is what ``get_output_embeddings()`` returns where a model has it, and any 2-D weight of a module
    called ``lm_head``, ``output``, ``classifier`` or the like, outside the numbered blocks. A model with
    neither, and without a linear layer that shares its weight with an embedding, is searched for linear
    layers with as many outputs as an embedding has entries: the head is the last of them beside or above the
    embedding in the module tree; if none stands there, the only one, or of several the last one outside the
    numbered blocks.

    Sharded parameters (``DTensor``), wrapped modules (``torch.compile``, activation checkpointing, DDP) and a
    list of model parts (pipeline stages) are understood. Frozen parameters are left out, and so are empty
    groups. Call it after ``fully_shard``, ``parallelize_module`` and the like, which replace parameters.

    ``transformers.pytorch_utils.Conv1D`` stores its weight as in x out. Such a weight is a matrix like any
    other, but the scale sqrt(rows / columns) of its update is then that of the transposed layer.

    Args:
        model: a module, or the parts of one.
        adamw_lr: learning rate of every group that is not ``"dion"``. Lion wants it 3 to 10 times smaller
            than AdamW.
        scalar_algorithm: ``"adamw"`` or ``"lion"``, for all that is not a matrix.
        overrides: from a pattern to an algorithm or to a mapping of group options, which replace those that
            the parameters would have had. The pattern is searched for in the names with ``re.search``;
            wrapper prefixes are stripped, a tied parameter answers to all its names, the first pattern that
            matches wins. For example ``{r"\.router\.": "adamw", r"^lm_head": {"lr": 3e-4, "weight_decay":
            0.1}}``.

    Returns:
        Groups of named parameters, ``{"name": ..., "params": [(name, parameter), ...], "algorithm": ...,
        ...}``.

    Raises:
        ValueError: parameters that none of this places, all of them at once, with the overrides to write; a
            pattern that decides nothing; parameters that are flattened or not yet initialized; nothing to
            train.
        TypeError: the model is not a module, or an override neither a string nor a mapping.
    """
    if scalar_algorithm not in ("adamw", "lion"):
        raise ValueError(f'scalar_algorithm must be "adamw" or "lion", got {scalar_algorithm!r}.')
    # The last rule takes what no pattern claims, as it is.
    rules = [
        *(_override(pattern, value) for pattern, value in (overrides or {}).items()),
        (re.compile(""), {}),
    ]
    # Frozen ones are placed too: a frozen embedding still tells which layer is the head.
    parameters = [
        parameter for parameter in _placed_parameters(_parts(model)) if parameter.tensor.requires_grad
    ]
    if not parameters:
        raise ValueError("A model must have a trainable parameter; this one has none. Is all of it frozen?")

    members: dict[tuple[int, int], list[_Parameter]] = {}
    unplaced: list[_Parameter] = []
    for parameter in parameters:
        rule = next(i for i, (pattern, _) in enumerate(rules) if any(map(pattern.search, parameter.names)))
        if parameter.kind == UNPLACED and "algorithm" not in rules[rule][1]:
            unplaced.append(parameter)
        members.setdefault((KINDS.index(parameter.kind), rule), []).append(parameter)
    if unplaced:
        raise ValueError(_unplaced_message(unplaced, len(parameters)))
    used = {rule for _, rule in members}
    if idle := [repr(pattern.pattern) for i, (pattern, _) in enumerate(rules[:-1]) if i not in used]:
        raise ValueError(
            f"Every pattern in overrides must decide at least one trainable parameter; {', '.join(idle)} "
            "decided none: no name matches, or only frozen parameters do, or an earlier pattern took all "
            "that do. The names are those of model.named_parameters() without wrapper prefixes, here "
            f"{', '.join(repr(parameter.names[0]) for parameter in parameters[:3])} and so on."
        )

    groups = []
    for (index, rule), group_members in sorted(members.items(), key=lambda item: item[0]):
        kind, (pattern, changes) = KINDS[index], rules[rule]
        group: dict[str, Any] = {
            "name": f"{kind}: {pattern.pattern}" if pattern.pattern else kind,
            "params": [(parameter.given_name, parameter.tensor) for parameter in group_members],
            "algorithm": changes.get("algorithm", "dion" if kind == MATRICES else scalar_algorithm),
        }
        if group["algorithm"] != "dion":
            # A scheduler multiplies a tensor in place, once for each group.
            group["lr"] = adamw_lr.clone() if isinstance(adamw_lr, Tensor) else adamw_lr
        if kind in UNDECAYED:
            group["weight_decay"] = 0.0
        groups.append(group | changes)
    return groups


def _override(pattern: str, value: str | Mapping[str, Any]) -> tuple[re.Pattern[str], dict[str, Any]]:
    """Compile a pattern, and write its value as group options."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"A key of overrides must be a regular expression; {pattern!r} is not one: {error}. "
            "re.escape() makes a pattern of a plain name."
        ) from error
    if isinstance(value, str):
        return compiled, {"algorithm": value}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"A value of overrides must be an algorithm or a mapping of group options; {pattern!r} has "
            f"{value!r}. "
            'Write "adamw", or {"algorithm": "adamw", "lr": 3e-4}.'
        )
    if "params" in value:
        raise ValueError(
            f"An override chooses its parameters by the pattern; drop 'params' from that of {pattern!r}."
        )
    return compiled, dict(value)


@dataclass
class _Parameter:
    """One trainable parameter, with every place of the module tree where it stands (more than one when it is
    tied)."""

    tensor: nn.Parameter
    given_name: str  # as model.named_parameters() gives it, so that checkpoints agree
    names: list[str]  # canonical, one for each owner
    owners: list[nn.Module]
    kind: str = UNPLACED

    def paths(self) -> list[list[str]]:
        """The owners' paths, as words."""
        return [name.split(".")[:-1] for name in self.names]

    def parents(self) -> list[list[str]]:
        """The paths of the modules that hold the owners."""
        return [path[:-1] for path in self.paths()]

    def owned_by(self, *types: type, named: str = "(?!)") -> bool:
        """Whether an owner is of one of the types, or of a class (or a subclass of one) whose name holds the
        pattern.

        Names, because a library's own linear layer or embedding need not derive from torch's.
        """
        return any(
            isinstance(owner, types) or any(re.search(named, cls.__name__) for cls in type(owner).__mro__)
            for owner in self.owners
        )


def _parts(model: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    parts = list(model) if isinstance(model, Iterable) and not isinstance(model, nn.Module) else [model]
    for part in parts:
        if not isinstance(part, nn.Module):
            raise TypeError(
                f"param_groups_for takes a module or a list of modules, got {type(part).__name__}. "
                "Pass the model itself, not model.parameters()."
            )
    return parts


def _placed_parameters(parts: list[nn.Module]) -> list[_Parameter]:
    """List the parameters with their kinds, in the order of `named_parameters()`, which is the same on every
    rank."""
    found: dict[int, _Parameter] = {}
    for path, module in (named for part in parts for named in part.named_modules(remove_duplicate=False)):
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise ValueError(
                "Matrices must keep their two dimensions, and FullyShardedDataParallel flattens them. "
                "Shard the model with torch.distributed.fsdp.fully_shard."
            )
        for leaf, tensor in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if is_lazy(tensor):
                raise ValueError(
                    f"Parameters must have their shape, and {name!r} is not initialized yet. "
                    "Run the model on a batch before param_groups_for."
                )
            parameter = found.setdefault(id(tensor), _Parameter(tensor, name, [], []))
            parameter.names.append(canonical_name(name))
            parameter.owners.append(module)

    parameters = list(found.values())
    for parameter in parameters:
        parameter.kind = _kind(parameter)
    for head in _heads(parameters, _output_embeddings(parts)):
        if head.kind in (MATRICES, UNPLACED):
            head.kind = HEAD
    return parameters


def _kind(parameter: _Parameter) -> str:
    """Tell what a parameter is from its owners and its number of dimensions; heads count as matrices here."""
    ndim = parameter.tensor.ndim
    if ndim < 2:
        return VECTORS
    # First, because a tied head is an embedding too.
    if ndim == 2 and parameter.owned_by(nn.Embedding, nn.EmbeddingBag, named="Embedding$"):
        return EMBEDDINGS
    if ndim == 2 and parameter.owned_by(nn.Linear, nn.MultiheadAttention, named="Linear|^Conv1D$"):
        return MATRICES
    # The latter's bias_k and bias_v are 1 x 1 x width.
    if parameter.owned_by(nn.LayerNorm, nn.MultiheadAttention, named="Norm$"):
        return VECTORS
    if parameter.owned_by(named="^_ConvNd$"):
        return CONVOLUTIONS
    return UNPLACED


def _output_embeddings(parts: list[nn.Module]) -> set[int]:
    """Return the identities of the parameters of what the outermost `get_output_embeddings()` gives."""
    for module in (module for part in parts for module in part.modules()):
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(head, nn.Module):
            return {id(tensor) for tensor in head.parameters()}
    return set()


def _heads(parameters: list[_Parameter], output_embeddings: set[int]) -> list[_Parameter]:
    """Find the weights that turn hidden states into logits; a tied one may be among them."""
    wide = [parameter for parameter in parameters if parameter.tensor.ndim == 2]
    heads = [p for p in wide if id(p.tensor) in output_embeddings or any(map(_is_head, p.paths()))]
    embeddings = [p for p in wide if p.kind == EMBEDDINGS]
    if heads or any(p.owned_by(nn.Linear, named="Linear") for p in embeddings):
        return heads

    sizes = {p.tensor.shape[0] for p in embeddings}
    fitting = [p for p in wide if p.kind == MATRICES and p.tensor.shape[0] in sizes]
    homes = [home for p in embeddings for home in p.parents()]
    beside = [
        p for p in fitting if any(home[: len(parent)] == parent for parent in p.parents() for home in homes)
    ]
    if not beside and len(fitting) > 1:
        fitting = [p for p in fitting if not any(map(_is_numbered, p.paths()))]
    return (beside or fitting)[-1:]


def _is_head(path: list[str]) -> bool:
    """Whether a path ends in a head's name outside the numbered blocks; `head.1`, in a Sequential, does
    too."""
    while path and path[-1].isdigit():
        path = path[:-1]
    return bool(path) and path[-1] in HEAD_NAMES and not _is_numbered(path)


def _is_numbered(path: list[str]) -> bool:
    return any(word.isdigit() for word in path)


def _unplaced_message(unplaced: list[_Parameter], total: int) -> str:
    width = max(len(parameter.names[0]) for parameter in unplaced)
    rows = [
        f"    {p.names[0]:<{width}}  {tuple(p.tensor.shape)} owned by {type(p.owners[0]).__name__}"
        for p in unplaced
    ]
    # One pattern for the same parameter of all blocks.
    patterns = dict.fromkeys(
        r"\.".join(r"\d+" if word.isdigit() else re.escape(word) for word in parameter.names[0].split("."))
        for parameter in unplaced
    )
    overrides = ", ".join(f'r"^{pattern}$": "adamw"' for pattern in patterns)
    return "\n".join(
        (
            f"Every trainable parameter needs an algorithm, and {len(unplaced)} of {total} could not be "
            "placed:",
            *rows,
            "Placed are 0- and 1-D parameters, embeddings, convolutions, 2-D weights of linear and "
            "attention layers.",
            'Say what the others are ("adamw", "lion", or "dion" if 2-D), for example:',
            f"    param_groups_for(model, overrides={{{overrides}}})",
        )
    )
