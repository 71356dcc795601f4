"""Who reduces which gradients: FSDP2 inside a replica, and CurvaDion, or for baselines FSDP2 again, between
replicas."""

from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointingConfig
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from curvadion.titan.compat import initialize_whole
from curvadion.titan.optimizer import CurvaDionOptimizer

REFUSED = {
    "pp": (
        "pipeline",
        "pipeline_parallel_degree",
        "CurvaDion needs all matrices in one optimizer, whose gate looks at them together",
    ),
    "cp": ("context", "context_parallel_degree", "it shares a mesh axis with the shards of FSDP"),
    "ep": ("expert", "expert_parallel_degree", "experts live on a mesh of their own"),
}


def replicated(spec: ModelSpec) -> ModelSpec:
    """Return the model with gradients that stay local to a replica; for `CurvaDionOptimizer`, which owns that
    axis."""
    return replace(
        spec, parallelize_fn=parallelize_replicas, pipelining_fn=pipeline, post_optimizer_build_fn=bind
    )


def reduced(spec: ModelSpec) -> ModelSpec:
    """Return the model in the same arrangement with gradients averaged over replicas by FSDP2; for
    torchtitan's own optimizers."""
    return replace(
        spec, parallelize_fn=parallelize_reduced, pipelining_fn=pipeline, post_optimizer_build_fn=initialize
    )


def bind(optimizers: OptimizersContainer, model_parts: list[nn.Module], parallel_dims: ParallelDims) -> None:
    """Hand the replicate mesh to the optimizer: `ModelSpec.post_optimizer_build_fn`, the first hook that has
    it.

    Raises:
        ValueError: the optimizer is not CurvaDion, which alone brings such replicas back together.
    """
    if not isinstance(optimizers, CurvaDionOptimizer):
        raise ValueError(
            "gradients of a replicated() model stay local to a replica, so its optimizer must be "
            f"CurvaDionOptimizer; got {type(optimizers).__name__}, whose replicas would drift apart; use "
            "model_spec=curvadion.titan.reduced(model_spec)"
        )
    initialize(optimizers, model_parts, parallel_dims)
    optimizers.bind(parallel_dims.get_optional_mesh("dp_replicate"))


def initialize(
    optimizers: OptimizersContainer, model_parts: list[nn.Module], parallel_dims: ParallelDims
) -> None:
    """Make initial weights independent of the mesh, on CPU too."""
    for part in model_parts:
        initialize_whole(part)


def refuse(parallel_dims: ParallelDims) -> None:
    """Raise NotImplementedError for an axis that the optimizer does not support; the message names the
    flag."""
    for axis, (name, flag, why) in REFUSED.items():
        if (degree := getattr(parallel_dims, axis)) > 1:
            raise NotImplementedError(
                f"CurvaDion does not support {name} parallelism: {why}; got degree {degree}; set "
                f"--parallelism.{flag} 1 and use data_parallel_shard_degree or tensor_parallel_degree"
            )


def pipeline(model: nn.Module, *, parallel_dims: ParallelDims, **_: Any) -> Any:
    """Refuse pipeline stages: `ModelSpec.pipelining_fn`."""
    refuse(parallel_dims)


def parallelize_replicas(model: Any, *, parallel_dims: ParallelDims, **settings: Any) -> nn.Module:
    """Shard a decoder inside each replica and leave the replicate axis to the optimizer:
    `ModelSpec.parallelize_fn`.

    Args:
        settings: the other arguments of that seam, see `_apply`.

    Raises:
        NotImplementedError: an arrangement that the optimizer does not support; the message names the flag.
    """
    _apply(model, parallel_dims, **settings, reduce=False)
    logger.info(
        f"CurvaDion: {parallel_dims.dp_replicate} replicas of {parallel_dims.dp_shard} shards, gradients "
        "local to a replica"
    )
    return model


def parallelize_reduced(model: Any, *, parallel_dims: ParallelDims, **settings: Any) -> nn.Module:
    """Shard a decoder alike, with gradients averaged over the replicas in every step (HSDP), for baselines.

    Args and raises: as `parallelize_replicas`.
    """
    _apply(model, parallel_dims, **settings, reduce=True)
    return model


def _apply(
    model: Any,
    parallel_dims: ParallelDims,
    *,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    compile_config: CompileConfig,
    ac_config: ActivationCheckpointingConfig | None,
    dump_folder: str,
    reduce: bool,
) -> None:
    refuse(parallel_dims)
    if training.enable_cpu_offload:
        raise NotImplementedError(
            "CurvaDion does not support FSDP's CPU offload; got --training.enable_cpu_offload; leave it out"
        )
    if parallel_dims.tp_enabled:
        if parallelism.spmd_backend != "partial_dtensor":
            raise NotImplementedError(
                "CurvaDion supports tensor parallelism with DTensor parameters only; got "
                f"--parallelism.spmd_backend {parallelism.spmd_backend}; set it to partial_dtensor"
            )
        model.parallelize(parallel_dims)
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)

    shard = "fsdp" if parallelism.spmd_backend == "partial_dtensor" else "dp_shard"
    across = reduce and parallel_dims.dp_replicate_enabled
    mesh = parallel_dims.get_mesh(["dp_replicate", shard] if across else shard)
    apply_fsdp_to_decoder(
        model,
        mesh,
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        pp_enabled=False,
        reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
        enable_symm_mem=parallelism.enable_fsdp_symm_mem,
    )
    sharded = parallel_dims.get_mesh(shard).size() > 1
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if not reduce:
                # torchtitan's loss is divided by the tokens of all replicas; a gradient is to be the mean
                # over one.
                module.set_gradient_divide_factor(1 / parallel_dims.dp_replicate)
            if (
                utils.device_type == "cpu" and sharded
            ):  # gloo lacks PREMUL_SUM; on one shard FSDP2 would divide twice
                module.set_force_sum_reduction_for_comms(True)
