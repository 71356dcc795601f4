"""CurvaDion as torchtitan builds its optimizers: every option a typed field, so a flag and a line of the logged config."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.tools.logging import logger

from curvadion import CurvaDion, param_groups_for

OPTIONS = tuple(name for name in inspect.signature(CurvaDion).parameters if name not in ("params", "replicate_mesh"))
DTYPES = ("momentum_dtype", "payload_dtype")  # written as strings in a config
NAME = "CurvaDion"


class CurvaDionOptimizer(OptimizersContainer):
    """One CurvaDion over all parameters of a model.

    A second optimizer beside it, for embeddings say, would see gradients that nobody averages over the replicas; CurvaDion's own AdamW
    and Lion take those parameters. The optimizer itself is made by `bind`, when torchtitan hands the meshes over.

    Raises:
        ValueError: an option breaks a rule; the message names it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Options of `curvadion.CurvaDion` under their own names, and two about parameter groups.

        `param_groups` may take the place of the automatic groups: patterns on parameter names with `optimizer_name="CurvaDion"` and
        group options as `optimizer_kwargs`. `implementation` changes nothing: CurvaDion's updates are always batched.
        """

        lr: float = 0.02
        """Peak learning rate of matrices."""
        adamw_lr: float = 3e-3
        """Peak learning rate of everything else: embeddings, head, norms."""
        scalar_algorithm: Literal["adamw", "lion"] = "adamw"
        """Rule for everything that is not a hidden matrix."""
        overrides: dict[str, str] = field(default_factory=dict)
        """From a pattern, searched for in the names of parameters, to "dion", "adamw" or "lion"."""
        momentum: float = 0.95
        """mu."""
        weight_decay: float = 0.01
        """Decoupled, of matrices and the head; uses lr on both branches."""
        rank_fraction: float = 0.25
        """r = round_up(rank_fraction * min(m, n), rank_multiple_of)."""
        rank_multiple_of: int = 1
        """See rank_fraction."""
        tau: float = 0.1
        """Threshold of the gate; inf leaves min_local_steps and max_local_steps alone in charge."""
        warmup_steps: int = 0
        """Synchronize the first steps. Not the warm-up of the learning rate, which is --lr_scheduler.warmup_steps."""
        min_local_steps: int = 0
        """After a synchronized step, ignore the gate for that many steps."""
        max_local_steps: int | None = None
        """After that many local steps in a row the next is synchronized; 0 is synchronous training."""
        local_update: Literal["gradient", "dion", "muon"] = "gradient"
        """What a matrix does on a local step."""
        local_lr_scale: float = 1.0
        """Learning rate of matrices on local steps, relative to lr."""
        consensus: Literal["average", "outer", "none"] = "average"
        """Whether and how replicas come back together on synchronized steps; "none" drifts."""
        outer_lr: float = 1.0
        """Of consensus="outer"; 1 is plain averaging."""
        outer_momentum: float = 0.0
        """Nesterov momentum of consensus="outer"."""
        outer_bits: Literal[1, 2, 4, 8, 16, 32] = 32
        """Bits per parameter between replicas with consensus="outer"."""
        outer_fragments: int = 1
        """Parts of the parameters that take turns at synchronized steps with consensus="outer"."""
        outer_delay: int = 0
        """Steps for which a synchronization is under way with consensus="outer"; 0 waits for it."""
        outer_on_host: bool = False
        """Keep the reference of consensus="outer" in host memory."""
        target_sync_rate: float | None = None
        """Share of steps to synchronize: tau is steered until the gate opens that often."""
        gate_every: int = 1
        """Ask the other replicas on every so-manieth step only."""
        gate_lag: Literal[0, 1] = 0
        """1: local steps do not wait for the gate's answer."""
        error_feedback: bool = True
        """Keep in the momentum what the low-rank update left out."""
        right_factor: Literal["column_norm", "qr"] = "column_norm"
        """"column_norm" is Dion, "qr" Orth-Dion."""
        betas: tuple[float, float] = (0.9, 0.95)
        """Of AdamW and Lion."""
        eps: float = 1e-8
        """Of AdamW."""
        momentum_dtype: Literal["float32", "bfloat16"] | None = None
        """Of momentum and moments; None: the parameter's."""
        payload_dtype: Literal["float32", "bfloat16"] | None = None
        """Of factors and AdamW gradients between replicas; None: the tensor's own."""
        orthogonalization: Literal["cholesky_qr", "qr"] = "cholesky_qr"
        """Shifted Cholesky QR, or Householder."""
        on_nonfinite: Literal["raise", "skip"] = "raise"
        """What all ranks do in a step with a NaN or an infinity."""
        check_every: int = 1000
        """Steps between checks that all ranks agree; 0: on the first step only."""
        kernels: Literal["auto", "triton", "reference"] = "auto"
        """Where the hot operations run."""

    config: Config
    _synchronized: float  # these three since the last `metrics()`
    _bytes: float
    _rmmc_max: float

    def __init__(self, config: Config, *, model_parts: list[nn.Module]):
        if len(model_parts) != 1:
            raise ValueError(
                f"CurvaDion takes a model in one part; got {len(model_parts)} pipeline stages; set --parallelism.pipeline_parallel_degree 1"
            )
        if config.optimizer_factory_kwargs_by_name:
            raise ValueError(
                "optimizer_factory_kwargs_by_name is for torchtitan's own optimizers; got "
                f"{config.optimizer_factory_kwargs_by_name}; set the fields of CurvaDionOptimizer.Config"
            )
        if config.implementation == "fused_opt_states_bf16":
            raise ValueError("implementation='fused_opt_states_bf16' is for Adam; use --optimizer.momentum_dtype bfloat16")
        self.config = config
        self.optimizers: list[CurvaDion] = []
        self.model_parts = model_parts
        self.steps = 0  # since construction
        self._groups = self._make_groups(config, model_parts[0])
        params = [p for group in self._groups for p in group["params"]]
        self._validate_params(params)
        self._post_init(params)
        self._forget()

    def _make_groups(self, config: Config, model: nn.Module) -> list[dict[str, Any]]:
        """Return groups whose `param_names` are the names that torchtitan's checkpoints use."""
        if config.param_groups:
            others = sorted({group.optimizer_name for group in config.param_groups} - {NAME})
            if others:
                raise ValueError(
                    f"every group must have optimizer_name={NAME!r}: another optimizer would see gradients that differ between replicas; "
                    f"got {', '.join(others)}; use optimizer_kwargs={{'algorithm': 'adamw'}}"
                )
            return self._build_param_groups(model, config.param_groups, {})[0][NAME]
        groups = param_groups_for(model, adamw_lr=config.adamw_lr, scalar_algorithm=config.scalar_algorithm, overrides=config.overrides)
        for group in groups:
            names = [canonical_fqn(name) for name, _ in group["params"]]
            group |= {"params": [p for _, p in group["params"]], "param_names": names}
            sizes = sum(p.numel() for p in group["params"])
            logger.info(f"CurvaDion: {group.pop('name')}: {len(names)} parameters, {sizes:,} elements, {group['algorithm']}")
        return groups

    def bind(self, replicate_mesh: DeviceMesh | None) -> None:
        """Construct CurvaDion with the slow axis, and give all replicas the weights of replica 0.

        Args:
            replicate_mesh: 1-D, None for one replica.
        """
        options = {name: getattr(self.config, name) for name in OPTIONS}
        options |= {name: getattr(torch, options[name]) for name in DTYPES if options[name] is not None}
        opt = CurvaDion(self._groups, replicate_mesh=replicate_mesh, **options)
        if opt.replicas > 1:
            opt.broadcast_parameters()
        self.optimizers = [opt]

    @property
    def curvadion(self) -> CurvaDion:
        """The optimizer itself. Raises RuntimeError before `bind`."""
        if not self.optimizers:
            raise RuntimeError(
                "CurvaDion has to be told which ranks are replicas, and was not; set model_spec=curvadion.titan.replicated(model_spec), "
                "whose post_optimizer_build_fn does it"
            )
        return self.optimizers[0]

    def __iter__(self) -> Iterator[CurvaDion]:
        return iter([self.curvadion])

    def __len__(self) -> int:
        return len([self.curvadion])

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take one step, and remember what the next line of the log should say."""
        super().step(closure)
        now = self.curvadion.metrics()
        self.steps += 1
        self._steps += 1
        self._synchronized += now["curvadion/synchronized"]
        self._bytes += now["curvadion/bytes/replicate"]
        if not math.isnan(now["curvadion/rmmc_max"]):
            self._rmmc_max = max(self._rmmc_max, now["curvadion/rmmc_max"])

    def _forget(self) -> None:
        self._steps = 0
        self._synchronized = self._bytes = self._rmmc_max = 0.0

    def metrics(self) -> dict[str, float]:
        """Return `CurvaDion.metrics()` and, under ``curvadion/since_log/``, what happened since the last call.

        ``synchronized`` counts steps, ``sync_rate`` is their share, ``rmmc_max`` the largest RMMC, ``bytes/replicate`` a sum.
        """
        since = {
            "synchronized": self._synchronized,
            "sync_rate": self._synchronized / max(self._steps, 1),
            "rmmc_max": self._rmmc_max,
            "bytes/replicate": self._bytes,
        }
        self._forget()
        return self.curvadion.metrics() | {f"curvadion/since_log/{key}": float(value) for key, value in since.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return torchtitan's flat state dict, keyed by parameter name; refused while replicas differ."""
        self.curvadion  # noqa: B018 - raises before bind
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a flat state dict. Options are those of this run's config, not the saved ones.

        A learning rate that changed scales the saved one, which the schedule had reached.
        """
        groups = self.curvadion.param_groups
        own = [{key: value for key, value in group.items() if key not in ("params", "param_names")} for group in groups]
        super().load_state_dict(state_dict)
        for group, mine in zip(self.curvadion.param_groups, own, strict=True):
            peak, saved_peak = mine.get("initial_lr", mine["lr"]), group.get("initial_lr", group["lr"])
            lr = group["lr"] if peak == saved_peak or not saved_peak else group["lr"] * peak / saved_peak
            changed = {key: (group[key], value) for key, value in mine.items() if key != "lr" and group.get(key) != value}
            for key, (before, now) in changed.items():
                logger.info(f"CurvaDion: {key} is now {now}; the checkpoint was saved with {before}")
            group |= {**mine, "lr": lr}
