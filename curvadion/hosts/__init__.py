"""CurvaDion under other people's trainers. Importing this package needs none of them.

`curvadion.hosts.accelerate`, `.transformers` and `.lightning` import theirs. What these hosts do for any
optimizer and must not do here is average gradients (DistributedDataParallel, HSDP). What they cannot know is
that replicas differ between two synchronizations: a callback makes them equal before something is saved, and
has their mean evaluated. docs/hosts.md says what to write.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from curvadion.optimizer import CurvaDion

LOGGED = tuple(
    f"curvadion/{name}"
    for name in (
        "synchronized",
        "sync_rate",
        "steps_since_sync",
        "tau",
        "rmmc_max",
        "skipped_steps",
        "wire_total/replicate",
        "dense_bf16_wire_total",
    )
)


def curvadion_of(optimizer: Any) -> CurvaDion | None:
    """Return the CurvaDion inside the wrappers of Accelerate and Lightning, None if it is something else."""
    while optimizer is not None and not isinstance(optimizer, CurvaDion):
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
    return optimizer


class Replicas:
    """What a host's callback does with the replicas of a run; every rank calls each method.

    Args:
        optimizers: returns the host's optimizers, as they are when asked.
    """

    def __init__(self, optimizers: Callable[[], Iterable[Any]]):
        self._optimizers = optimizers
        self._entered = 0
        self._held = ExitStack()

    @property
    def all(self) -> list[CurvaDion]:
        """Those of the optimizers that are CurvaDion."""
        return [opt for opt in map(curvadion_of, self._optimizers()) if opt is not None]

    def begin(self, model: nn.Module | None) -> None:
        """Give every replica the parameters of replica 0, as DistributedDataParallel would at the start of
        training, and refuse to train in that.

        Raises:
            RuntimeError: there are several replicas, and the model is in DistributedDataParallel.
        """
        for opt in self.all:
            if opt.replicas > 1 and isinstance(model, DistributedDataParallel):
                raise RuntimeError(
                    "replicas must keep their own gradients; got a model in DistributedDataParallel, which "
                    f"averages those of {opt.replicas} replicas in every step; with Trainer and Accelerate "
                    "take replicate_mesh from curvadion.hosts.accelerate.replicate_mesh_of(accelerator), "
                    "with Lightning strategy=curvadion.hosts.lightning.ReplicaStrategy()"
                )
            if opt.replicas > 1 and not opt.metrics()["curvadion/step"]:
                opt.broadcast_parameters()

    def synchronize(self) -> None:
        """Make replicas equal, if they may differ."""
        for opt in self.all:
            if opt.diverged:
                opt.synchronize()

    @contextmanager
    def common(self) -> Iterator[None]:
        """Hold what replicas were equal in last, so that any rank may save it, alone or with others; where
        nobody has kept that, make replicas equal, for which all ranks must come."""
        with ExitStack() as held:
            for opt in self.all:
                if opt.diverged and opt.replicas > 1 and opt.keeps_common_state:
                    held.enter_context(opt.common_state())
                elif opt.diverged:
                    opt.synchronize()
            yield

    def enter(self) -> None:
        """Hold the mean of the replicas, from the first `enter` to the last `leave`."""
        self._entered += 1
        if self._entered == 1:
            try:
                for opt in self.all:
                    if not opt.in_consensus:
                        self._held.enter_context(opt.consensus())
            except BaseException:
                self.leave(everything=True)
                raise

    def leave(self, *, everything: bool = False) -> None:
        """Give each replica its own parameters again; communicates nothing."""
        self._entered = 0 if everything else max(0, self._entered - 1)
        if not self._entered:
            self._held.close()

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """`enter` and `leave`."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def metrics(self) -> dict[str, float]:
        """Return those of `CurvaDion.metrics` that a log line has room for and that are numbers; those of a
        second optimizer with its position."""
        found: dict[str, float] = {}
        for number, opt in enumerate(self.all):
            values = opt.metrics()
            suffix = f"/{number}" if number else ""
            found |= {f"{key}{suffix}": values[key] for key in LOGGED if not math.isnan(values[key])}
        return found
