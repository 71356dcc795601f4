"""What is not a hidden matrix: embeddings, the head, norms and biases, by AdamW or Lion."""

from collections.abc import Sequence

from torch import Tensor

from curvadion.algebra.scalar import MOMENTS, adamw_, lion_
from curvadion.rules.base import Step
from curvadion.state.store import or_zeros


def scalar_step(step: Step, G: Sequence[Tensor | None]) -> None:
    """Take an AdamW or Lion step, by group, with these gradients of all parameters."""
    for index, group in enumerate(step.groups):
        if group["algorithm"] not in MOMENTS:
            continue
        members = [i for i in step.table.scalars if step.table.group_of[i] == index and step.X[i].numel()]
        if not members:
            continue
        x = [step.X[i] for i in members]
        g = [or_zeros(G[i], step.X[i]) for i in members]
        moments = {key: [step.store.moments[i][key] for i in members] for key in MOMENTS[group["algorithm"]]}
        common = {
            "lr": float(group["lr"]),
            "betas": tuple(group["betas"]),
            "weight_decay": group["weight_decay"],
        }
        if group["algorithm"] == "adamw":
            adamw_(x, g, moments, step.store.counters[0, members], eps=group["eps"], **common)
        else:
            lion_(x, g, moments, **common)


def mean_gradients(step: Step) -> list[Tensor | None]:
    """Return the gradients with those of AdamW and Lion parameters averaged over the replicas."""
    mean, scalars = list(step.G), step.table.scalars
    local = [or_zeros(step.G[i], step.X[i]) for i in scalars]
    copied = [step.table.copied[i] for i in scalars]
    _, reduced = step.exchange.mean_over_replicas(
        local, [()] * len(local), copied, "gradients", payload_dtype=step.payload_dtype
    )
    for i, g in zip(scalars, reduced, strict=True):
        mean[i] = g
    return mean
