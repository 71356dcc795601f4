"""Named runs for torchtitan: `--module curvadion_configs --config gpt_160m`. A function for each, and flags
for the rest.

    gpt_160m, gpt_350m, gpt_720m, gpt_1b3     CurvaDion, recommended settings
    ..._paper                                 CurvaDion, the paper's text: plain gradient steps in between
    ..._dion                                  Dion, synchronized every step
    ..._adamw                                 AdamW on gradients averaged over all ranks
    debug, debug_paper, debug_dion, debug_adamw     a toy of the same shape, on local text, for a CPU
    debug_recommended                               the same; debug itself has a gate that opens often

All runs of one size see the same tokens in the same batches. Layouts are flags:
`--parallelism.data_parallel_replicate_degree` is the number of replicas (nodes, or groups of nodes), the rest
of the ranks shard.

Where the values come from:

- Tokens: 20 per parameter (Hoffmann et al., arXiv:2203.15556); at 160M the 3000 steps of microsoft/dion's
  `dion_160m.yaml`, which is 19.4. Sequence length and batch: the same file at 160M (1024 sequences of 1024);
  above, GPT-3's (Brown et al., arXiv:2005.14165, table 2.1): 0.5M tokens for its 350M and 760M models, 1M for
  1.3B, in sequences of 2048 tokens.
- Dion: lr 0.02, momentum 0.95, weight decay 0.01, no warm-up, linear decay over the last 20 %:
  `dion_160m.yaml`. The paper recommends the learning rate for all sizes, since an orthonormal update scaled
  by sqrt(m/n) transfers (Ahn et al., arXiv:2504.05295).
- AdamW: peak learning rates of table 2.1, betas (0.9, 0.95), weight decay 0.1, clipping at 1.0, warm-up over
  375M tokens, cosine to 10 %: appendix B of the same paper.
- `adamw_lr` of embeddings, head and norms beside Dion: 3e-3, CurvaDion's default; not tuned.
- CurvaDion's recommended settings: `curvadion.LOW_COMMUNICATION`, one bit per parameter on every eighth step,
  with the learning rate that was best for Muon on every step of a byte-level model of 0.13M parameters
  (docs/results.md). Nothing has been tuned at these sizes.
"""

from dataclasses import dataclass

from curvadion import LOW_COMMUNICATION

# Before torchtitan, which it makes ready for this machine.
from curvadion.titan import (
    CheckpointManager,
    CurvaDionOptimizer,
    MetricsProcessor,
    Validator,
    reduced,
    replicated,
)

# isort: split

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from curvadion_configs import data
from curvadion_configs.models import gpt

data.register()


@dataclass(frozen=True)
class Budget:
    """What a model is trained on; sources above."""

    seq_len: int
    batch: int  # sequences
    steps: int
    adamw_lr: float
    local_batch_size: int

    @property
    def adamw_warmup(self) -> int:
        """Steps in 375M tokens."""
        return round(375e6 / (self.seq_len * self.batch))


BUDGETS = {
    "160m": Budget(1024, 1024, 3000, 6e-4, local_batch_size=32),
    "350m": Budget(2048, 256, 13_732, 3e-4, local_batch_size=16),
    "720m": Budget(2048, 256, 27_498, 2.5e-4, local_batch_size=8),
    "1b3": Budget(2048, 512, 25_492, 2e-4, local_batch_size=4),
}


def _recommended() -> CurvaDionOptimizer.Config:
    return CurvaDionOptimizer.Config(lr=0.03, **LOW_COMMUNICATION)


def _paper() -> CurvaDionOptimizer.Config:
    return CurvaDionOptimizer.Config(local_update="gradient", tau=0.1)


def _dion() -> CurvaDionOptimizer.Config:
    return CurvaDionOptimizer.Config(rank_fraction=0.5, max_local_steps=0)


def _adamw(lr: float) -> OptimizersContainer.Config:
    config = default_adamw(lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    config.implementation = "foreach" if utils.device_type == "cpu" else "fused"
    return config


def _gpt(size: str, optimizer: OptimizersContainer.Config) -> Trainer.Config:
    """Return a run on C4; `--dataloader.dataset fineweb` for FineWeb, `local` for text of one's own."""
    budget = BUDGETS[size]
    ours = isinstance(optimizer, CurvaDionOptimizer.Config)
    spec = gpt(size)
    if ours:
        schedule = LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.2, decay_type="linear")
    else:
        schedule = LRSchedulersContainer.Config(
            warmup_steps=budget.adamw_warmup, decay_type="cosine", min_lr_factor=0.1
        )
    return Trainer.Config(
        model_spec=replicated(spec) if ours else reduced(spec),
        loss=ChunkedLossWrapper.Config(
            loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
        ),
        hf_assets_path="assets/gpt2",
        optimizer=optimizer,
        lr_scheduler=schedule,
        training=TrainingConfig(
            local_batch_size=budget.local_batch_size,
            global_batch_size=budget.batch,
            seq_len=budget.seq_len,
            steps=budget.steps,
            disable_cuda_graphs=True,  # the optimizer changes shards between a step and the next
        ),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        validator=Validator.Config(
            freq=250,
            steps=20,
            dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_validation", infinite=False),
        ),
        metrics=MetricsProcessor.Config(log_freq=10, enable_tensorboard=True),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(enable=True, interval=500),
        activation_checkpoint=None,
        compile=CompileConfig(enable=True),
    )


def _debug(optimizer: OptimizersContainer.Config) -> Trainer.Config:
    """Return a run of seconds on CPU; `scripts/prepare_assets.py` makes what it reads."""
    ours = isinstance(optimizer, CurvaDionOptimizer.Config)
    spec = gpt("debug")
    local = HuggingFaceTextDataLoader.Config(dataset="local", dataset_path="assets/text")
    return Trainer.Config(
        model_spec=replicated(spec) if ours else reduced(spec),
        loss=ChunkedLossWrapper.Config(
            loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
        ),
        hf_assets_path="assets/tokenizer",
        optimizer=optimizer,
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=5, decay_ratio=0.2),
        training=TrainingConfig(
            local_batch_size=4,
            seq_len=128,
            steps=100,
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        dataloader=local,
        validator=Validator.Config(freq=20, steps=2, dataloader=local),
        metrics=MetricsProcessor.Config(log_freq=5),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(interval=20, last_save_model_only=False),
        activation_checkpoint=None,
    )


def gpt_160m() -> Trainer.Config:
    """160M parameters, CurvaDion, recommended settings."""
    return _gpt("160m", _recommended())


def gpt_160m_paper() -> Trainer.Config:
    """160M parameters, CurvaDion as in the paper's text."""
    return _gpt("160m", _paper())


def gpt_160m_dion() -> Trainer.Config:
    """160M parameters, Dion, synchronized every step."""
    return _gpt("160m", _dion())


def gpt_160m_adamw() -> Trainer.Config:
    """160M parameters, AdamW."""
    return _gpt("160m", _adamw(BUDGETS["160m"].adamw_lr))


def gpt_350m() -> Trainer.Config:
    """350M parameters, CurvaDion, recommended settings."""
    return _gpt("350m", _recommended())


def gpt_350m_paper() -> Trainer.Config:
    """350M parameters, CurvaDion as in the paper's text."""
    return _gpt("350m", _paper())


def gpt_350m_dion() -> Trainer.Config:
    """350M parameters, Dion, synchronized every step."""
    return _gpt("350m", _dion())


def gpt_350m_adamw() -> Trainer.Config:
    """350M parameters, AdamW."""
    return _gpt("350m", _adamw(BUDGETS["350m"].adamw_lr))


def gpt_720m() -> Trainer.Config:
    """720M parameters, CurvaDion, recommended settings."""
    return _gpt("720m", _recommended())


def gpt_720m_paper() -> Trainer.Config:
    """720M parameters, CurvaDion as in the paper's text."""
    return _gpt("720m", _paper())


def gpt_720m_dion() -> Trainer.Config:
    """720M parameters, Dion, synchronized every step."""
    return _gpt("720m", _dion())


def gpt_720m_adamw() -> Trainer.Config:
    """720M parameters, AdamW."""
    return _gpt("720m", _adamw(BUDGETS["720m"].adamw_lr))


def gpt_1b3() -> Trainer.Config:
    """1.3B parameters, CurvaDion, recommended settings."""
    return _gpt("1b3", _recommended())


def gpt_1b3_paper() -> Trainer.Config:
    """1.3B parameters, CurvaDion as in the paper's text."""
    return _gpt("1b3", _paper())


def gpt_1b3_dion() -> Trainer.Config:
    """1.3B parameters, Dion, synchronized every step."""
    return _gpt("1b3", _dion())


def gpt_1b3_adamw() -> Trainer.Config:
    """1.3B parameters, AdamW."""
    return _gpt("1b3", _adamw(BUDGETS["1b3"].adamw_lr))


def debug() -> Trainer.Config:
    """A toy for a CPU, CurvaDion."""
    return _debug(CurvaDionOptimizer.Config(local_update="dion", tau=0.3, max_local_steps=4))


def debug_recommended() -> Trainer.Config:
    """A toy, CurvaDion, recommended settings."""
    return _debug(_recommended())


def debug_paper() -> Trainer.Config:
    """A toy for a CPU, CurvaDion as in the paper's text."""
    return _debug(_paper())


def debug_dion() -> Trainer.Config:
    """A toy for a CPU, Dion, synchronized every step."""
    return _debug(_dion())


def debug_adamw() -> Trainer.Config:
    """A toy for a CPU, AdamW."""
    return _debug(_adamw(3e-3))
