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
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger

from curvadion.optimizer import CurvaDion
from curvadion.sharding.group import gather, is_first_rank
from curvadion.state.newest import load_newest, steps_of
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
    consensus model. The newest that all ranks can load is loaded.

    Saving is therefore part of the run: another `interval` is another run. Not so with an `async_mode`, which
    saves `CurvaDion.common_state`, but for the final one.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(checkpointer.CheckpointManager.Config):
        """The fields of torchtitan's own."""

    def __init__(self, config: Config, *, optimizers: OptimizersContainer, **kwargs: Any):
        self._optimizers = optimizers
        super().__init__(config, optimizers=optimizers, **kwargs)
        asynchronous = self.enable and self.async_mode != checkpointer.AsyncMode.DISABLED
        if asynchronous and self._curvadion is not None and not self._curvadion.keeps_common_state:
            raise ValueError(
                "a save while replicas differ needs parameters that they share, which "
                "--optimizer.consensus outer keeps; got --checkpoint.async_mode "
                f"{config.async_mode} with --optimizer.consensus {self._optimizers.config.consensus}; try "
                "outer, or --checkpoint.async_mode disabled, which synchronizes them"
            )

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        opt = self._curvadion
        if opt is None or not self._should_save(curr_step, last_step):
            return super()._save(curr_step, last_step)
        self._clear(self._create_checkpoint_id(curr_step))
        if last_step or self.async_mode == checkpointer.AsyncMode.DISABLED:
            opt.synchronize()
            return super()._save(curr_step, last_step)
        self.maybe_wait_for_saving()  # not inside, where nobody trains
        with opt.common_state():
            saved = super()._save(curr_step, last_step)
            self.maybe_wait_for_staging()  # parameters are the run's own again after this
        return saved

    def _load(self, step: int = -1) -> bool:
        opt = self._curvadion
        if opt is None:
            return super()._load(step)
        if opt.diverged:  # DCP asks for the state dict that it is about to fill
            opt.discard_divergence()
        if step != -1:
            return super()._load(step)
        loaded = load_newest(self._saved_steps(), super()._load, opt.loading, logger.warning)
        return True if loaded is not None else super()._load(-1)

    @property
    def _curvadion(self) -> CurvaDion | None:
        return self._optimizers.curvadion if isinstance(self._optimizers, CurvaDionOptimizer) else None

    def _find_load_step(self, folder: str = "") -> int:
        return max(gather(self._saved_steps(folder))[0], default=-1)

    @staticmethod
    def _clear(place: str) -> None:
        """Remove a checkpoint that is in the way, so that none that is half written passes for complete."""
        if is_first_rank() and filesystem.isfile(filesystem.join(place, ".metadata")):
            filesystem.rmtree(place)  # it lets the others write, later

    def _saved_steps(self, folder: str = "") -> list[int]:
        """Return the steps of checkpoints whose save came to its end; folders of other names are none."""
        folder = folder or self.folder
        names = filesystem.listdir(folder) if filesystem.isdir(folder) else []
        last = (".metadata", "model.safetensors.index.json")

        def ended(step: int) -> bool:
            place = filesystem.join(folder, f"step-{step}")
            return any(filesystem.isfile(filesystem.join(place, name)) for name in last)

        return [step for step in steps_of(names) if ended(step)]


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
