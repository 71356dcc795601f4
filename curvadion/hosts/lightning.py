"""CurvaDion under Lightning: a strategy whose replicas keep their own gradients, and a callback."""

import functools
import sys
from typing import Any

from torch import nn

from curvadion.hosts import Replicas

try:  # two packages with the same classes, which do not go together
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.strategies import DDPStrategy
    else:
        from lightning.pytorch import Callback, LightningModule, Trainer
        from lightning.pytorch.strategies import DDPStrategy
except ImportError as error:
    raise ImportError(
        "curvadion.hosts.lightning needs lightning, which cannot be imported; try pip install "
        "'curvadion[lightning]'"
    ) from error


class ReplicaStrategy(DDPStrategy):
    """Lightning's "ddp", its processes and its sampling of data, without DistributedDataParallel: every
    process is a replica and keeps its own gradients.

        Trainer(strategy=ReplicaStrategy(), devices=4, callbacks=[CurvaDionCallback()])

    `configure_optimizers` gives CurvaDion ``replicate_mesh=torch.distributed.group.WORLD``.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model

    def _register_ddp_hooks(self) -> None:
        """There is no DistributedDataParallel to have hooks."""


class CurvaDionCallback(Callback):
    """Lets Lightning know that replicas differ; with one replica, and with ModelParallelStrategy too.

    - Replicas become equal before anything is saved, whoever saves it, and at the end of training: saving is
      part of the run. Not after an exception, when other ranks may be gone: what is saved then is refused,
      see `CurvaDion.state_dict`.
    - Validation, tests and predictions see the mean of the replicas; the run goes on as if nothing had
      happened.
    - The loggers get CurvaDion's metrics every `log_every_n_steps`.
    - Training starts with the parameters of replica 0 everywhere, as in DistributedDataParallel, and does not
      start inside it.
    """

    def __init__(self) -> None:
        self._replicas = Replicas(list)
        self._logged = -1  # a step of several batches is logged once

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put itself around `trainer.save_checkpoint`, before which nothing is called."""
        self._replicas = replicas = Replicas(lambda: trainer.strategy.optimizers)
        save = trainer.save_checkpoint
        if hasattr(save, "__wrapped__"):
            save = save.__wrapped__

        @functools.wraps(save)
        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            if not trainer.interrupted:
                replicas.synchronize()
            return save(*args, **kwargs)

        trainer.save_checkpoint = save_checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have all replicas start alike."""
        self._replicas.begin(trainer.strategy.model)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Log, in the line that Lightning has for this step."""
        step, every = trainer.global_step - 1, trainer.log_every_n_steps
        if step == self._logged or not every or (step + 1) % every:
            return
        self._logged = step
        metrics = self._replicas.metrics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave one model."""
        self._replicas.synchronize()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the mean of the replicas."""
        self._replicas.enter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give each replica its own parameters again."""
        self._replicas.leave()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give each replica its own parameters again."""
        self._replicas.leave(everything=True)
