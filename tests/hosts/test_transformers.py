"""transformers' Trainer: what it trains, saves, evaluates and logs, against the plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import outcome
from support.ranks import run_ranks
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from curvadion import LOW_COMMUNICATION, CurvaDion, param_groups_for
from curvadion.hosts import curvadion_of
from curvadion.hosts.accelerate import replicate_mesh_of
from curvadion.hosts.transformers import CurvaDionCallback
from hosts.loops import DEADLINE, Net, Tokens, in_steps, mean_of, optimizer, plain, weights

LOW = LOW_COMMUNICATION(max_local_steps=2)


def trainer_of(
    folder: str, net: Net | None = None, cls: type[Trainer] = Trainer, **more: Any
) -> tuple[Trainer, Any]:
    """A Trainer without an optimizer, and the replicate_mesh."""
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    settings.update(more)
    trainer = cls(
        model=net or Net(),
        args=TrainingArguments(**settings),
        train_dataset=Tokens(96),
        eval_dataset=Tokens(16),
    )
    return trainer, replicate_mesh_of(trainer.accelerator)


def run(folder: str) -> dict[str, Any]:
    """Six steps, saved after each third, evaluated after each second; resumed from the third; and the plain
    loop."""
    told: dict[str, Any] = {}
    trainer, replicate = trainer_of(folder, save_steps=3, eval_strategy="steps", eval_steps=2)
    trainer.optimizer = optimizer(trainer.model, replicate, **LOW)
    trainer.add_callback(CurvaDionCallback(trainer))
    trainer.train()
    net = trainer.model
    told["wrapped"] = type(trainer.model_wrapped).__name__
    told["end"], told["judged"], seen = weights(net), list(net.judged), list(net.seen)
    told["logged"] = [line for line in trainer.state.log_history if "loss" in line]
    trainer.save_model(folder)  # the user's own
    told["diverged"] = curvadion_of(trainer.optimizer).diverged  # type: ignore[union-attr]

    second, replicate = trainer_of(folder, save_steps=3, eval_strategy="steps", eval_steps=2)
    second.optimizer = optimizer(second.model, replicate, **LOW)
    second.add_callback(CurvaDionCallback(second))
    second.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    told["resumed"], told["resumed_on"] = weights(second.model), len(second.model.seen)

    other = Net()
    expected = optimizer(other, replicate, **LOW)
    means = []

    def after(step: int) -> None:
        if step % 2 == 0:
            means.append(mean_of(expected, other))
        if step % 3 == 0:
            told[f"at {step}"] = weights(other)
            expected.synchronize()

    plain(other, expected, in_steps(seen, 2), clip=0.5, after=after)
    told["expected"], told["means"] = weights(other), means
    told["sent"] = expected.metrics()["curvadion/wire_total/replicate"]
    return told


@pytest.mark.parametrize("replicas", [1, 2])
def test_trainer_trains_saves_evaluates_and_resumes_as_the_plain_loop(replicas: int, tmp_path: Path) -> None:
    results = run_ranks(replicas, run, str(tmp_path), deadline=DEADLINE, group=False)
    for told in results:
        assert replicas == 1 or told["wrapped"] == "Net", "not in DistributedDataParallel"
        assert told["end"] == told["expected"], "bit for bit"
        assert told["resumed"] == told["end"], "bit for bit"
        assert told["resumed_on"] == 6, "three steps of two batches"
        assert set(told["judged"]) == set(told["means"]), "the mean of the replicas is evaluated"
        assert not told["diverged"]
        assert [line["step"] for line in told["logged"]] == [2, 4, 6]
        assert all("curvadion/sync_rate" in line for line in told["logged"])
    assert len({told["at 3"] for told in results}) == replicas, "they were apart before"
    assert len({told["end"] for told in results}) == 1
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["global_step"] == 3


class Stumbles(Net):
    """Fails in its first evaluation."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        if not self.training:
            self.judged.append(weights(self))
            raise RuntimeError("out of luck")
        return super().forward(input_ids, labels)


def stumble(folder: str) -> dict[str, Any]:
    trainer, replicate = trainer_of(folder, Stumbles(), save_strategy="no")
    opt = trainer.optimizer = optimizer(trainer.model, replicate, **LOW)
    trainer.add_callback(CurvaDionCallback(trainer))
    told: dict[str, Any] = {}

    def evaluate(*_: Any, **__: Any) -> None:  # somebody's own, between two steps
        told["own"] = weights(trainer.model)
        told["error"] = outcome(trainer.evaluate)[1]
        told["after"], told["inside"] = weights(trainer.model), opt.in_consensus
        with opt.consensus():
            told["again"] = outcome(trainer.evaluate)[1]

    opt.register_step_post_hook(lambda o, *_: evaluate() if o.metrics()["curvadion/step"] == 3 else None)
    trainer.train()
    told["judged"] = trainer.model.judged
    return told


def test_an_evaluation_that_fails_leaves_every_replica_its_own_parameters(tmp_path: Path) -> None:
    """Also one inside consensus() already."""
    results = run_ranks(2, stumble, str(tmp_path), deadline=DEADLINE, group=False)
    for told in results:
        assert told["error"] == told["again"] == "out of luck"
        assert told["after"] == told["own"] and not told["inside"]
        assert len(set(told["judged"])) == 1
    assert len({told["own"] for told in results}) == 2
    assert len({told["judged"][0] for told in results}) == 1


def refuse(folder: str) -> tuple[str, str]:
    trainer, _ = trainer_of(folder, save_strategy="no")
    del trainer.accelerator.prepare_model  # as if replicate_mesh_of had not been called
    trainer.optimizer = optimizer(trainer.model, torch.distributed.group.WORLD)
    trainer.add_callback(CurvaDionCallback(trainer))
    return outcome(trainer.train)


def test_a_trainer_that_averages_gradients_is_refused(tmp_path: Path) -> None:
    for error, message in run_ranks(2, refuse, str(tmp_path), deadline=DEADLINE, group=False):
        assert error == "RuntimeError" and "replicate_mesh_of(accelerator)" in message, message


def save_alone(folder: str) -> dict[str, Any]:
    """Rank 0 saves in the middle, when replicas are apart; the others go on."""
    trainer, replicate = trainer_of(folder)
    trainer.optimizer = opt = optimizer(trainer.model, replicate, **LOW)
    trainer.add_callback(CurvaDionCallback(trainer))
    told: dict[str, Any] = {}

    class Alone(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                told["apart"] = weights(trainer.model)
                if args.process_index == 0:
                    before = opt.metrics()["curvadion/wire_total/replicate"]
                    trainer.save_model(f"{folder}/alone")
                    told["sent"] = opt.metrics()["curvadion/wire_total/replicate"] - before
                assert weights(trainer.model) == told["apart"], "it goes on with its own"

    trainer.add_callback(Alone())
    trainer.train()
    told["end"] = weights(trainer.model)

    saved, other = Net(), Net()
    saved.load_state_dict(load_file(f"{folder}/alone/model.safetensors"))
    told["saved"] = weights(saved)
    expected = optimizer(other, replicate, **LOW)

    def after(step: int) -> None:
        if step == 5:
            with expected.common_state():
                told["common"] = weights(other)

    plain(other, expected, in_steps(trainer.model.seen, 2), clip=0.5, after=after)
    expected.synchronize()
    told["expected"] = weights(other)
    return told


def test_one_rank_alone_saves_what_replicas_agreed_on_last(tmp_path: Path) -> None:
    results = run_ranks(2, save_alone, str(tmp_path), deadline=DEADLINE, group=False)
    assert len({told["apart"] for told in results}) == 2, "replicas are apart when it is saved"
    assert results[0]["sent"] == 0
    for told in results:
        assert told["saved"] == told["common"] and told["saved"] not in (told["apart"], told["end"])
        assert told["end"] == told["expected"], "the run does not notice"


class Custom(Trainer):
    """Its methods have other arguments than Trainer's."""

    def save_model(self, folder: str | None = None, *, tag: str = "", **more: Any) -> None:
        self.saved.append((tag, more, weights(self.model)))
        super().save_model(folder, **more)

    def log(self, values: dict[str, float], start_time: float | None = None, *, note: str = "") -> None:
        super().log(values, start_time)


class Passing(Trainer):
    """Its methods pass on what they get."""

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.saved.append(("", kwargs, weights(self.model)))
        super().save_model(*args, **kwargs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(*args, **kwargs)


def custom(folder: str, cls: type[Trainer]) -> dict[str, Any]:
    trainer, replicate = trainer_of(folder, cls=cls, save_steps=5)
    trainer.saved = []
    trainer.optimizer = optimizer(trainer.model, replicate, **LOW)
    trainer.add_callback(CurvaDionCallback(trainer))
    trainer.train()
    if cls is Custom:
        trainer.save_model(folder=f"{folder}/own", tag="mine")
        trainer.log(values={"loss": 1.0}, note="mine")
    else:
        trainer.save_model(output_dir=f"{folder}/own")
        trainer.log(logs={"loss": 1.0})
    last = trainer.state.log_history[-1]
    alone = trainer.accelerator.prepare_model(Net(), None, True)
    return {"saved": trainer.saved, "logged": last, "alone": type(alone).__name__}


@pytest.mark.parametrize("cls", [Custom, Passing])
def test_a_trainer_may_have_other_arguments(cls: type[Trainer], tmp_path: Path) -> None:
    """Of `save_model` and `log`, by position or by name; a checkpoint is told from a save of one's own."""
    first, second = run_ranks(2, custom, str(tmp_path), cls, deadline=DEADLINE, group=False)
    assert first["saved"] == second["saved"], "replicas are equal when a checkpoint is saved"
    *checkpoints, (tag, more, _) = first["saved"]
    assert checkpoints and all(kwargs["_internal_call"] for _, kwargs, _ in checkpoints)
    assert tag == ("mine" if cls is Custom else "") and not more.get("_internal_call")
    assert (tmp_path / "own" / "model.safetensors").exists()
    for told in (first, second):
        assert told["logged"]["loss"] == 1.0 and "curvadion/sync_rate" in told["logged"]
        assert told["alone"] == "Net", "not in DistributedDataParallel"


def best(folder: str) -> dict[str, Any]:
    """Saving is decided after an evaluation; the best model is loaded at the end."""
    trainer, replicate = trainer_of(
        folder,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        max_steps=5,
    )
    trainer.optimizer = optimizer(trainer.model, replicate, **LOW)
    trainer.add_callback(CurvaDionCallback(trainer))
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    own = curvadion_of(trainer.optimizer)
    assert own is not None
    own.state_dict()  # equal, and can be saved
    trainer.train()  # and trained on
    return {"end": weights(trainer.model), "best": trainer.state.best_global_step}


def test_the_best_model_is_the_mean_of_the_replicas(tmp_path: Path) -> None:
    first, second = run_ranks(2, best, str(tmp_path), deadline=DEADLINE, group=False)
    assert first == second and first["best"]


def other_ways(folder: str) -> dict[str, float]:
    """Other ways to hand over an optimizer; on one process."""
    told = {}

    def factory() -> Any:
        return lambda model, **options: CurvaDion(param_groups_for(model), **options)

    for name, more in {
        "optimizers": {},
        "optimizer_cls_and_kwargs": {"optimizer_cls_and_kwargs": (factory, {"lr": 0.02, **LOW})},
        "bf16": {"bf16": True},
        "plateau": {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "metric_for_best_model": "loss",
        },
        "epochs": {
            "max_steps": -1,
            "num_train_epochs": 1,
            "save_strategy": "epoch",
            "eval_strategy": "epoch",
        },
    }.items():
        cls = more.pop("optimizer_cls_and_kwargs", None)  # type: ignore[attr-defined]
        net = Net()
        settings: dict[str, Any] = {
            "output_dir": f"{folder}/{name}",
            "max_steps": 4,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **more,
        }
        opt = None if cls else optimizer(net, None, **LOW)
        trainer = Trainer(
            model=net,
            args=TrainingArguments(**settings),
            train_dataset=Tokens(32),
            eval_dataset=Tokens(8),
            optimizers=(opt, None),
            optimizer_cls_and_kwargs=cls,
        )
        trainer.add_callback(CurvaDionCallback(trainer))
        before = weights(net)
        trainer.train()
        assert weights(net) != before
        told[name] = curvadion_of(trainer.optimizer).metrics()["curvadion/step"]  # type: ignore[union-attr]
    return told


def test_other_ways_to_hand_over_an_optimizer(tmp_path: Path) -> None:
    [told] = run_ranks(1, other_ways, str(tmp_path), deadline=DEADLINE)
    assert told == dict.fromkeys(("optimizers", "optimizer_cls_and_kwargs", "bf16", "plateau", "epochs"), 4)
