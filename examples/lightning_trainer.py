"""Lightning's Trainer with CurvaDion: a small GPT on the bytes of this repository's documentation.

    python examples/lightning_trainer.py                        # one process
    python examples/lightning_trainer.py --replicas 2           # two replicas, each its own data
    python examples/lightning_trainer.py --replicas 2 --resume  # from the newest checkpoint

Downloads nothing. What is CurvaDion's is marked.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from curvadion import LOW_COMMUNICATION, CurvaDion, param_groups_for
from curvadion.hosts.lightning import CurvaDionCallback, ReplicaStrategy

ROOT = Path(__file__).resolve().parent.parent


class GPT(pl.LightningModule):
    """A decoder of a few layers."""

    def __init__(self, width: int = 64, layers: int = 2, length: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next byte, (batch, length, 256)."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.embedding(tokens) + self.position.weight[:length]
        return self.head(self.layers(hidden, mask=mask, is_causal=True))

    def _loss(self, batch: tuple[Tensor]) -> Tensor:
        (tokens,) = batch
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: tuple[Tensor], index: int) -> Tensor:
        """Return the loss."""
        loss = self._loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor], index: int) -> None:
        """Log the loss, of all replicas."""
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return CurvaDion, and a learning rate that falls to 0."""
        # CurvaDion, from here
        optimizer = CurvaDion(
            param_groups_for(self),
            lr=0.03,
            replicate_mesh=torch.distributed.group.WORLD if self.trainer.world_size > 1 else None,
            **LOW_COMMUNICATION,
        )
        # to here
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def pieces(text: bytes, length: int = 64) -> torch.utils.data.TensorDataset:
    """Return a text cut into pieces, byte by byte."""
    return torch.utils.data.TensorDataset(torch.tensor(list(text)).unfold(0, length, length))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--output", default="runs/lightning", help="folder of the checkpoints and the log")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    pl.seed_everything(0)
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "docs").glob("*.md")))
    train = torch.utils.data.DataLoader(pieces(text[:-8192]), batch_size=8, shuffle=True)
    held_out = torch.utils.data.DataLoader(pieces(text[-8192:]), batch_size=8)
    trainer = pl.Trainer(
        max_steps=options.steps,
        devices=options.replicas,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        # CurvaDion: processes as with "ddp", without DistributedDataParallel; and the callback
        strategy=ReplicaStrategy() if options.replicas > 1 else "auto",
        callbacks=[
            CurvaDionCallback(),
            ModelCheckpoint(options.output, save_last=True, every_n_train_steps=20),
        ],
        gradient_clip_val=1.0,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        log_every_n_steps=10,
        logger=CSVLogger(options.output),
        enable_progress_bar=False,
    )
    model = GPT()
    trainer.fit(model, train, held_out, ckpt_path="last" if options.resume else None)
    [found] = trainer.validate(model, held_out, verbose=False)
    if trainer.is_global_zero:
        print(f"loss on held-out text after {trainer.global_step} steps: {found['val_loss']:.4f}")


if __name__ == "__main__":
    main()
