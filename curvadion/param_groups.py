"""Parameter groups for a whole model: which parameters CurvaDion takes as matrices, and which go to AdamW or
Lion. What each parameter is, `curvadion.placement` says."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from curvadion.placement import EMBEDDINGS, KINDS, MATRICES, UNPLACED, VECTORS, Placed, place
from curvadion.sharding.layout import reshard_gathered_modules

UNDECAYED = (EMBEDDINGS, VECTORS)

logger = logging.getLogger("curvadion.param_groups")


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
    gates               routers, and linear layers of one row or column      ``"adamw"``
    convolutions        convolution kernels                                  ``"adamw"``
    norms_and_biases    0- and 1-D parameters, others that have one          ``"adamw"``, no weight decay
                        dimension only that is longer than 1, and biases
    ==================  ===================================================  ==============================

    The head is what ``get_output_embeddings()`` returns where a model has it, and any 2-D weight of a module
    called ``lm_head``, ``output``, ``classifier`` or the like, or of a layer in one, outside the numbered
    blocks; of layers one behind the other, the last. A model with neither, and without a linear layer that
    shares its weight with an embedding, is searched for linear layers with as many outputs as an embedding
    has entries: the head is the last of them beside or above the embedding in the module tree; if none stands
    there, the only one, or of several the last one outside the numbered blocks. Linear layers called ``fc``
    or ``proj_out``, and all that come after the numbered blocks (after the convolutions, where there are no
    blocks), are heads if nothing takes their outputs: no layer has so many inputs, and they do not have a few
    times as many outputs as inputs. Those in the blocks with as many outputs as the largest embedding has
    entries are heads too, if nothing takes them. In a model with none of these, and no more than layers that
    feed each other by their widths, the last is the head (or the last ones, side by side; or those of each
    part, as of actor and critic), unless x may go around all of them as around a block: then it gives as many
    outputs as the first takes inputs, and the model is no plain Sequential.

    Gates are linear layers with one row or column; with as many outputs as there are experts beside them; and
    those called ``router``, or ``gate`` if they have no more than half as many outputs as inputs.

    Matrices stored as in x out, such as those of the ``Conv1D`` of transformers, have a group of their own,
    with ``weight_layout="in_out"``. So have fused projections, with ``splits``: ``in_proj_weight`` of
    ``nn.MultiheadAttention``, ``c_attn`` of GPT-2, ``gate_up_proj``, ``qkv`` and ``Wqkv`` of three times as
    many outputs as inputs, ``qkv_proj`` where the attention says how many heads there are; and 3-D weights of
    experts, with ``batch_dims=1``, of torchtitan's ``GroupedExperts`` and of those modules of transformers
    that say how they are stored. Others need an override, see docs/models.md.

    What was found, and by what, is logged at INFO by ``curvadion.param_groups``. A parameter with
    ``_no_weight_decay = True``, or named by a module's ``no_weight_decay()``, has no weight decay;
    ``fully_shard``, which replaces parameters, drops the former, and not the latter.

    Sharded parameters (``DTensor``), wrapped modules (``torch.compile``, activation checkpointing, DDP) and a
    list of model parts (pipeline stages) are understood. Frozen parameters are left out, and so are empty
    groups. Call it after ``fully_shard``, ``parallelize_module`` and the like, which replace parameters. What
    FSDP2 keeps gathered, after a forward without a backward say, is resharded.

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
    reshard_gathered_modules()  # or parameters would be copies that FSDP2 frees
    # Frozen ones are placed too: a frozen embedding still tells which layer is the head.
    parameters = [parameter for parameter in place(_parts(model)) if parameter.tensor.requires_grad]
    if not parameters:
        raise ValueError("A model must have a trainable parameter; this one has none. Is all of it frozen?")

    members: dict[tuple[int, int, bool, str], list[Placed]] = {}
    unplaced: list[Placed] = []
    for parameter in parameters:
        rule = next(i for i, (pattern, _) in enumerate(rules) if any(map(pattern.search, parameter.names)))
        if parameter.kind == UNPLACED and "algorithm" not in rules[rule][1]:
            unplaced.append(parameter)
        undecayed = parameter.undecayed and parameter.kind not in UNDECAYED
        key = KINDS.index(parameter.kind), rule, undecayed, _words(parameter.options)
        members.setdefault(key, []).append(parameter)
    if unplaced:
        raise ValueError(_unplaced_message(unplaced, len(parameters)))
    used = {rule for _, rule, *_ in members}
    if idle := [repr(pattern.pattern) for i, (pattern, _) in enumerate(rules[:-1]) if i not in used]:
        raise ValueError(
            f"Every pattern in overrides must decide at least one trainable parameter; {', '.join(idle)} "
            "decided none: no name matches, or only frozen parameters do, or an earlier pattern took all "
            "that do. The names are those of model.named_parameters() without wrapper prefixes, here "
            f"{', '.join(repr(parameter.names[0]) for parameter in parameters[:3])} and so on."
        )

    groups = []
    for (index, rule, undecayed, words), group_members in sorted(members.items(), key=lambda item: item[0]):
        kind, (pattern, changes) = KINDS[index], rules[rule]
        label = kind + words + " without decay" * undecayed
        group: dict[str, Any] = {
            "name": f"{label}: {pattern.pattern}" if pattern.pattern else label,
            "params": [(parameter.given_name, parameter.tensor) for parameter in group_members],
            "algorithm": changes.get("algorithm", "dion" if kind == MATRICES else scalar_algorithm),
        }
        if group["algorithm"] != "dion":
            # A scheduler multiplies a tensor in place, once for each group.
            group["lr"] = adamw_lr.clone() if isinstance(adamw_lr, Tensor) else adamw_lr
        if undecayed or kind in UNDECAYED:
            group["weight_decay"] = 0.0
        if group["algorithm"] == "dion":
            group |= group_members[0].options
        groups.append(group | changes)
        _log(groups[-1], group_members)
    return groups


def _words(options: Mapping[str, Any]) -> str:
    """Return the options of matrices in words, as part of the name of their group."""
    splits, words = options.get("splits"), ""
    if "batch_dims" in options:
        words += " of experts"
    if "weight_layout" in options:
        words += " stored as in x out"
    if splits is not None:
        words += f" split in {splits if isinstance(splits, int) else ' + '.join(map(str, splits))}"
    return words


def _log(group: Mapping[str, Any], members: Sequence[Placed]) -> None:
    """Log where parameters go and why, those of all numbered blocks in one line."""
    alike = Counter((_for_all_blocks(p, "*"), tuple(p.tensor.shape), p.why) for p in members)
    for (name, shape, why), count in alike.items():
        what = f"{name} {shape}" + (f" x {count}" if count > 1 else "")
        logger.info("%s, %s: %s (%s)", group["name"], group["algorithm"], what, why or "an override")


def _for_all_blocks(p: Placed, number: str) -> str:
    return ".".join(number if word.isdigit() else word for word in p.names[0].split("."))


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


def _parts(model: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    parts = list(model) if isinstance(model, Iterable) and not isinstance(model, nn.Module) else [model]
    for part in parts:
        if not isinstance(part, nn.Module):
            raise TypeError(
                f"param_groups_for takes a module or a list of modules, got {type(part).__name__}. "
                "Pass the model itself, not model.parameters()."
            )
    return parts


def _unplaced_message(unplaced: list[Placed], total: int) -> str:
    width = max(len(parameter.names[0]) for parameter in unplaced)
    rows = [
        f"    {p.names[0]:<{width}}  {tuple(p.tensor.shape)} owned by {type(p.owners[0]).__name__}"
        for p in unplaced
    ]
    # One pattern for the same parameter of all blocks.
    overrides = dict.fromkeys(f'r"^{_pattern(p)}$": {_suggested(p)}' for p in unplaced)
    return "\n".join(
        (
            f"Every trainable parameter needs an algorithm, and {len(unplaced)} of {total} could not be "
            "placed:",
            *rows,
            "Placed are 0- and 1-D parameters, embeddings, convolutions, biases, 2-D weights of linear and "
            "attention layers, and those weights of experts whose layout is known.",
            'Say what the others are ("adamw", "lion", or "dion" if 2-D; for weights of experts, each out x '
            'in, {"algorithm": "dion", "batch_dims": 1}), for example:',
            f"    param_groups_for(model, overrides={{{', '.join(overrides)}}})",
        )
    )


def _pattern(p: Placed) -> str:
    words = p.names[0].split(".")
    return r"\.".join(r"\d+" if word.isdigit() else re.escape(word) for word in words)


def _suggested(p: Placed) -> str:
    """Return an override in writing: positions, class tokens, decay rates and the like are no weights, and
    have no weight decay; those of experts, of recurrent layers and of projections are."""
    named = f"{p.names[0]} {type(p.owners[0]).__name__}"
    of_experts = "expert" in named.lower() and p.tensor.ndim > 2
    if of_experts or re.search(r"(^|[._])(weight_[ih]h|proj|projection)[^.]*$", p.names[0]):
        return '"adamw"'
    return '{"algorithm": "adamw", "weight_decay": 0.0}'
