"""CurvaDion in torchtitan: an optimizer, a parallelization and what has to know that replicas differ. No
fork, public seams only.

    python -m curvadion.titan --module curvadion_configs --config debug    # under torchrun; its own flags

A config function takes these in place of torchtitan's own (see `curvadion_configs` for complete ones)::

    Trainer.Config(
        model_spec=replicated(model_spec),               # FSDP2 in a replica, gradients local between them
        optimizer=CurvaDionOptimizer.Config(tau=0.2),    # --optimizer.tau 0.2
        metrics=MetricsProcessor.Config(),               # curvadion/* on the console, in TensorBoard and W&B
        checkpoint=CheckpointManager.Config(),           # synchronizes the replicas before each save
        validator=Validator.Config(),                    # evaluates the average of the replicas
        ...
    )

`--parallelism.data_parallel_replicate_degree` is the number of replicas, `data_parallel_shard_degree` the
FSDP2 degree inside one, `tensor_parallel_degree` (with `--parallelism.spmd_backend partial_dtensor`) what
divides it further.

The seams of torchtitan 0.3.0 that are used: subclasses of `OptimizersContainer`, `MetricsProcessor`,
`Validator` and `CheckpointManager` (its `_save`, `_load` and `_should_save`); `ModelSpec.parallelize_fn` and
`post_optimizer_build_fn`; `apply_fsdp_to_decoder` and `apply_compile`. On CPU and on torch before 2.14 also
what `compat.py` lists.
"""

from curvadion.titan import compat

compat.prepare()  # before the first import of torchtitan, so before the modules below

from curvadion.titan.components import CheckpointManager, MetricsProcessor, Validator  # noqa: E402
from curvadion.titan.optimizer import CurvaDionOptimizer  # noqa: E402
from curvadion.titan.parallelize import (  # noqa: E402
    parallelize_reduced,
    parallelize_replicas,
    reduced,
    replicated,
)

__all__ = [
    "CheckpointManager",
    "CurvaDionOptimizer",
    "MetricsProcessor",
    "Validator",
    "parallelize_reduced",
    "parallelize_replicas",
    "reduced",
    "replicated",
]
