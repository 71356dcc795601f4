"""What a checkpoint must hold to be loaded."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from curvadion.algebra.sizes import rank_of
from curvadion.options import check_decay, check_group
from curvadion.rules import RULES
from curvadion.sharding.dry import has_no_values
from curvadion.sharding.layout import local_tensor
from curvadion.state.batch import RIGHT_FACTORS
from curvadion_kernels.reference import NO_NORM

# What a state tensor may hold, beside that it is finite, by its key.
NOT_NEGATIVE = ("exp_avg_sq", "second_moment", "step", "local_steps", "synchronized_steps")
COUNTERS = ("step", "local_steps", "synchronized_steps")
MOST_STEPS = 1 << 24  # above it float32 does not count on
LARGEST_OF_Q = 1.01  # in a column of norm 1, rounded


def check_form(state_dict: Any) -> None:
    """Raise ValueError if it does not look like a state dict of this optimizer."""
    parts = state_dict if isinstance(state_dict, Mapping) else {}
    state, groups = parts.get("state"), parts.get("param_groups")
    if (
        not isinstance(state, Mapping)
        or not isinstance(groups, Sequence)
        or not all(isinstance(group, Mapping) and _has_params(group) for group in groups)
        or not all(isinstance(values, Mapping) for values in state.values())
    ):
        got = sorted(map(str, parts)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            "a checkpoint must hold 'state' and 'param_groups', as opt.state_dict() returns them; got "
            f"{got}; pass the optimizer's part of what was saved"
        )
    numbers = [number for group in groups for number in group["params"]]
    strangers = sorted(map(str, set(state) - set(numbers)))
    if strangers or len(set(numbers)) < len(numbers):
        raise ValueError(
            "a checkpoint must list each parameter that it has state of once, in one group; got "
            f"{strangers[:5] or 'one twice'}; it is damaged, or was put together by hand: load an earlier one"
        )
    if groups and not any("local_update" in group for group in groups):
        raise ValueError(
            "a checkpoint must be one of CurvaDion; this one's groups hold "
            f"{sorted({key for group in groups for key in group} - {'params', 'param_names'})[:6]}, as those "
            "of another optimizer do, whose moments mean nothing to these rules; load the model alone, and "
            "let the optimizer start anew with a warm-up of the learning rate"
        )


def _has_params(group: Mapping[str, Any]) -> bool:
    params, names = group.get("params"), group.get("param_names")
    return (
        isinstance(params, Sequence)
        and all(isinstance(p, int | str) for p in params)
        and (names is None or (len(names) == len(params) and all(isinstance(name, str) for name in names)))
    )


def check_groups(saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError (TypeError for a wrong type) if a checkpoint's groups are not those of the
    optimizer."""
    sizes, saved_sizes = ([len(group["params"]) for group in some] for some in (groups, saved_groups))
    if saved_sizes != sizes:
        raise ValueError(
            f"a checkpoint must hold as many parameters in each group as the optimizer; got {saved_sizes} "
            f"for {sizes}; build the parameter groups as they were when it was saved"
        )
    for group, saved in zip(groups, saved_groups, strict=True):
        check_group(saved, " of the checkpoint")
        check_decay({**group, **saved}, " of the checkpoint")
        for key in ("algorithm", "local_update", "weight_layout", "batch_dims", "splits", "split_along"):
            if _plain(saved.get(key, group[key])) != _plain(group[key]):
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


def check_states(
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    states: Iterable[tuple[str, int, Mapping[str, Any], Mapping[str, Tensor], Iterable[int]]],
) -> int:
    """Raise ValueError if a checkpoint's state does not fit; return the steps that it counts.

    Q may be on one side alone where the local rule of the checkpoint's group does not use it: nobody wants
    what was saved, or nobody has moved it, so that it starts at its first value.

    Args:
        saved_groups, groups: parameter groups of the checkpoint and of the optimizer.
        states: (name, index of its group, saved state, own state, shorter sides of its matrices) of every
            parameter.
    """
    counted = dict.fromkeys(COUNTERS, 0.0)
    for name, index, saved, own, short_sides in states:
        rule = RULES[saved_groups[index].get("local_update", groups[index]["local_update"])]
        unused = groups[index]["algorithm"] == "dion" and not rule.uses_Q
        spare = RIGHT_FACTORS if unused else frozenset[str]()
        missing, unknown = sorted(set(own) - set(saved) - spare), sorted(set(saved) - set(own) - spare)
        if missing or unknown:
            hint = "load one that CurvaDion saved for the same groups"
            if not saved:
                hint = (
                    "if it was frozen when that was saved, load with requires_grad=False, set it afterwards"
                )
            raise ValueError(
                f"a checkpoint must hold exactly {sorted(own)} for {name!r}; missing {missing}, unknown "
                f"{unknown}; {hint}"
            )
        for key in saved.keys() & own.keys():
            check_value(name, key, saved[key], own[key])
        for short in short_sides:
            saved_rank, rank = (
                _rank(short, group, groups[index]) for group in (saved_groups[index], groups[index])
            )
            if saved_rank != rank:
                raise ValueError(
                    f"a checkpoint must be of the same rank; got r = {saved_rank} for {name!r}, expected "
                    f"{rank}; construct with the rank_fraction and rank_multiple_of it was saved with"
                )
        counted = {key: max(most, float(saved[key])) for key, most in counted.items()}
    if max(counted.values()) > counted["step"]:
        raise ValueError(
            "a checkpoint must count no more local or synchronized steps than steps; got "
            f"{ {key: int(most) for key, most in counted.items()} }; it is damaged: load an earlier one"
        )
    return int(counted["step"])


def check_value(name: str, key: str, value: Any, own: Tensor) -> None:
    """Raise ValueError if a saved state tensor does not fit in place of the optimizer's own, or holds what
    no step would have left there."""
    local = _dense(value)
    real = local is not None and not local.is_complex() and local.dtype != torch.bool
    if local is None or not real or not (local.is_floating_point() or key in COUNTERS):
        raise ValueError(
            f"a checkpoint must hold dense tensors of real numbers; got {type(value).__name__} "
            f"{getattr(value, 'dtype', '')} for {key} of {name!r}; load one that CurvaDion saved"
        )
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    if shape != tuple(own.shape):
        raise ValueError(
            f"a checkpoint must hold state of the same shape; got {key} {shape} for {name!r}, expected "
            f"{tuple(own.shape)}; construct with the rank_fraction and rank_multiple_of it was saved with"
        )
    if isinstance(value, DTensor) and not _placed_alike(value, own):
        raise ValueError(
            f"a file of one rank's shards loads where it was saved, on the same mesh; {key} of {name!r} was "
            "sharded in another way; save and load with torch.distributed.checkpoint, which reshards"
        )
    if broken := breaks(key, local, local.to(own.dtype), _shards(value)):
        raise ValueError(
            f"a checkpoint must hold {broken}, in {own.dtype} too; {key} of {name!r} does not; it is "
            "damaged, or was saved after a failure: load an earlier one"
        )


def intact(states: Iterable[Mapping[str, Tensor]]) -> bool:
    """Say whether what this rank has of an optimizer's own state is what a step may leave there."""
    return not any(
        breaks(key, local_tensor(own), local_tensor(own), _shards(own))
        for values in states
        for key, own in values.items()
    )


def breaks(key: str, local: Tensor, held: Tensor, shards: int) -> str:
    """Return the rule that a state tensor breaks, in words; nothing if it breaks none.

    Args:
        local, held: what this rank has of it, as it was saved and in the optimizer's dtype.
        shards: how many such parts it has.
    """
    rule, fine = "finite numbers", held.isfinite().all()
    if key in NOT_NEGATIVE:
        rule, fine = f"{rule}, none negative", fine & (held >= 0).all()
    if key in COUNTERS:
        rule = "whole numbers of steps"
        fine &= (local < MOST_STEPS).all() & (local == local.round()).all()
    if key == "last_norm":
        rule, fine = f"{rule}, none negative", fine & ((held >= 0) | (held == NO_NORM)).all()
    if key == "momentum":  # whose norm the next step takes; no rank knows the parts of the others
        rule = f"{rule} of a finite norm in float32"
        square = torch.linalg.vector_norm(held, dtype=torch.float64).square()
        fine &= square * shards <= torch.finfo(torch.float32).max
    if key in RIGHT_FACTORS:
        rule, fine = "columns of norm 1", fine & (held.abs() <= LARGEST_OF_Q).all()
    return "" if bool(fine) else rule


def _shards(value: Any) -> int:
    """Return the number of parts that a state tensor has."""
    if not isinstance(value, DTensor):
        return 1
    mesh = value.device_mesh
    return math.prod(mesh.size(dim) for dim, p in enumerate(value.placements) if not p.is_replicate())


def _dense(value: Any) -> Tensor | None:
    """Return what this rank has of a saved value as a tensor with values; None where there are none."""
    if not isinstance(value, Tensor | int | float):
        return None
    local = local_tensor(value) if isinstance(value, Tensor) else torch.as_tensor(value)
    return None if local.layout != torch.strided or local.is_quantized or has_no_values(local) else local


def _placed_alike(value: DTensor, own: Tensor) -> bool:
    """Say whether a saved DTensor can take the place of the optimizer's own tensor on this rank: it is of the
    same mesh, or of the same place in that of another replica."""
    if not isinstance(own, DTensor):
        return False
    if value.placements != own.placements:
        return value.device_mesh == own.device_mesh
    same_mesh = value.device_mesh.shape == own.device_mesh.shape
    return same_mesh and value._local_tensor.shape == own._local_tensor.shape


def _plain(value: Any) -> Any:
    """Return a list, as a file format may have made of a tuple, as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _rank(short: int, group: Mapping[str, Any], instead: Mapping[str, Any]) -> int:
    """Return the rank that a group's options say; what it lacks comes from the other."""
    fraction, multiple = (group.get(k, instead[k]) for k in ("rank_fraction", "rank_multiple_of"))
    return rank_of(short, fraction, multiple)
