"""What each parameter of a model is: a hidden matrix, an embedding, an output layer, a gate and so on.

What a parameter is depends on the modules that own it and on its number of dimensions, hardly ever on its
sizes: in a byte-level model the vocabulary can be as large as the width, and then every matrix has the head's
shape. Where names and modules do not tell, what a layer feeds does.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from curvadion.fused import matrix_options
from curvadion.sharding.layout import canonical_name

# The last word of the path of a module that turns hidden states into logits, in the model zoos people start
# from; or the last but one, where a head is a module with layers in it.
HEAD_NAMES = frozenset(
    "head heads lm_head lm_heads output output_layer output_projection embed_out unembed unembedding "
    "to_logits logits classifier score".split()
)
# Last words that an output layer may have as well as another; it feeds no other layer.
OUTPUT_NAMES = re.compile(r"(fc|proj_out|decoder_pred|pred)(_\d+)?$")
# So many times its inputs a layer inside a model may give: scales and shifts of all parts of a block, say.
MOST_PARTS = 12
GATE_NAMES = re.compile(r"(.*_)?(routers?|gate|gating)$")

MATRICES, EMBEDDINGS, HEAD, CONVOLUTIONS, VECTORS, GATES = (
    "matrices",
    "embeddings",
    "head",
    "convolutions",
    "norms_and_biases",
    "gates",
)
UNPLACED = "unplaced"
KINDS = (MATRICES, EMBEDDINGS, HEAD, GATES, CONVOLUTIONS, VECTORS, UNPLACED)


@dataclass
class Placed:
    """One parameter, with every place of the module tree where it stands (more than one when it is tied).

    Attributes:
        tensor: the parameter.
        given_name: as `model.named_parameters()` gives it, so that checkpoints agree.
        names: canonical ones, one for each owner.
        owners, places: the modules that own it, and the words of their paths.
        kind, why: what it is, and what tells.
        holders: the modules that hold the owners.
        options: what a group of such matrices must say of them: `weight_layout`, `batch_dims`, `splits`.
        undecayed: its module says that it wants no weight decay.
    """

    tensor: nn.Parameter
    given_name: str
    names: list[str]
    owners: list[nn.Module]
    places: list[list[str]]
    kind: str = UNPLACED
    why: str = ""
    holders: list[nn.Module] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    undecayed: bool = False

    @property
    def in_out(self) -> bool:
        """Whether a matrix is stored as in x out, the transpose of what `nn.Linear` has."""
        return "weight_layout" in self.options

    @property
    def inputs(self) -> int:
        """What a linear layer takes."""
        return self.tensor.shape[-2 if self.in_out else -1]

    @property
    def outputs(self) -> int:
        """What a linear layer gives."""
        return self.tensor.shape[-1 if self.in_out else -2]

    def parents(self) -> list[list[str]]:
        """Return the paths of the modules that hold the owners."""
        return [path[:-1] for path in self.places]

    def owned_by(self, *types: type, named: str = "(?!)") -> bool:
        """Whether an owner is of one of the types, or of a class (or a subclass of one) whose name holds the
        pattern.

        Names, because a library's own linear layer or embedding need not derive from torch's.
        """
        return any(
            isinstance(owner, types) or any(re.search(named, cls.__name__) for cls in type(owner).__mro__)
            for owner in self.owners
        )

    def is_a(self, kind: str, why: str) -> None:
        """Say what it is."""
        self.kind, self.why = kind, why


def place(parts: list[nn.Module]) -> list[Placed]:
    """List all parameters with their kinds, frozen ones too, in the order of `named_parameters()`, which is
    the same on every rank."""
    parameters = _listed(parts)
    for p in parameters:
        p.options = matrix_options(p.tensor.shape, p.names, p.owners, p.holders)
        p.is_a(*_kind(p))
    _find_gates(parameters)
    for head, why in _heads(parameters, parts):
        if head.kind in (MATRICES, GATES, UNPLACED):
            head.is_a(HEAD, why)
    return parameters


def _listed(parts: list[nn.Module]) -> list[Placed]:
    found: dict[int, Placed] = {}
    for part in parts:
        modules = dict(part.named_modules(remove_duplicate=False))
        unwanted = _without_decay(modules)
        for path, module in modules.items():
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
                p = found.setdefault(id(tensor), Placed(tensor, name, [], [], []))
                # What torch.nn.utils.parametrizations puts between a layer and its weight is no owner.
                owner = path.partition("parametrizations.")[0].removesuffix(".")
                p.names.append(canonical_name(name))
                p.owners.append(modules[owner])
                p.holders.append(modules[owner.rpartition(".")[0]])
                p.places.append(canonical_name(f"{owner}.weight").split(".")[:-1] if owner else [])
                p.undecayed |= bool(getattr(tensor, "_no_weight_decay", False)) or name in unwanted
    return list(found.values())


def _without_decay(modules: dict[str, nn.Module]) -> set[str]:
    """Return the parameters that a `no_weight_decay()` names, as timm's models have it."""
    return {
        f"{path}.{name}" if path else name
        for path, module in modules.items()
        if callable(method := getattr(module, "no_weight_decay", None))
        for name in method()
    }


def _kind(p: Placed) -> tuple[str, str]:
    """Tell what a parameter is from its owners and its dimensions, and why; heads count as matrices here."""
    shape = p.tensor.shape
    if len(shape) < 2:
        return VECTORS, f"{len(shape)} dimensions"
    one_row = sum(size > 1 for size in shape) < 2
    if one_row and any(name.endswith((".weight_g", ".original0")) for name in p.names):
        return VECTORS, "magnitudes of weight_norm"
    # First, because a tied head is an embedding too.
    if len(shape) == 2 and p.owned_by(nn.Embedding, nn.EmbeddingBag, named="Embedding$"):
        return EMBEDDINGS, "an embedding's"
    if len(shape) == 2 and p.owned_by(nn.Linear, nn.MultiheadAttention, named="Linear|^Conv1D$"):
        return (GATES, "one row or column") if 1 in shape else (MATRICES, "a linear layer's")
    if "batch_dims" in p.options:
        return MATRICES, "of experts"
    if all(re.search(r"(^|[._])bias(_[A-Z]+)?$", name) for name in p.names):
        return VECTORS, "a bias"
    # The latter's bias_k and bias_v are 1 x 1 x width.
    if p.owned_by(nn.LayerNorm, nn.MultiheadAttention, named="Norm$"):
        return VECTORS, "a norm's, or a bias"
    if p.owned_by(named="^_ConvNd$"):
        return CONVOLUTIONS, "a convolution's"
    if len(shape) == 2 and p.owned_by(named="(Router|Gate)$"):
        return GATES, "a router's"
    if one_row:
        return VECTORS, "one row"
    return UNPLACED, ""


def _find_gates(parameters: list[Placed]) -> None:
    """Find routers among the matrices: by name, and by the number of experts beside them."""
    experts: Counter[tuple[str, ...]] = Counter()  # by the path of the module that has them
    for p in parameters:
        for path in p.places:
            for k, word in enumerate(path):
                if word.endswith("experts"):
                    number = p.tensor.shape[0] if p.tensor.ndim > 2 else 0
                    if k + 1 < len(path) and path[k + 1].isdigit():
                        number = int(path[k + 1]) + 1
                    experts[tuple(path[:k])] = max(experts[tuple(path[:k])], number)
    for p in parameters:
        if p.kind != MATRICES or p.tensor.ndim > 2:
            continue
        narrow = 2 * p.outputs <= p.inputs
        for path in p.places:
            named = [word for word in path[-2:] if GATE_NAMES.match(word)]
            counts = {experts[tuple(path[:-1])], experts[tuple(path[:-2])] if named else 0} - {0}
            # Of a gated MLP the "gate" is wide, and a matrix like any other.
            if any("router" in word for word in named) or (named and narrow):
                p.is_a(GATES, f"called {named[0]}")
            elif p.outputs in counts and (narrow or named):
                p.is_a(GATES, "as many outputs as experts")


def _heads(parameters: list[Placed], parts: list[nn.Module]) -> list[tuple[Placed, str]]:
    """Find the weights that turn hidden states into logits or other outputs, and what tells; a tied one may
    be among them."""
    told = _output_embeddings(parts)
    wide = [p for p in parameters if p.tensor.ndim == 2]
    heads = [(p, "get_output_embeddings()") for p in wide if id(p.tensor) in told]
    heads += [(p, why) for p in wide if (why := _called_head(p, parameters))]
    embeddings = [p for p in wide if p.kind == EMBEDDINGS]
    tied = any(p.owned_by(nn.Linear, named="Linear") for p in embeddings)
    found = _by_vocabulary(wide, embeddings) if not heads and not tied else []
    heads += [(p, "as many outputs as an embedding has entries") for p in found]
    if not told and not found:
        after = [p for p in _after_blocks(parameters) if not _is_taken(p, parameters)]
        heads += [(p, "after all blocks, and nothing takes its outputs") for p in after]
    vocabulary = max((p.tensor.shape[0] for p in embeddings), default=0)
    inside = [p for p in wide if p.outputs == vocabulary and any(map(_is_numbered, p.places))]
    inside = [p for p in inside if p.kind == MATRICES and not _is_taken(p, parameters)]
    heads += [(p, "in a block, with as many outputs as the largest embedding has entries") for p in inside]
    if not heads and not tied:
        heads += [(p, "the last of layers that feed each other") for p in _ends_a_chain(parameters)]
    return heads


def _output_embeddings(parts: list[nn.Module]) -> set[int]:
    """Return the identities of the parameters of what the outermost `get_output_embeddings()` gives."""
    for module in (module for part in parts for module in part.modules()):
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(head, nn.Module):
            return {id(tensor) for tensor in head.parameters()}
    return set()


def _called_head(p: Placed, parameters: list[Placed]) -> str:
    """Return why the name says that this is an output layer, or nothing: it ends in a head's name outside the
    numbered blocks, as do `head.1`, in a Sequential, and `head.fc`; or in one that many layers have, if it
    feeds none."""
    for path in p.places:
        while path and path[-1].isdigit():
            path = path[:-1]
        if not path or _is_numbered(path):
            continue
        for k, word in enumerate(path[-2:], max(len(path) - 2, 0)):
            if word in HEAD_NAMES and not _feeds_within(p, path[: k + 1], parameters):
                return f"called {word}"
        if OUTPUT_NAMES.match(path[-1]) and p.kind in (MATRICES, GATES):
            if _layers(parameters)[0][-1] is p:
                return f"called {path[-1]}, and nothing comes after it"
            if not _is_taken(p, parameters):
                return f"called {path[-1]}, and nothing takes its outputs"
        if path[-2:] == ["final_layer", "linear"]:
            return "called final_layer.linear"
    return ""


def _feeds_within(p: Placed, head: list[str], parameters: list[Placed]) -> bool:
    """Whether another layer of the same head takes what this one gives: then this one is hidden. Heads side
    by side are of one shape."""
    mates = [
        q for q in parameters if q.tensor.ndim == 2 and any(path[: len(head)] == head for path in q.places)
    ]
    return any(
        q is not p and q.inputs == p.outputs and q.tensor.shape != p.tensor.shape
        for q in mates[next(i for i, q in enumerate(mates) if q is p) + 1 :]
    )


def _is_taken(p: Placed, parameters: list[Placed]) -> bool:
    """Whether a layer may take what this one gives: one in the blocks or after them (in a model without any,
    one that comes later) has so many inputs; or this one gives several times its inputs, as where it makes
    shifts and scales. Layers before the blocks take the model's inputs, which may be as many as its
    outputs."""
    layers, inside = _layers(parameters)
    first = min(inside, default=next(k for k, q in enumerate(layers) if q is p))
    times, rest = divmod(p.outputs, p.inputs)
    return (rest == 0 and times <= MOST_PARTS) or any(
        p.outputs in (q.tensor.shape[:2] if q.kind == CONVOLUTIONS else (q.inputs,))
        for q in layers[first:]
        if q is not p
    )


def _layers(parameters: list[Placed]) -> tuple[list[Placed], list[int]]:
    """Return linear layers and convolutions, and the positions of those in numbered blocks; in a model
    without any, of convolutions."""
    layers = [p for p in parameters if p.kind in (MATRICES, GATES, CONVOLUTIONS) and p.tensor.ndim > 1]
    # A number that ends a path is a layer of a Sequential, which may stand in what follows the blocks.
    inside = [k for k, p in enumerate(layers) if any(_is_numbered(path[:-1]) for path in p.places)]
    return layers, inside or [k for k, p in enumerate(layers) if p.kind == CONVOLUTIONS]


def _after_blocks(parameters: list[Placed]) -> list[Placed]:
    layers, inside = _layers(parameters)
    after = layers[max(inside, default=len(layers)) + 1 :]
    return [p for p in after if p.kind == MATRICES and p.tensor.ndim == 2]


def _ends_a_chain(parameters: list[Placed]) -> list[Placed]:
    """Find the last layers of a perceptron; or, where several stand side by side, as of actor and critic, or
    one behind the other, as encoder and decoder, those of each part whose outputs nothing takes."""
    if found := _last_layers(parameters):
        return found
    parts: dict[str, list[Placed]] = {}
    for p in parameters:
        parts.setdefault("".join(p.places[0][:1]), []).append(p)
    owners = {
        name: [p.owners[-1] for p in part if p.kind in (MATRICES, GATES)] for name, part in parts.items()
    }
    layered = [name for name in parts if owners[name]]
    if len(layered) < 2 or parameters[-1].owners[-1] not in owners[layered[-1]]:
        return []
    return [p for name in layered for p in _last_layers(parts[name]) if not _is_taken(p, parameters)]


def _last_layers(parameters: list[Placed]) -> list[Placed]:
    """Find the last layer of a perceptron, or the last ones, whose outputs nothing takes: what comes before
    are linear layers, each with as many inputs as one before has outputs (the one just before, in numbered
    blocks), and before these convolutions or embeddings only; and what ends the model is this layer. It must
    not give as many outputs as the first linear one takes inputs, as what goes around a block does, but in a
    Sequential, which has no way around."""
    layers = [p for p in parameters if p.kind not in (VECTORS, UNPLACED)]
    linear = [p for p in layers if p.kind in (MATRICES, GATES)]
    first = len(layers) - len(linear)
    if len(layers) < 2 or not linear or any(p.kind not in (MATRICES, GATES) for p in layers[first:]):
        return []
    last = linear[-1]
    if any(p.tensor.ndim > 2 for p in linear) or parameters[-1].owners[-1] is not last.owners[-1]:
        return []
    in_sequence = all(word.isdigit() for p in layers for path in p.places for word in path)
    if not in_sequence and last.outputs == linear[0].inputs:
        return []
    if all(a.outputs == b.inputs for a, b in pairwise(linear)):
        return [last]
    given = [{q.outputs for q in linear[:k]} for k in range(len(linear))]
    fed = all(p.inputs in some for p, some in zip(linear[1:], given[1:], strict=True))
    if not fed or _is_taken(last, parameters) or any(_is_numbered(path[:-1]) for path in last.places):
        return []
    return [p for p in linear if not _is_taken(p, parameters)]


def _by_vocabulary(wide: list[Placed], embeddings: list[Placed]) -> list[Placed]:
    """Find the linear layer with as many outputs as an embedding has entries: of several, the last beside or
    above the embedding in the module tree; if none stands there, the only one or the last outside the
    numbered blocks."""
    sizes = {p.tensor.shape[0] for p in embeddings}
    fitting = [p for p in wide if p.kind == MATRICES and p.outputs in sizes]
    homes = [home for p in embeddings for home in p.parents()]
    beside = [
        p for p in fitting if any(home[: len(parent)] == parent for parent in p.parents() for home in homes)
    ]
    if not beside and len(fitting) > 1:
        fitting = [p for p in fitting if not any(map(_is_numbered, p.places))]
    return (beside or fitting)[-1:]


def _is_numbered(path: list[str]) -> bool:
    return any(word.isdigit() for word in path)
