"""Loading a state dict into the existing state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvadion.options import group_options
from curvadion.sharding.layout import canonical_name
from curvadion.state.batch import RIGHT_FACTORS
from curvadion.state.loadable import check_form, check_groups, check_states
from curvadion.state.store import States, assign
from curvadion.state.table import Table


def load(
    optimizer: torch.optim.Optimizer,
    table: Table,
    own: States,
    load_state_dict: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    agree: Callable[[Exception | None, int], None],
    start_Q: Callable[[int], None],
    loaded: Callable[[], None],
) -> None:
    """Let torch load a state dict, but copy the values into the existing state, dtypes and memory kept.

    Args:
        optimizer: whose `param_groups` torch replaces by the saved ones.
        own: its state.
        load_state_dict: torch's.
        agree: called once on every rank before anything changes, with what is wrong here and the steps that
            the checkpoint counts; raises on every rank if something is wrong on one.
        start_Q: gives the matrices of the parameter at a position their first Q.
        loaded: called when the values are there, before any hook of the user's.

    Raises:
        ValueError: it does not fit on some rank; nothing was changed.
    """
    groups = optimizer.param_groups
    saved: dict[str, Any] = {}
    asked = False

    def ask(failure: Exception | None, steps: int = 0) -> None:
        nonlocal asked
        asked = True
        agree(failure, steps)

    def saved_states() -> list[tuple[Tensor, dict[str, Any]]]:
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        number_of = dict(zip(table.listed, numbers, strict=True))
        return [(p, saved["state"].get(number_of[p], {})) for p in table.params]

    def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> dict[str, Any]:
        check_form(final)
        saved.update(in_order(final, groups))
        check_groups(saved["param_groups"], groups)
        members = zip(table.names, table.group_of, saved_states(), strict=True)
        steps = check_states(
            saved["param_groups"],
            groups,
            [
                (name, index, values, own[p], _short_sides(table, i))
                for i, (name, index, (p, values)) in enumerate(members)
            ],
        )
        ask(None, steps)
        return saved

    def restore(_: torch.optim.Optimizer) -> None:
        optimizer.state = own  # type: ignore[assignment]  # torch made copies, cast to the parameters' dtype
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            for key in group_options():
                if key in before:
                    group.setdefault(key, before[key])
            if "param_names" in before:  # in their order, which the saved names may not be in
                group["param_names"] = before["param_names"]
        for i, (p, values) in enumerate(saved_states()):
            for key, value in values.items():
                if key in own[p]:
                    assign(own[p][key], value)
            if RIGHT_FACTORS & (own[p].keys() - values.keys()):
                start_Q(i)
        loaded()

    # The last hook before torch casts every state to its parameter's dtype, and the first one after.
    handles = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        check_form(state_dict)
        load_state_dict(state_dict)
    except Exception as error:
        if not asked:  # others wait for this rank
            ask(error)
        raise
    finally:
        for handle in handles:
            handle.remove()


def in_order(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a state dict whose groups, and the parameters in each, are in the order of the optimizer's, by
    their names; and whose options are plain numbers where they were saved as tensors, but for lr.

    Where either side has no names, or torch has put parameters in order by name itself, they stay as they
    are.

    Raises:
        ValueError: names differ.
    """
    ordered = []
    for number, saved in enumerate(_groups_in_order(state_dict["param_groups"], groups)):
        ordered.append({key: _plain(key, value) for key, value in saved.items()})
        group = groups[number] if number < len(groups) else {}
        names, found = _names(group), _names(saved)
        if not names or not found or names == found:
            continue
        if sorted(names) != sorted(found) or len(set(names)) < len(names):
            lacks, more = sorted(set(names) - set(found)), sorted(set(found) - set(names))
            raise ValueError(
                f"a checkpoint must hold the same parameters in each group; group {number} of this one lacks "
                f"{lacks[:5]} and has {more[:5]} beside; build the groups as they were when it was saved"
            )
        number_of = dict(zip(found, saved["params"], strict=True))
        ordered[-1] |= {
            "params": [number_of[name] for name in names],
            "param_names": list(group["param_names"]),
        }
    return {**state_dict, "param_groups": ordered}


def _groups_in_order(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """Return the saved groups in the order of the optimizer's, if each has one of the same names."""
    by_names = {frozenset(_names(group)): group for group in saved}
    wanted = [frozenset(_names(group)) for group in groups]
    if len(by_names) == len(saved) == len(groups) and set(wanted) == set(by_names):
        return [by_names[names] for names in wanted]
    return saved


def _names(group: Mapping[str, Any]) -> list[str]:
    """Return the canonical names of a group's parameters; none where it has no names for them, or torch has
    put them in order by name itself."""
    if any(isinstance(p, str) for p in group.get("params", ())):
        return []
    return [canonical_name(name) for name in group.get("param_names") or ()]


def _plain(key: str, value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 and key != "lr" else value


def _short_sides(table: Table, index: int) -> set[int]:
    """Return the shorter sides of the matrices of a parameter; nothing for one that is none."""
    return {min(layout.shape) for layout in table.blocks[index].layouts} if index in table.blocks else set()
