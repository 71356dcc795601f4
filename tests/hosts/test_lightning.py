"""Lightning's Trainer: what it trains, saves, validates and logs, against the plain loop."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from support.models import grid, outcome
from support.ranks import run_ranks
from torch.distributed.fsdp import fully_shard

from curvadion import LOW_COMMUNICATION
from curvadion.hosts.lightning import CurvaDionCallback, ReplicaStrategy
from hosts.loops import DEADLINE, Net, Tokens, in_steps, mean_of, optimizer, plain, weights

LOW = LOW_COMMUNICATION(max_local_steps=2)


class Module(pl.LightningModule):
    """`Net` and CurvaDion; over `shards` if there are several."""

    def __init__(self, replicas: int = 1, shards: int = 1, stumbles: bool = False):
        super().__init__()
        self.net = Net()
        self.replicas, self.shards, self.stumbles = replicas, shards, stumbles
        self.meshes: Any = None

    def configure_model(self) -> None:
        if self.shards > 1 and self.meshes is None:
            self.meshes = grid(self.replicas, self.shards)
            fully_shard(self.net, mesh=self.meshes[1])

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.net(**batch)[0]

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        loss = self.net(**batch)[0]
        if self.stumbles and not self.trainer.sanity_checking:
            raise RuntimeError("out of luck")
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        replicate = dist.group.WORLD if self.replicas > 1 else None
        if self.meshes is not None and self.replicas > 1:
            replicate = self.meshes[0]
        opt = optimizer(self.net, replicate, **LOW)
        return [opt], [torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)]


def trainer_of(folder: str, ranks: int, **more: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "accelerator": "cpu",
        "devices": ranks,
        "strategy": ReplicaStrategy() if ranks > 1 else "auto",
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 2,
        "inference_mode": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": CSVLogger(folder),
        "callbacks": [CurvaDionCallback(), ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=3)],
    }
    return pl.Trainer(**{**settings, **more})


def loaders() -> tuple[Any, Any]:
    train = torch.utils.data.DataLoader(Tokens(96), batch_size=2, shuffle=True)
    return train, torch.utils.data.DataLoader(Tokens(16), batch_size=4)


def run(replicas: int, shards: int, folder: str) -> dict[str, Any]:
    """Six steps of two batches, saved after each third, validated after each second; resumed from the third;
    and the plain loop."""
    told: dict[str, Any] = {}
    ranks = replicas * shards

    def strategy() -> dict[str, Any]:
        if shards == 1:
            return {}
        return {"strategy": ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)}

    pl.seed_everything(3)
    module = Module(replicas, shards)
    trainer = trainer_of(folder, ranks, **strategy())
    trainer.fit(module, *loaders())
    told["wrapped"] = type(trainer.strategy.model).__name__
    told["end"], seen = weights(module.net), list(module.net.seen)
    told["judged"] = list(dict.fromkeys(module.net.judged))
    path = next(Path(folder).glob("*step=3.ckpt"))

    pl.seed_everything(3)
    second = Module(replicas, shards)
    again = trainer_of(folder, ranks, **strategy(), logger=False, use_distributed_sampler=False)
    due = torch.utils.data.DataLoader([{"input_ids": t} for t in seen[6:] + seen[:6]], batch_size=None)
    again.fit(second, due, loaders()[1], ckpt_path=str(path))  # it does not know where in the epoch it was
    told["resumed"] = weights(second.net)

    other = Net()
    meshes = grid(replicas, shards) if shards > 1 else None
    if meshes is not None:
        fully_shard(other, mesh=meshes[1])
    replicate = None if replicas == 1 else dist.group.WORLD if meshes is None else meshes[0]
    expected = optimizer(other, replicate, **LOW)
    told["means"] = [mean_of(expected, other)]  # the sanity check

    def after(step: int) -> None:
        if step % 3 == 0:  # Lightning saves before it validates
            told[f"at {step}"] = weights(other)
            expected.synchronize()
        if step % 2 == 0:
            told["means"].append(mean_of(expected, other))

    plain(other, expected, in_steps(seen, 2), clip=0.5, lightning=True, after=after)
    told["expected"] = weights(other)
    return told


@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_lightning_trains_saves_validates_and_resumes_as_the_plain_loop(
    replicas: int, shards: int, tmp_path: Path
) -> None:
    results = run_ranks(
        replicas * shards, run, replicas, shards, str(tmp_path), deadline=DEADLINE, group=False
    )
    for told in results:
        assert told["wrapped"] == "Module", "not in DistributedDataParallel"
        assert told["end"] == told["expected"], "bit for bit"
        assert told["resumed"] == told["end"], "bit for bit"
        assert told["judged"] == told["means"], "the mean of the replicas is validated"
    assert len({told["at 3"] for told in results[::shards]}) == replicas, "they were apart before"
    assert len({told["end"] for told in results[::shards]}) == 1
    with open(next(tmp_path.rglob("metrics.csv"))) as lines:
        logged = [line for line in csv.DictReader(lines) if line["curvadion/sync_rate"]]
    assert [line["step"] for line in logged] == ["1", "3", "5"]


def stumble(folder: str) -> dict[str, Any]:
    trainer = trainer_of(folder, 2)
    module = Module(2, stumbles=True)
    told: dict[str, Any] = {"error": outcome(lambda: trainer.fit(module, *loaders()))}
    [opt] = trainer.strategy.optimizers
    told["inside"], told["diverged"], told["weights"] = opt.in_consensus, opt.diverged, weights(module.net)
    told["refused"] = outcome(lambda: trainer.save_checkpoint(f"{folder}/late.ckpt"))
    return told


def test_a_validation_that_fails_leaves_every_replica_its_own_parameters(tmp_path: Path) -> None:
    """And nothing is synchronized after it, for the others may be gone."""
    results = run_ranks(2, stumble, str(tmp_path), deadline=DEADLINE, group=False)
    for told in results:
        assert told["error"] == ("RuntimeError", "out of luck")
        assert told["diverged"] and not told["inside"]
        assert "call opt.synchronize() on every rank" in told["refused"][1], told["refused"]
    assert len({told["weights"] for told in results}) == 2


def refuse(folder: str) -> tuple[str, str]:
    return outcome(lambda: trainer_of(folder, 2, strategy="ddp").fit(Module(2), *loaders()))


def test_a_strategy_that_averages_gradients_is_refused(tmp_path: Path) -> None:
    for error, message in run_ranks(2, refuse, str(tmp_path), deadline=DEADLINE, group=False):
        assert error == "RuntimeError" and "ReplicaStrategy()" in message, message


def mixed(folder: str) -> tuple[float, bool]:
    module = Module()
    before = weights(module.net)
    trainer = trainer_of(folder, 1, precision="bf16-mixed", max_steps=3)
    trainer.fit(module, *loaders())
    [opt] = trainer.strategy.optimizers
    return opt.metrics()["curvadion/step"], weights(module.net) != before


def test_gradients_are_clipped_in_mixed_precision(tmp_path: Path) -> None:
    assert run_ranks(1, mixed, str(tmp_path), deadline=DEADLINE, group=False) == [(3.0, True)]
