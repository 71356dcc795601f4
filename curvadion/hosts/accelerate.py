"""CurvaDion under Accelerate, and under what is built on it, as transformers' Trainer is."""

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

try:
    from accelerate.parallelism_config import ParallelismConfig
except ImportError as error:
    raise ImportError(
        "curvadion.hosts.accelerate needs accelerate, which cannot be imported; try pip install "
        "'curvadion[accelerate]'"
    ) from error

if TYPE_CHECKING:
    from accelerate import Accelerator

REPLICATE = "dp_replicate"  # Accelerate's name of the axis


class _ReplicasApart(ParallelismConfig):
    """Accelerate's axes, of which FSDP2 sees those of one replica."""

    @property
    def fsdp_dim_names(self) -> list[str]:
        """Names of the axes over which FSDP2 shards."""
        return [name for name in super().fsdp_dim_names if name != REPLICATE]


def replicate_mesh_of(accelerator: "Accelerator") -> DeviceMesh | ProcessGroup | None:
    """Return CurvaDion's `replicate_mesh`, along which the accelerator leaves gradients alone from now on.

        accelerator = Accelerator()                                        # or trainer.accelerator
        opt = CurvaDion(param_groups_for(model), replicate_mesh=replicate_mesh_of(accelerator))
        model, opt, loader = accelerator.prepare(model, opt, loader)

    Without shards every process is a replica, and `prepare` puts the model where it belongs, with autocast
    and compilation, but not into DistributedDataParallel. With FSDP2 the replicas are `dp_replicate_size` of
    the `ParallelismConfig`, and `prepare` shards inside each of them. Otherwise there is one replica: None.

    Raises:
        RuntimeError: a model has been prepared already.
        ValueError: FSDP1, DeepSpeed or Megatron average gradients themselves.
    """
    kind = accelerator.distributed_type.value.removeprefix("MULTI_")
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise ValueError(
            f"replicas must keep their own gradients; got {kind}, which averages them; take Accelerate "
            "without a plug-in, or with FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if accelerator._models:
        raise RuntimeError(
            "replicate_mesh_of(accelerator) must be called before a model is prepared, for afterwards its "
            f"gradients are averaged; {len(accelerator._models)} have been; call it right after Accelerator()"
        )
    mesh, config = accelerator.torch_device_mesh, accelerator.parallelism_config
    names = (mesh.mesh_dim_names or ()) if mesh is not None else ()
    if REPLICATE in names:
        apart = _ReplicasApart(
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
        )
        apart.device_mesh = config.device_mesh
        accelerator.state.parallelism_config = apart
    if kind == "FSDP" or names:
        return mesh[REPLICATE] if REPLICATE in names else None
    if accelerator.num_processes == 1:
        return None
    # `prepare` does the same for a model that is only evaluated, but for DistributedDataParallel.
    prepare_model = accelerator.prepare_model
    signature = inspect.signature(prepare_model)

    @functools.wraps(prepare_model)
    def prepare_alone(*args: Any, **kwargs: Any) -> Any:
        if "evaluation_mode" not in signature.parameters:  # a subclass passes on what it is given
            return prepare_model(*args, **kwargs | {"evaluation_mode": True})
        given = signature.bind(*args, **kwargs)
        given.arguments["evaluation_mode"] = True
        return prepare_model(*given.args, **given.kwargs)

    accelerator.prepare_model = prepare_alone
    return dist.group.WORLD
