"""The options of CurvaDion: which belong to a parameter group, and what each may be.

Defaults stand in the constructor's signature and nowhere else, prose in its docstring; docs/options.md and
the fields of the torchtitan plug-in are generated from the three (scripts/options.py).
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvadion.algebra.iteration import METHODS, POLYNOMIALS
from curvadion.allowed import Allowed, Option, check_options, nearest
from curvadion.consensus import CODECS, CONSENSUS, Consensus
from curvadion.gate.schedule import ScheduleOptions
from curvadion.rules import RULES
from curvadion.rules.base import UPDATE_SCALES
from curvadion.sharding.blocks import SPLIT_ALONG, WEIGHT_LAYOUTS
from curvadion.signals import SIGNALS, Signal
from curvadion_kernels import KERNELS

INF = float("inf")


def _one_of(choices: Iterable[Any], hint: Any = None) -> Allowed:
    """Allow the keys of a table, also those that are registered later."""
    first = next(iter(choices)) if hint is None else hint
    names = choices if isinstance(choices, Mapping) else tuple(choices)
    return Allowed(
        lambda v: v in tuple(names),
        lambda: "one of " + ", ".join(map(repr, names)),
        lambda v: f"try {nearest(v, names, first)!r}",
        names,
    )


def _is_integer(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _all_integers(values: Iterable[Any]) -> bool:
    return all(_is_integer(n, 1) for n in values)


def _integer(lowest: int, hint: str) -> Allowed:
    return Allowed(lambda v: _is_integer(v, lowest), f"an integer >= {lowest}", hint)


def _integer_or_none(lowest: int, hint: str) -> Allowed:
    return Allowed(lambda v: v is None or _is_integer(v, lowest), f"None or an integer >= {lowest}", hint)


def _flag(hint: str) -> Allowed:
    return Allowed(lambda v: isinstance(v, bool), "True or False", hint)


def _not_negative(hint: str) -> Allowed:
    return Allowed(lambda v: 0 <= v < INF, "a finite number >= 0", hint)


GROUP_OPTIONS: dict[str, Allowed] = {
    "algorithm": _one_of(("dion", "adamw", "lion")),
    "lr": Allowed(
        lambda v: 0 <= (float(v) if isinstance(v, Tensor) else v) < INF,
        "a finite number >= 0",
        "try 0.02 for matrices, 3e-3 for AdamW",
    ),
    "momentum": Allowed(lambda v: 0 <= v < 1, "in [0, 1)", "try 0.95"),
    "weight_decay": _not_negative("try 0.01"),
    "rank_fraction": Allowed(lambda v: 0 < v <= 1, "in (0, 1]", "try 0.25: a quarter of the short side"),
    "rank_multiple_of": _integer(1, "try 1, or 8 or 16 for round kernel shapes"),
    "tau": Allowed(
        lambda v: v >= 0, "a number >= 0, or inf", "try 0.1; max_local_steps=0 synchronizes every step"
    ),
    "local_update": _one_of(RULES),
    "local_lr_scale": _not_negative("try 1.0"),
    "update_scale": _one_of(UPDATE_SCALES),
    "weight_layout": _one_of(WEIGHT_LAYOUTS),
    "batch_dims": _integer(0, "try 0, or 1 for weights of experts, (experts, out, in)"),
    "splits": Allowed(
        lambda v: v is None or (_is_integer(v, 1) if isinstance(v, int) else v and _all_integers(v)),
        "None, a number of equal blocks, or their sizes",
        "try 3 for a fused qkv with as many keys as queries, or (4096, 1024, 1024)",
    ),
    "split_along": _one_of(SPLIT_ALONG),
    "nesterov": _flag("try False"),
    "newton_schulz": _one_of(POLYNOMIALS),
    "newton_schulz_steps": _integer(1, "try 5, or 6 with newton_schulz='polar_express'"),
    "newton_schulz_dtype": Allowed(
        lambda v: v in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16),
        "None or a floating-point torch.dtype of 16, 32 or 64 bits",
        "try None, which takes bfloat16 where it is fast",
    ),
    "newton_schulz_method": _one_of(METHODS),
    "error_feedback": _flag("try True"),
    "right_factor": _one_of(("column_norm", "qr")),
    "orthogonalization": _one_of(("auto", "cholesky_qr", "qr")),
    "betas": Allowed(
        lambda v: isinstance(v, (tuple, list)) and len(v) == 2 and all(0 <= b < 1 for b in v),
        "a pair of numbers in [0, 1)",
        "try (0.9, 0.95)",
    ),
    "eps": _not_negative("try 1e-8"),
}

OPTIMIZER_OPTIONS: dict[str, Allowed] = {
    "gate": _one_of(SIGNALS),
    "warmup_steps": _integer(0, "try 0"),
    "min_local_steps": _integer(0, "try 0"),
    "max_local_steps": _integer_or_none(0, "try None, or 100; 0 synchronizes every step"),
    "consensus": _one_of(CONSENSUS),
    "outer_lr": Allowed(
        lambda v: 0 < v < INF,
        "a finite number > 0",
        "try 1.0, plain averaging, or 0.7 with outer_momentum=0.6",
    ),
    "outer_momentum": Allowed(lambda v: 0 <= v < 1, "in [0, 1)", "try 0.0, or 0.6 with outer_lr=0.7"),
    "outer_bits": _one_of(CODECS, hint=4),
    "outer_fragments": _integer(1, "try 1; more spread each synchronization over as many smaller ones"),
    "outer_delay": _integer(0, "try 0, which waits; or as many steps as a synchronization takes"),
    "outer_on_host": _flag("try False"),
    "outer_residual_kept": Allowed(lambda v: 0 <= v <= 1, "in [0, 1]", "try 0.0, or 0.5"),
    "target_sync_rate": Allowed(
        lambda v: v is None or 0 < v <= 1, "None or in (0, 1]", "try 0.05: one step in twenty"
    ),
    "gate_every": _integer_or_none(
        1, "try 1; None asks only where max_local_steps or warmup_steps synchronize"
    ),
    "gate_lag": Allowed(
        lambda v: v in (0, 1) and not isinstance(v, bool),
        "0 or 1",
        "try 0, which waits for the answer; 1 reads it a step later",
        choices=(0, 1),
    ),
    "momentum_dtype": Allowed(
        lambda v: v in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16),
        "None or a floating-point torch.dtype of 16, 32 or 64 bits",
        "try torch.float32",
    ),
    "payload_dtype": Allowed(  # a sum over replicas in float16 could overflow
        lambda v: v in (None, torch.float64, torch.float32, torch.bfloat16),
        "None, torch.float64, torch.float32 or torch.bfloat16",
        "try torch.bfloat16",
    ),
    "owners": _one_of(("auto", "always", "never")),
    "replica_gbit": Allowed(
        lambda v: v is None or v > 0,
        "None or a number > 0",
        "try None, or 2000 for replicas on the GPUs of one machine",
    ),
    "owner_dtype": Allowed(
        lambda v: v in (None, torch.float64, torch.float32, torch.bfloat16),
        "None, torch.float64, torch.float32 or torch.bfloat16",
        "try None: bfloat16 on a GPU",
    ),
    "on_nonfinite": _one_of(("raise", "skip")),
    "on_equal_gradients": _one_of(("warn", "raise")),
    "check_every": _integer(0, "try 1000; 0 checks on the first step only"),
    "kernels": _one_of(KERNELS),
}

# Options of torch's optimizers that hosts pass to any, with what they must be; updates are always batched.
FOREIGN_OPTIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("foreach", "fused"), (None, False, True)),
    **dict.fromkeys(("capturable", "differentiable", "maximize"), (None, False)),
}
# Keys that torch, schedulers and host trainers put into groups. `base_momentum` aside (see
# `curvadion.state.cycled`), none changes what CurvaDion computes.
SCHEDULED = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
FOREIGN_KEYS = {*("params", "param_names", "name"), *FOREIGN_OPTIONS, *SCHEDULED}


class Preset(dict[str, Any]):
    """Options by name, to be passed on with **; called, the same with changes.

        CurvaDion(groups, **LOW_COMMUNICATION)
        CurvaDion(groups, **LOW_COMMUNICATION(max_local_steps=15, outer_bits=2))

    Raises TypeError for a name that is no option.
    """

    def __call__(self, **changes: Any) -> "Preset":
        """Return the preset with these options changed or added."""
        for name in changes:
            if name not in group_options() and name not in optimizer_options():
                raise TypeError(
                    f"a preset may be changed by options of CurvaDion only; got {name!r}; {_meant(name)}"
                )
        return Preset({**self, **changes})


# The settings that docs/results.md arrives at, for 0.9 % of the bytes of bf16 dense gradients: Muon steps on
# each replica, and in every eighth step one bit per parameter. RMMC is reported and opens nothing, because a
# gate did no better than a fixed interval, so nobody asks in between.
LOW_COMMUNICATION = Preset(
    local_update="muon",
    momentum=0.8,
    consensus="outer",
    outer_bits=1,
    outer_lr=1.4,
    tau=INF,
    max_local_steps=7,
    gate_every=None,
)

# The best that was found for the same bytes in runs of 600 steps: NorMuon, at its own learning rate.
# Replicas keep half of their own rounding residual, so what they have in common after a synchronized step is
# X_0.
LOW_COMMUNICATION_KEPT = Preset(
    LOW_COMMUNICATION,
    local_update="normuon",
    momentum=0.745,
    nesterov=True,
    outer_lr=2.09,
    outer_residual_kept=0.5,
)

# For 0.4 % and 0.1 %: two bits on every 36th and 144th step, and outer momentum.
LOWER_COMMUNICATION = Preset(
    LOW_COMMUNICATION_KEPT,
    momentum=0.8,
    outer_bits=2,
    outer_lr=1.0,
    outer_momentum=0.5,
    max_local_steps=35,
)
LOWEST_COMMUNICATION = Preset(LOWER_COMMUNICATION, local_update="muon", max_local_steps=143)


@dataclass(frozen=True)
class Options:
    """What is common to all groups, as the rooms of the optimizer want it; the names are the
    constructor's. `given` has all of it by name, `defaults` every option's default."""

    gate: str
    schedule: ScheduleOptions
    consensus: str
    momentum_dtype: torch.dtype | None
    payload_dtype: torch.dtype | None
    owners: str
    replica_gbit: float | None
    owner_dtype: torch.dtype | None
    on_nonfinite: str
    on_equal_gradients: str
    check_every: int
    kernels: str
    given: dict[str, Any]
    defaults: dict[str, Any]

    @staticmethod
    def of(given: Mapping[str, Any], constructor: Callable[..., Any]) -> "Options":
        """Check options by their names, and sort them. Raises ValueError or TypeError for one that breaks a
        rule.

        Args:
            constructor: whose defaults are the options'.
        """
        check_options(given, optimizer_options())
        defaults = defaults_of(constructor)
        check_together(given, defaults)
        schedule = ScheduleOptions(**{name: given[name] for name in ScheduleOptions.__dataclass_fields__})
        own = {name: given[name] for name in Options.__dataclass_fields__ if name in given}
        return Options(schedule=schedule, given=dict(given), defaults=defaults, **own)


def sort_options(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constructor's arguments that are a group's defaults, and those that are common to all
    groups; `own` are those that it does not know, which something registered must have declared.

    Raises:
        TypeError: nothing has.
        ValueError: a name was declared that there is already.
    """
    own, of_group, common = dict(arguments["own"]), group_options(), optimizer_options()
    _check_foreign(own)
    for name in own:
        if name not in of_group and name not in common and name not in FOREIGN_OPTIONS:
            raise TypeError(f"CurvaDion takes known options only; got {name!r}; {_meant(name)}")
    declared = {name: option.default for options in _declared() for name, option in options.items()}
    values = {"algorithm": "dion", **declared, **arguments, **own}
    return {k: values[k] for k in of_group}, {k: values[k] for k in common}


# Options whose values are things that may declare some, common to all groups; a rule's are its groups'.
_TABLES: dict[str, Mapping[Any, Any]] = {"gate": SIGNALS, "consensus": CONSENSUS, "outer_bits": CODECS}


def _declared() -> tuple[dict[str, Option], dict[str, Option]]:
    """Return the options that rules have declared, and those of the rest. Raises ValueError if a name is not
    new."""
    of_rules: dict[str, Option] = {}
    of_rest: dict[str, Option] = {}
    for where, table in {"local_update": RULES, **_TABLES}.items():
        for owner, thing in table.items():
            for name, option in getattr(thing, "options", {}).items():
                mine, others = (of_rules, of_rest) if table is RULES else (of_rest, of_rules)
                there = {*GROUP_OPTIONS, *OPTIMIZER_OPTIONS, *others}
                if name in there or mine.setdefault(name, option) is not option:
                    raise ValueError(
                        f"an option's name must be new; got {name!r} of {where}={owner!r}, which there is "
                        "already; choose another"
                    )
    return of_rules, of_rest


def group_options() -> dict[str, Allowed]:
    """Return what a group may set, with what the rules registered so far have declared."""
    return {**GROUP_OPTIONS, **{name: option.allowed for name, option in _declared()[0].items()}}


def optimizer_options() -> dict[str, Allowed]:
    """Return what is common to all groups, with what is declared by signals, consensus and codecs."""
    return {**OPTIMIZER_OPTIONS, **{name: option.allowed for name, option in _declared()[1].items()}}


def defaults_of(constructor: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of a constructor's options, by name."""
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def check_together(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError if options that are common to all groups contradict one another.

    Args:
        options: all of them.
        defaults: the constructor's.
    """
    consensus = CONSENSUS[options["consensus"]]
    for name, other in CONSENSUS.items():
        for option in other.own_options:
            if option in consensus.own_options or option not in defaults:
                continue
            if options[option] != defaults[option]:
                raise ValueError(
                    f"{option} belongs to consensus={name!r}; got {option}={options[option]!r} with "
                    f"consensus={options['consensus']!r}; pass consensus={name!r}, or leave it out"
                )
    for option, table in _TABLES.items():
        mine = getattr(table[options[option]], "options", {})
        for name, thing in table.items():
            for key, own in getattr(thing, "options", {}).items():
                if key not in mine and options[key] != own.default:
                    raise ValueError(
                        f"{key} belongs to {option}={name!r}; got {key}={options[key]!r} with "
                        f"{option}={options[option]!r}; pass {option}={name!r}, or leave it out"
                    )
    consensus.check(options)
    _check_bounds(options)


def _check_bounds(options: Mapping[str, Any]) -> None:
    rate, every, lag = options["target_sync_rate"], options["gate_every"], options["gate_lag"]
    low, high = options["min_local_steps"], options["max_local_steps"]
    if every is None and high is None:
        raise ValueError(
            "gate_every=None asks only where max_local_steps synchronizes, which must be set; got None for "
            "both; try max_local_steps=7, or gate_every=1"
        )
    if every is None and (rate is not None or lag):
        what = "target_sync_rate" if rate is not None else "gate_lag"
        raise ValueError(
            f"{what} needs a gate that is asked between the bounds; got "
            f"{what}={rate if rate is not None else lag} with gate_every=None; try gate_every=1"
        )
    if rate is not None:
        least = 0.0 if high is None else 1 / (high + 1)
        if not least <= rate <= 1 / max(every, low + 1, 1 + lag):
            raise ValueError(
                "target_sync_rate must lie between 1 / (max_local_steps + 1) and the smallest of 1 / "
                "gate_every, 1 / (min_local_steps + 1) and 1 / (1 + gate_lag), or no tau could meet it; "
                f"got {rate} with max_local_steps={high}, gate_every={every}, min_local_steps={low}, "
                f"gate_lag={lag}; widen them"
            )
    if high is not None and low > high:
        raise ValueError(
            f"min_local_steps must not exceed max_local_steps; got {low} and {high}; try "
            f"min_local_steps={high}"
        )


def check_signal(signal: Signal, consensus: Consensus, options: Options) -> None:
    """Raise ValueError if the gate's signal would mean nothing, or gain nothing, with these options."""
    if signal.needs_equal_replicas and consensus.leaves_apart:
        raise ValueError(
            f"gate={options.gate!r} needs replicas that are equal after a synchronized step; got consensus="
            f"{options.consensus!r} with options that leave them apart; try 'outer' without "
            "outer_residual_kept, delay and fragments"
        )
    if signal.waits_for_replicas and options.schedule.gate_lag:
        raise ValueError(
            f"gate={options.gate!r} waits for numbers of the other replicas in each step that asks; got "
            "gate_lag=1, which is there to wait for nothing; try gate_every=8, which asks seldom"
        )


def check_elastic(signal: Signal, consensus: Consensus, options: Options) -> None:
    """Raise ValueError if a synchronization of these options cannot be done again by those that are left."""
    lag = options.schedule.gate_lag
    if not consensus.can_lose_replicas or signal.waits_for_replicas or lag:
        raise ValueError(
            "an ElasticGroup needs consensus='outer' with outer_delay=0, gate_lag=0, and a gate that sends "
            f"nothing but its key; got consensus={options.consensus!r}, "
            f"outer_delay={options.given['outer_delay']}, gate_lag={lag}, gate={options.gate!r}; try "
            "**LOW_COMMUNICATION"
        )


# Options that say when a step is local or what it does then; of groups, and common to all of them.
_LOCAL_OF_GROUPS = ("tau", "local_update", "local_lr_scale")
_LOCAL = (
    "gate",
    "consensus",
    "min_local_steps",
    "max_local_steps",
    "target_sync_rate",
    "gate_every",
    "gate_lag",
)


def asks_for_local_steps(groups: Iterable[Mapping[str, Any]], options: Options) -> bool:
    """Return whether an option that says when a step is local, or what it does then, is not its default.

    If none is, one replica has nobody to be local to: its local steps would be plain SGD.
    """
    given, usual = options.given, options.defaults
    matrices = [group for group in groups if group.get("algorithm") == "dion"]
    changed = any(group.get(name) != usual[name] for group in matrices for name in _LOCAL_OF_GROUPS)
    return changed or any(given[name] != usual[name] for name in _LOCAL)


def check_taus(groups: Iterable[Mapping[str, Any]], options: Options) -> None:
    """Raise ValueError if there is no threshold to steer."""
    taus = [group["tau"] for group in groups if group["algorithm"] == "dion"]
    if options.schedule.target_sync_rate is not None and not any(0 < tau < math.inf for tau in taus):
        raise ValueError(
            "target_sync_rate steers tau, which must be finite and above 0 in some group of matrices to "
            f"start from; got {taus}; try tau=0.1, or for a fixed interval leave target_sync_rate out and "
            "set max_local_steps"
        )


def check_group(group: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError if a parameter group holds an option that is unknown, out of range, or not a group's
    to set; `where` says which group it is."""
    known, common = group_options(), optimizer_options()
    for key in group:
        if key in common or key == "replicate_mesh":
            raise ValueError(
                f"{key} is common to all groups; got it in a parameter group{where}; pass {key}= to "
                "CurvaDion instead"
            )
        if key not in known and key not in FOREIGN_KEYS:
            raise ValueError(
                f"a parameter group may hold known options only; got {key!r} in one{where}; {_meant(key)}"
            )
    check_options(group, known, f" in a parameter group{where}")
    scheduled = dict.fromkeys(SCHEDULED, _not_negative("leave it to the scheduler"))
    check_options(group, scheduled, f" in a parameter group{where}")
    _check_foreign(group, f" in a parameter group{where}")


def _check_foreign(options: Mapping[str, Any], where: str = "") -> None:
    for key, values in FOREIGN_OPTIONS.items():
        if options.get(key) not in values:
            raise ValueError(
                f"CurvaDion does not implement {key}; got {key}={options[key]!r}{where}; leave it out"
            )


def check_decay(group: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError if a whole group's weight decay, X <- (1 - lr wd) X, would turn X round."""
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if lr * decay > 1 + 1e-6:  # as a product of 1 may be, of lr in float32
        raise ValueError(
            "lr * weight_decay must be at most 1, or weights change their sign in each step; got "
            f"lr={lr:.6g} with weight_decay={decay:.6g} in a parameter group{where}; try a smaller lr, or a "
            f"weight_decay below 1 / lr = {1 / lr:.3g}"
        )


def check_rule(
    group: Mapping[str, Any], defaults: Mapping[str, Any], consensus: Consensus | type[Consensus]
) -> None:
    """Raise ValueError if a whole group of matrices sets an option that neither its rule nor the consensus
    heeds.

    Args:
        defaults: the constructor's.
    """
    if group["algorithm"] != "dion":
        return
    name = group["local_update"]
    heeded = {*RULES[name].own_options, *RULES[name].options, *consensus.group_options}
    usual = {**defaults, **{option: declared.default for option, declared in _declared()[0].items()}}
    for option in dict.fromkeys(o for rule in RULES.values() for o in (*rule.own_options, *rule.options)):
        if option not in heeded and group[option] != usual[option]:
            takers = [repr(n) for n, rule in RULES.items() if option in (*rule.own_options, *rule.options)]
            raise ValueError(
                f"{option} belongs to local_update={' or '.join(takers)}; got {option}={group[option]!r} "
                f"with local_update={name!r}; leave it out, or set {option}={usual[option]!r} in that group"
            )


# What others call an option.
_SYNONYMS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epsilon": "eps",
    **dict.fromkeys(("mu", "beta"), "momentum"),
    **dict.fromkeys(("beta1", "beta2"), "betas"),
    "rank": "rank_fraction",
    "ns_steps": "newton_schulz_steps",
    **dict.fromkeys(("adjust_lr", "adjust_lr_fn", "scale"), "update_scale"),
    **dict.fromkeys(("sync_every", "inner_steps", "local_steps"), "max_local_steps"),
    **dict.fromkeys(("mesh", "process_group", "distributed_mesh"), "replicate_mesh"),
}


def _meant(name: str) -> str:
    known = [*group_options(), *optimizer_options()]
    meant = _SYNONYMS.get(name) or nearest(name, known, None)
    return f"did you mean {meant!r}?" if meant else f"a group may set {', '.join(group_options())}"
