"""What else of torchtitan has to know that replicas differ: checkpoints, validation and the log."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
import torchtitan.components.checkpointer as checkpointer
import torchtitan.components.metrics as metrics
import torchtitan.components.validate as validate
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.tools.logging import logger

from curvadion.titan.optimizer import CurvaDionOptimizer

TOKEN_COUNT = 8  # bytes: an int64, summed over all data-parallel ranks before each step
VALIDATION_LOSS = 4  # bytes: a float32, in each validation
LOSSES = 16  # bytes: mean and largest loss in float32 and an int64 of tokens seen, in each logged step


# What goes to TensorBoard and W&B, with all_curvadion everything.
LOGGED = (
    "curvadion/synchronized",
    "curvadion/steps_since_sync",
    "curvadion/since_log/sync_rate",
    "curvadion/since_log/rmmc_max",
    "curvadion/tau",
    "curvadion/skipped_steps",
    "curvadion/wire/shard",
    "curvadion/wire_total/replicate",
    "curvadion/dense_bf16_wire_total",
    "torchtitan/bytes_total/replicate",
)


class CheckpointManager(checkpointer.CheckpointManager):
    """torchtitan's checkpoints, of replicas that are made one before each save; the final one is the
    consensus model.

    Saving is therefore part of the run: another `interval` is another run.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(checkpointer.CheckpointManager.Config):
        """The fields of torchtitan's own."""

    def __init__(self, config: Config, *, optimizers: OptimizersContainer, **kwargs: Any):
        self._optimizers = optimizers
        super().__init__(config, optimizers=optimizers, **kwargs)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if isinstance(self._optimizers, CurvaDionOptimizer) and self._should_save(curr_step, last_step):
            self._optimizers.curvadion.synchronize()
        return super()._save(curr_step, last_step)

    def _load(self, step: int = -1) -> bool:
        if isinstance(self._optimizers, CurvaDionOptimizer) and self._optimizers.curvadion.diverged:
            # DCP asks for the state dict that it is about to fill.
            self._optimizers.curvadion.discard_divergence()
        return super()._load(step)


class MetricsProcessor(metrics.MetricsProcessor):
    """torchtitan's log, and CurvaDion's metrics beside it: a line on the console, TensorBoard, W&B.

    What torchtitan itself sends across replicas for its token and loss sums is not CurvaDion's, and counted
    apart, per rank: ``torchtitan/bytes_total/replicate``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(metrics.MetricsProcessor.Config):
        """The fields of torchtitan's own, and one more."""

        all_curvadion: bool = False
        """Log every number of `CurvaDion.metrics()` to TensorBoard and W&B, also the bytes of every purpose,
        rather than those that one looks at (`LOGGED`)."""

    logged_steps = validations = validation_steps = 0

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log what torchtitan logs, and ``curvadion/*``."""
        if not isinstance(self.optimizers, CurvaDionOptimizer):
            super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
            return
        values = self.optimizers.metrics()
        self.logged_steps += 1
        counts = TOKEN_COUNT * (self.optimizers.steps + self.validation_steps)
        own = counts + LOSSES * self.logged_steps + VALIDATION_LOSS * self.validations
        values["torchtitan/bytes_total/replicate"] = float(
            own if self.parallel_dims.dp_replicate_enabled else 0
        )
        logged = values if self.config.all_curvadion else {name: values[name] for name in LOGGED}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, {**(extra_metrics or {}), **logged})
        logger.info(self._line(step, values))

    def _line(self, step: int, values: dict[str, float]) -> str:
        assert isinstance(self.optimizers, CurvaDionOptimizer)
        opt, color = self.optimizers.curvadion, self.color
        argmax = int(values["curvadion/rmmc_argmax"])
        sent, dense = values["curvadion/wire_total/replicate"], values["curvadion/dense_bf16_wire_total"]
        rmmc = values["curvadion/rmmc_max"]
        return (
            f"{color.red}step: {step:2}  "
            f"{color.green}rmmc: {'undefined' if math.isnan(rmmc) else f'{rmmc:.4f}'}"
            f"{f' ({opt.matrix_names[argmax]})' if argmax >= 0 else ''}  "
            f"{color.orange}synchronized: {values['curvadion/since_log/sync_rate']:.0%} since last line, "
            f"{values['curvadion/sync_rate']:.1%} in all  "
            f"{color.cyan}sent to replicas: {sent / 1e6:,.2f} MB of {dense / 1e6:,.2f} MB dense "
            f"bf16{color.reset}"
        )


class Validator(validate.Validator):
    """torchtitan's validation, of the average of the replicas; the run goes on as if nothing had happened."""

    @dataclass(kw_only=True, slots=True)
    class Config(validate.Validator.Config):
        """The fields of torchtitan's own."""

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Evaluate the model that all replicas agree on."""
        optimizers = self.metrics_processor.optimizers
        with ExitStack() as stack:
            if isinstance(optimizers, CurvaDionOptimizer):
                stack.enter_context(optimizers.curvadion.consensus())
            super().validate(model_parts, step)
        if isinstance(self.metrics_processor, MetricsProcessor):
            self.metrics_processor.validations += 1

    def post_dataloading_process(self, *args: Any, **kwargs: Any) -> Any:
        """Do what torchtitan does with a batch, and count it."""
        if isinstance(self.metrics_processor, MetricsProcessor):
            self.metrics_processor.validation_steps += 1
        return super().post_dataloading_process(*args, **kwargs)
