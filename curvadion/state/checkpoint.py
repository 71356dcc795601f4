"""Loading a state dict into the existing state, and what a checkpoint must hold for that."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvadion.algebra.power_iteration import rank_of
from curvadion.options import check_group, group_options
from curvadion.rules import RULES
from curvadion.sharding.layout import canonical_name, local_tensor
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

    def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> dict[str, Any]:
        check_form(final)
        saved.update(in_order(final, groups))
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
        return saved

    def restore(_: torch.optim.Optimizer) -> None:
        optimizer.state = own  # type: ignore[assignment]  # torch made copies, cast to the parameters' dtype
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            for key in group_options():
                if key in before:
                    group.setdefault(key, before[key])
            if "param_names" in before:  # in their order, which the saved names may not be in
                group["param_names"] = before["param_names"]
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


def check_form(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError if it does not look like any optimizer's state dict."""
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if (
        not isinstance(state, Mapping)
        or not isinstance(groups, Sequence)
        or not all(isinstance(group, Mapping) and "params" in group for group in groups)
        or not all(isinstance(values, Mapping) for values in state.values())
    ):
        raise ValueError(
            "a checkpoint must hold 'state' and 'param_groups', as opt.state_dict() returns them; got "
            f"{sorted(map(str, state_dict))}; pass the optimizer's part of what was saved"
        )


def in_order(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a state dict whose groups list their parameters in the order of the optimizer's, by their names.

    Where either side has none, or torch has put them in order by name itself, they stay as they are.

    Raises:
        ValueError: names differ.
    """
    ordered = []
    for number, saved in enumerate(state_dict["param_groups"]):
        ordered.append(saved)
        group = groups[number] if number < len(groups) else {}
        theirs, params = saved.get("param_names"), saved["params"]
        if "param_names" not in group or not theirs or any(isinstance(p, str) for p in params):
            continue
        names, found = ([canonical_name(name) for name in these] for these in (group["param_names"], theirs))
        if names == found:
            continue
        if sorted(names) != sorted(found) or len(set(names)) < len(names) or len(found) != len(params):
            lacks, more = sorted(set(names) - set(found)), sorted(set(found) - set(names))
            raise ValueError(
                f"a checkpoint must hold the same parameters in each group; group {number} of this one lacks "
                f"{lacks[:5]} and has {more[:5]} beside; build the groups as they were when it was saved"
            )
        number_of = dict(zip(found, params, strict=True))
        ordered[-1] = {
            **saved,
            "params": [number_of[name] for name in names],
            "param_names": list(group["param_names"]),
        }
    return {**state_dict, "param_groups": ordered}


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
        check_group(saved, " of the checkpoint")
        for key in ("algorithm", "local_update", "weight_layout"):
            if saved.get(key, group[key]) != group[key]:
                raise ValueError(
                    f"a checkpoint must have been saved with the {key} of each group; got {saved[key]!r} for "
                    f"a group with {group[key]!r}; build the groups as they were when it was saved; to "
                    "change the rule, set it in opt.param_groups after loading"
                )
        tau, before = saved.get("tau", group["tau"]), group["tau"]
        if math.isinf(tau) != math.isinf(before):
            raise ValueError(
                "a checkpoint of a gate that never opens by itself belongs to an optimizer of that kind, and "
                f"no other: got tau={tau} for a group with tau={before}; build the optimizer with the "
                "options of the run that saved it; tau may be changed in opt.param_groups after loading"
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
            check_value(name, key, value)
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


# What a state tensor may hold, beside that it is finite, by its key.
NOT_NEGATIVE = ("exp_avg_sq", "second_moment", "step", "local_steps", "synchronized_steps")
COUNTERS = ("step", "local_steps", "synchronized_steps")
MOST_STEPS = 1 << 24  # above it float32 does not count on


def check_value(name: str, key: str, value: Any) -> None:
    """Raise ValueError if a saved state tensor holds what no step would have left there."""
    try:
        local = local_tensor(value) if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        local = None
    real = local is not None and not local.is_complex() and local.dtype != torch.bool
    if local is None or not real or not (local.is_floating_point() or key in COUNTERS):
        raise ValueError(
            f"a checkpoint must hold real numbers; got {getattr(value, 'dtype', type(value))} for {key} of "
            f"{name!r}; load one that CurvaDion saved"
        )
    fine = local.isfinite().all()
    if key in NOT_NEGATIVE:
        fine &= (local >= 0).all()
    if key in COUNTERS:
        fine &= (local < MOST_STEPS).all() & (local == local.round()).all()
    if not bool(fine):
        rule = "whole numbers of steps" if key in COUNTERS else "finite numbers"
        rule += ", none negative" if key in NOT_NEGATIVE and key not in COUNTERS else ""
        raise ValueError(
            f"a checkpoint must hold {rule}; {key} of {name!r} does not; it is damaged, or was saved after a "
            "failure: load an earlier one"
        )


def _rank(short: int, group: Mapping[str, Any], instead: Mapping[str, Any]) -> int:
    """Return the rank that a group's options say; what it lacks comes from the other."""
    fraction, multiple = (group.get(k, instead[k]) for k in ("rank_fraction", "rank_multiple_of"))
    return rank_of(short, fraction, multiple)
