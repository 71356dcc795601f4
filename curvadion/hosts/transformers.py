"""CurvaDion under transformers' Trainer, and under what inherits from it."""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "curvadion.hosts.transformers needs transformers, which cannot be imported; try pip install "
        "'curvadion[transformers]'"
    ) from error

from curvadion.hosts import Replicas


class CurvaDionCallback(TrainerCallback):
    """Lets a Trainer know that replicas differ; with one replica too.

        trainer = Trainer(model=model, args=args, train_dataset=data)
        mesh = replicate_mesh_of(trainer.accelerator)                      # curvadion.hosts.accelerate
        trainer.optimizer = CurvaDion(param_groups_for(model), replicate_mesh=mesh, **LOW_COMMUNICATION)
        trainer.add_callback(CurvaDionCallback(trainer))
        trainer.train()

    - Replicas become equal before a checkpoint, and at the end of training: saving is part of the run.
    - `save_model` of your own in the middle of it may be of one rank alone: with consensus="outer" it saves
      what replicas agreed on last, and the run goes on as if nothing had happened. With "average" nobody has
      kept that, and replicas become equal, so call it on all ranks.
    - `evaluate` and `predict`, whoever calls them, see the mean of the replicas; the run goes on as if
      nothing had happened, also where they fail.
    - What is logged with the loss has CurvaDion's metrics beside it.
    - Training starts with the parameters of replica 0 everywhere, as in DistributedDataParallel, and does not
      start inside it.

    No event of the Trainer comes before every save and every evaluation: so the callback is given the
    trainer, and puts itself around its `save_model`, `evaluation_loop` and `log`.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._replicas = Replicas(lambda: [trainer.optimizer])
        trainer.save_model = self._saving(trainer.save_model)
        trainer.evaluation_loop = self._inside(self._replicas.consensus, trainer.evaluation_loop)
        trainer.log = self._with_metrics(trainer.log)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have all replicas start alike."""
        self._replicas.begin(self._trainer.model_wrapped)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave one model."""
        self._replicas.synchronize()

    def _saving(self, save_model: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(save_model)

        @functools.wraps(save_model)
        def saving(*args: Any, **kwargs: Any) -> Any:
            if {**signature.bind(*args, **kwargs).arguments, **kwargs}.get("_internal_call"):
                self._replicas.synchronize()  # of a checkpoint, on all ranks
            with self._replicas.common():
                return save_model(*args, **kwargs)

        return saving

    @staticmethod
    def _inside(
        context: Callable[[], AbstractContextManager[None]], call: Callable[..., Any]
    ) -> Callable[..., Any]:
        @functools.wraps(call)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with context():
                return call(*args, **kwargs)

        return inside

    def _with_metrics(self, log: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(log).parameters))

        @functools.wraps(log)
        def with_metrics(*args: Any, **kwargs: Any) -> Any:
            name = first if first in kwargs else "logs"
            logs = args[0] if args else kwargs[name]
            if "train_runtime" in logs:  # the last line, before the best model is loaded over this one
                self._replicas.synchronize()
            if "loss" in logs:
                logs = {**logs, **self._replicas.metrics()}
            return log(logs, *args[1:], **kwargs) if args else log(**{**kwargs, name: logs})

        return with_metrics
