"""The options of CurvaDion: which belong to a parameter group, and what each may be."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvadion_kernels import KERNELS

INF = float("inf")

# option: (predicate, the rule in words, what to try)
Rule = tuple[Callable[[Any], bool], str, str]


def _one_of(*choices: str) -> Rule:
    return (lambda v: v in choices, "one of " + ", ".join(map(repr, choices)), f"try {choices[0]!r}")


def _integer(lowest: int, hint: str) -> Rule:
    return (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= lowest, f"an integer >= {lowest}", hint)


GROUP_OPTIONS: dict[str, Rule] = {
    "algorithm": _one_of("dion", "adamw", "lion"),
    "lr": (
        lambda v: 0 <= (float(v) if isinstance(v, Tensor) else v) < INF,
        "a finite number >= 0",
        "try 0.02 for matrices, 3e-3 for AdamW",
    ),
    "momentum": (lambda v: 0 <= v < 1, "in [0, 1)", "try 0.95"),
    "weight_decay": (lambda v: 0 <= v < INF, "a finite number >= 0", "try 0.01"),
    "rank_fraction": (lambda v: 0 < v <= 1, "in (0, 1]", "try 0.25: a quarter of the short side"),
    "rank_multiple_of": _integer(1, "try 1, or 8 or 16 for round kernel shapes"),
    "tau": (lambda v: v >= 0, "a number >= 0, or inf", "try 0.1; max_local_steps=0 synchronizes every step"),
    "local_update": _one_of("gradient", "dion", "muon"),
    "local_lr_scale": (lambda v: 0 <= v < INF, "a finite number >= 0", "try 1.0"),
    "error_feedback": (lambda v: isinstance(v, bool), "True or False", "try True"),
    "right_factor": _one_of("column_norm", "qr"),
    "orthogonalization": _one_of("cholesky_qr", "qr"),
    "betas": (
        lambda v: isinstance(v, (tuple, list)) and len(v) == 2 and all(0 <= b < 1 for b in v),
        "a pair of numbers in [0, 1)",
        "try (0.9, 0.95)",
    ),
    "eps": (lambda v: 0 <= v < INF, "a finite number >= 0", "try 1e-8"),
}

OPTIMIZER_OPTIONS: dict[str, Rule] = {
    "warmup_steps": _integer(0, "try 0"),
    "min_local_steps": _integer(0, "try 0"),
    "max_local_steps": (
        lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 0),
        "None or an integer >= 0",
        "try None, or 100; 0 synchronizes every step",
    ),
    "consensus": _one_of("average", "outer", "none"),
    "outer_lr": (lambda v: 0 < v < INF, "a finite number > 0", "try 1.0, plain averaging, or 0.7 with outer_momentum=0.6"),
    "outer_momentum": (lambda v: 0 <= v < 1, "in [0, 1)", "try 0.0, or 0.6 with outer_lr=0.7"),
    "outer_bits": (lambda v: v in (1, 2, 4, 8, 16, 32), "one of 1, 2, 4, 8, 16, 32", "try 4"),
    "outer_fragments": _integer(1, "try 1; more spread each synchronization over as many smaller ones"),
    "outer_delay": _integer(0, "try 0, which waits; or as many steps as a synchronization takes"),
    "outer_on_host": (lambda v: isinstance(v, bool), "True or False", "try False"),
    "target_sync_rate": (lambda v: v is None or 0 < v <= 1, "None or in (0, 1]", "try 0.05: one step in twenty"),
    "gate_every": _integer(1, "try 1; with tau=inf, max_local_steps + 1 asks nobody in between"),
    "gate_lag": (lambda v: v in (0, 1) and not isinstance(v, bool), "0 or 1", "try 0, which waits for the answer; 1 reads it a step later"),
    "momentum_dtype": (
        lambda v: v in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16),
        "None or a floating-point torch.dtype of 16, 32 or 64 bits",
        "try torch.float32",
    ),
    "payload_dtype": (  # a sum over replicas in float16 could overflow
        lambda v: v in (None, torch.float64, torch.float32, torch.bfloat16),
        "None, torch.float64, torch.float32 or torch.bfloat16",
        "try torch.bfloat16",
    ),
    "on_nonfinite": _one_of("raise", "skip"),
    "check_every": _integer(0, "try 1000; 0 checks on the first step only"),
    "kernels": _one_of(*KERNELS),
}

# The settings that docs/results.md arrives at, for 0.9 % of the bytes of bf16 dense gradients: Muon steps on each replica, and in every
# eighth step one bit per parameter. RMMC is reported and opens nothing, because a gate did no better than a fixed interval.
LOW_COMMUNICATION: dict[str, Any] = {
    "local_update": "muon",
    "momentum": 0.8,
    "consensus": "outer",
    "outer_bits": 1,
    "outer_lr": 1.4,
    "tau": INF,
    "max_local_steps": 7,
    "gate_every": 8,
}

# What these say about the pseudo-gradient would be ignored under another consensus.
OUTER_DEFAULTS = {"outer_lr": 1.0, "outer_momentum": 0.0, "outer_bits": 32, "outer_fragments": 1, "outer_delay": 0, "outer_on_host": False}

# Keys that torch, schedulers and host trainers put into groups. None changes what CurvaDion computes: its updates are always batched.
FOREIGN_KEYS = {
    *("params", "param_names", "name", "foreach", "fused", "capturable", "differentiable", "maximize"),
    *("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"),
}


def check_options(options: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> None:
    """Raise ValueError (TypeError for a wrong type) at the first option that breaks its rule."""
    for name, (allowed, rule, hint) in rules.items():
        if name not in options:
            continue
        value = options[name]
        message = f"{name} must be {rule}; got {value!r}{where}; {hint}"
        try:
            fine = bool(allowed(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(message) from error
        if not fine:
            raise ValueError(message)
    if options.get("consensus", "outer") != "outer":
        given = [name for name, value in OUTER_DEFAULTS.items() if options.get(name, value) != value]
        if given:
            raise ValueError(
                f"{given[0]} belongs to consensus='outer'; got {given[0]}={options[given[0]]!r} with consensus={options['consensus']!r}; "
                "pass consensus='outer', or leave it out"
            )
    if options.get("consensus") == "outer" and options.get("payload_dtype") is not None:
        raise ValueError(
            f"payload_dtype is of factors and gradients, which consensus='outer' does not send; got {options['payload_dtype']}; try "
            "outer_bits=16"
        )
    rate, every, lag = options.get("target_sync_rate"), options.get("gate_every", 1), options.get("gate_lag", 0)
    if rate is not None:
        low, high = options.get("min_local_steps", 0), options.get("max_local_steps")
        least = 0.0 if high is None else 1 / (high + 1)
        if not least <= rate <= 1 / max(every, low + 1, 1 + lag):
            raise ValueError(
                "target_sync_rate must lie between 1 / (max_local_steps + 1) and the smallest of 1 / gate_every, 1 / (min_local_steps + 1) "
                f"and 1 / (1 + gate_lag), or no tau could meet it; got {rate} with max_local_steps={high}, gate_every={every}, "
                f"min_local_steps={low}, gate_lag={lag}; widen them"
            )
    if options.get("min_local_steps") and options.get("max_local_steps") is not None:
        low, high = options["min_local_steps"], options["max_local_steps"]
        if low > high:
            raise ValueError(f"min_local_steps must not exceed max_local_steps; got {low} and {high}; try min_local_steps={high}")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a parameter group holds an option that is unknown, out of range, or not a group's to set."""
    for key in group:
        if key in OPTIMIZER_OPTIONS or key == "replicate_mesh":
            raise ValueError(f"{key} is common to all groups; got it in a parameter group; pass {key}= to CurvaDion instead")
        if key not in GROUP_OPTIONS and key not in FOREIGN_KEYS:
            close = difflib.get_close_matches(key, GROUP_OPTIONS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"a group may set {', '.join(GROUP_OPTIONS)}"
            raise ValueError(f"a parameter group may hold known options only; got {key!r}; {hint}")
    check_options(group, GROUP_OPTIONS, " in a parameter group")
    for key in ("maximize", "capturable", "differentiable"):
        if group.get(key):
            raise ValueError(f"CurvaDion does not implement {key}; got {key}=True in a parameter group; leave it out")


def check_parameter(name: str, p: Tensor, algorithm: str) -> None:
    """Raise if a parameter cannot be updated by the algorithm of its group."""
    if algorithm == "dion" and p.requires_grad and p.ndim != 2:
        raise ValueError(
            f"a parameter of a group with algorithm='dion' must have two dimensions; got {name} of shape {tuple(p.shape)}; put it into "
            "a group with algorithm='adamw', as param_groups_for(model) does"
        )
    if p.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"parameters must be real floating-point tensors; got {name} of {p.dtype}; train in float32 or bfloat16")
    if p.is_meta:
        raise ValueError(f"parameters must be materialized before the optimizer is built; got {name} on the meta device; to_empty() it")
