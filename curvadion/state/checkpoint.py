"""Loading a state dict into the existing state, and what a checkpoint must hold for that."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvadion.algebra.power_iteration import rank_of
from curvadion.allowed import check_options
from curvadion.options import group_options
from curvadion.rules import RULES
from curvadion.sharding.layout import local_tensor
from curvadion.state.batch import first_right_factor
from curvadion.state.store import States, assign
from curvadion.state.table import Table


def load(
    optimizer: torch.optim.Optimizer,
    table: Table,
    own: States,
    load_state_dict: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    loaded: Callable[[], None],
) -> None:
    """Let torch load a state dict, but copy the values into the existing state, dtypes and memory kept.

    Args:
        optimizer: whose `param_groups` torch replaces by the saved ones.
        own: its state.
        load_state_dict: torch's.
        loaded: called when the values are there, before any hook of the user's.

    Raises:
        ValueError: it does not fit; nothing was changed.
    """
    groups = optimizer.param_groups
    saved: dict[str, Any] = {}

    def saved_states() -> list[tuple[Tensor, dict[str, Any]]]:
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        number_of = dict(zip(table.listed, numbers, strict=True))
        return [(p, saved["state"].get(number_of[p], {})) for p in table.params]

    def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
        saved.update(final)
        sizes = [len(group["params"]) for group in groups]
        if [
            len(group["params"]) for group in saved["param_groups"]
        ] == sizes:  # otherwise torch says what is wrong
            members = zip(table.names, table.group_of, saved_states(), strict=True)
            check_loadable(
                saved["param_groups"],
                groups,
                [(name, index, values, own[p]) for name, index, (p, values) in members],
            )

    def restore(_: torch.optim.Optimizer) -> None:
        optimizer.state = own  # type: ignore[assignment]  # torch made copies, cast to the parameters' dtype
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            for key in group_options().keys() & before.keys():
                group.setdefault(key, before[key])
        for name, layout, (p, values) in zip(table.names, table.layouts, saved_states(), strict=True):
            for key, value in values.items():
                if key in own[p]:
                    assign(own[p][key], value)
            if "Q" in own[p].keys() - values.keys():
                Q = local_tensor(own[p]["Q"])
                Q.copy_(first_right_factor(name, layout, Q.shape[-1]))
        loaded()

    # The last hook before torch casts every state to its parameter's dtype, and the first one after.
    handles = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        load_state_dict(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def check_loadable(
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    states: Iterable[tuple[str, int, Mapping[str, Any], Mapping[str, Tensor]]],
) -> None:
    """Raise ValueError if a checkpoint does not fit.

    Q may be on one side alone where the local rule of the checkpoint's group does not use it: nobody wants
    what was saved, or nobody has moved it, so that it starts at its first value.

    Args:
        saved_groups, groups: parameter groups of the checkpoint and of the optimizer.
        states: (name, index of its group, saved state, own state) of every parameter.
    """
    for group, saved in zip(groups, saved_groups, strict=True):
        check_options(saved, group_options(), " in a parameter group of the checkpoint")
        if saved.get("algorithm", group["algorithm"]) != group["algorithm"]:
            raise ValueError(
                f"a checkpoint must hold the same algorithm for each group; got {saved['algorithm']!r} for "
                f"a group with {group['algorithm']!r}; build the groups as they were when it was saved"
            )
    for name, index, saved, own in states:
        rule = RULES[saved_groups[index].get("local_update", groups[index]["local_update"])]
        spare = {"Q"} if groups[index]["algorithm"] == "dion" and not rule.uses_Q else set()
        missing, unknown = sorted(set(own) - set(saved) - spare), sorted(set(saved) - set(own) - spare)
        if missing or unknown:
            raise ValueError(
                f"a checkpoint must hold exactly {sorted(own)} for {name!r}; missing {missing}, unknown "
                f"{unknown}; load one that CurvaDion saved for the same groups"
            )
        for key, value in saved.items():
            if key not in own:
                continue
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if shape != tuple(own[key].shape):
                raise ValueError(
                    f"a checkpoint must hold state of the same shape; got {key} {shape} for {name!r}, "
                    f"expected {tuple(own[key].shape)}; construct with the rank_fraction and "
                    "rank_multiple_of it was saved with"
                )
        if groups[index]["algorithm"] == "dion":
            short = min(own["momentum"].shape)
            saved_rank, rank = (
                _rank(short, group, groups[index]) for group in (saved_groups[index], groups[index])
            )
            if saved_rank != rank:
                raise ValueError(
                    f"a checkpoint must be of the same rank; got r = {saved_rank} for {name!r}, expected "
                    f"{rank}; construct with the rank_fraction and rank_multiple_of it was saved with"
                )


def _rank(short: int, group: Mapping[str, Any], instead: Mapping[str, Any]) -> int:
    """Return the rank that a group's options say; what it lacks comes from the other."""
    fraction, multiple = (group.get(k, instead[k]) for k in ("rank_fraction", "rank_multiple_of"))
    return rank_of(short, fraction, multiple)
