"""Local rules: what a matrix does on a local step. One file each, and one entry of RULES."""

from torch import Tensor
from torch.profiler import record_function

from curvadion.rules.base import Rule, Step
from curvadion.rules.dion import Dion
from curvadion.rules.dion2 import Dion2
from curvadion.rules.gradient import Gradient
from curvadion.rules.muon import Muon
from curvadion.rules.normuon import NorMuon
from curvadion.rules.scalar import scalar_step
from curvadion.state.batch import StateSpec

# The names of `local_update`. Their collectives follow one another in this order.
RULES: dict[str, Rule] = {
    "gradient": Gradient(),
    "dion": Dion(),
    "muon": Muon(),
    "normuon": NorMuon(),
    "dion2": Dion2(),
}

__all__ = ["RULES", "Rule", "StateSpec", "Step", "begin", "local_step", "register_rule"]


def register_rule(name: str, rule: Rule) -> None:
    """Make a rule known as `local_update=name`, on every rank and before an optimizer is built.

    Raises ValueError if the name is taken.
    """
    if name in RULES:
        raise ValueError(f"a rule's name must be new; got {name!r}, which there is already; choose another")
    RULES[name] = rule


def begin(step: Step, key: Tensor | int) -> None:
    """Let all rules enqueue what the device may do by itself, if the key says that the step is local."""
    for rule in RULES.values():
        rule.begin(step, key)


def local_step(step: Step, *, begun: bool) -> None:
    """Let each matrix do what its rule says; AdamW and Lion with this replica's gradients."""
    with record_function("curvadion::local_step"):
        for name, rule in RULES.items():
            batches = step.batches(name)
            if batches:
                rule.end(step, batches, begun=begun)
        scalar_step(step, step.G)
