"""The torchtitan plug-in, through torchtitan's real trainer: gloo, CPU, the debug config on local text.

Trainers run in forked ranks (see ranks.py), so that torchtitan is imported once; one test goes through
torchrun and the command line.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.ranks import RankFailed, run_ranks
from support.wire import Wire

from curvadion import CurvaDion, assert_routing, param_groups_for

pytest.importorskip("torchtitan", reason="the plug-in is for torchtitan: install the [torchtitan] extra")
pytest.importorskip("triton", reason="torchtitan imports triton: install the [torchtitan] extra")

from curvadion.titan import (
    compat,
    parallelize_replicas,
)  # before torchtitan, which it makes ready for this machine

# isort: split
import datasets
from torchtitan.components.optimizer import ParamGroupConfig
from torchtitan.config import ConfigManager
from torchtitan.distributed.activation_checkpoint import SelectiveAC

import curvadion_configs
from curvadion.sharding.layout import local_tensor
from curvadion.titan.components import LOGGED
from curvadion.titan.optimizer import OPTIONS, CurvaDionOptimizer
from curvadion_configs.models import SHAPES

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(name for name in vars(curvadion_configs) if name.startswith(("gpt_", "debug")))


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and a tokenizer, made by the script that users run."""
    folder = tmp_path_factory.mktemp("assets")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "prepare_assets.py"),
        "--characters",
        "400000",
        "--out",
        str(folder),
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"RAYON_NUM_THREADS": "1"})
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.config.HF_HUB_OFFLINE = True
    return folder


UNCLIPPED = ("--training.max_norm", "1e9")


def flags(assets: Path, out: Path) -> list[str]:
    text = str(assets / "text")
    return [
        *("--hf_assets_path", str(assets / "tokenizer"), "--dataloader.dataset_path", text),
        *(
            "--validator.dataloader.dataset_path",
            text,
            "--dump_folder",
            str(out),
            "--debug.no-enable_structured_logging",
        ),
        *("--metrics.log_freq", "1"),
    ]


def parse(config: str, *options: object) -> Any:
    return ConfigManager().parse_args(
        ["--module", "curvadion_configs", "--config", config, *map(str, options)]
    )


def layout(replicas: int, shards: int) -> tuple[object, ...]:
    return (
        "--parallelism.data_parallel_replicate_degree",
        replicas,
        "--parallelism.data_parallel_shard_degree",
        shards,
    )


def trainer_for(config: str, *options: object) -> Any:
    """Build torchtitan's trainer on a rank of run_ranks()."""
    os.environ |= {
        "LOCAL_RANK": "0",
        "RANK": str(torch.distributed.get_rank()),
        "WORLD_SIZE": str(torch.distributed.get_world_size()),
    }
    return parsed(config, *map(str, options)).build()


@functools.cache
def parsed(config: str, *options: str) -> Any:
    """`parse` for a trainer, which takes half a second; ranks forked later have it."""
    return parse(config, "--debug.seed", 3, *options)


def train(world_size: int, fn: Callable[..., Any], config: str, options: Sequence[object], *rest: Any) -> Any:
    """`run_ranks` for a function that builds the trainer of these options."""
    parsed(config, *map(str, options))
    return run_ranks(world_size, fn, config, options, *rest)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """This rank's part of every parameter."""
    return {name: local_tensor(p).detach().clone() for name, p in trainer.model_parts[0].named_parameters()}


def run(config: str, options: Sequence[object], stop_after: int | None = None) -> dict[str, Any]:
    """Train on this rank; `stop_after` ends it there as if it were killed. Return losses, validation losses
    and the final weights."""
    trainer = trainer_for(config, *options)
    processor, losses, validation = trainer.metrics_processor, {}, {}
    log, log_validation = processor.log, processor.log_validation

    def remember(step: int, loss: float, *rest: Any, **named: Any) -> None:
        losses[step] = loss
        log(step, loss, *rest, **named)

    def remember_validation(loss: float, step: int, **named: Any) -> None:
        validation[step] = loss
        log_validation(loss, step, **named)

    processor.log, processor.log_validation = remember, remember_validation
    if stop_after is not None:
        trainer.should_continue_training = lambda: trainer.step < stop_after
    trainer.train()
    optimizer = next(iter(trainer.optimizers))
    result = {"losses": losses, "validation": validation, "weights": weights(trainer)}
    if isinstance(optimizer, CurvaDion):
        result |= {
            "metrics": optimizer.metrics(),
            "diverged": optimizer.diverged,
            "tau": optimizer.param_groups[0]["tau"],
        }
    trainer.close()
    return result


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_parses_and_builds_on_meta(name: str) -> None:
    config = parse(name)
    with torch.device("meta"):
        model = config.model_spec.model.build()
    assert sum(p.numel() for p in model.parameters()) == SHAPES[config.model_spec.flavor].parameters
    assert config.training.global_batch_size in (-1, 1024, 256, 512)


def test_every_size_has_every_method() -> None:
    assert set(CONFIGS) == {
        f"{size}{method}"
        for size in ("debug", *(f"gpt_{s}" for s in SHAPES if s != "debug"))
        for method in METHODS
    } | {"debug_recommended"}


METHODS = ("", "_paper", "_dion", "_adamw")


def test_typed_fields_are_the_optimizers_options() -> None:
    """Names and defaults: what docs/options.md says of an option holds for its flag."""
    config = CurvaDionOptimizer.Config()
    parameters = inspect.signature(CurvaDion).parameters
    assert {name: getattr(config, name) for name in OPTIONS} == {
        name: parameters[name].default if name != "kernels" else "auto" for name in OPTIONS
    }


def test_names_and_options_of_what_is_registered_are_flags_too() -> None:
    flags = ("outer_bits", "ternary", "gate", "mean_change", "own keep", "0.5")
    pairs = zip(flags[::2], flags[1::2], strict=True)
    config = parse(
        "gpt_160m", *(word for flag, value in pairs for word in f"--optimizer.{flag} {value}".split())
    )
    config = config.optimizer
    assert (config.outer_bits, config.gate, config.own) == ("ternary", "mean_change", {"keep": 0.5})
    assert parse("gpt_160m", "--optimizer.outer_bits", "4").optimizer.outer_bits == 4


def test_tau_from_the_command_line_reaches_the_gate() -> None:
    config = parse(
        "gpt_160m",
        "--optimizer.tau",
        "inf",
        "--optimizer.max_local_steps",
        "5",
        "--optimizer.momentum_dtype",
        "bfloat16",
    )
    container = config.optimizer.build(model_parts=[parse("debug").model_spec.model.build()])
    with pytest.raises(RuntimeError, match="which ranks are replicas"):
        len(container)
    container.bind(None)
    options = container.curvadion._options
    assert {group["tau"] for group in container.curvadion.param_groups} == {float("inf")}
    assert (options.schedule.max_local_steps, options.momentum_dtype) == (5, torch.bfloat16)
    assert options.given["outer_bits"] == 1


def test_names_survive_activation_checkpointing_and_compile() -> None:
    def groups(wrap: bool) -> list[tuple[str, list[str]]]:
        model = parse("debug").model_spec.model.build()
        if wrap:
            SelectiveAC.Config().build().apply(model)
            for block in model.layers.values():
                block.compile(backend="eager")
        container = CurvaDionOptimizer.Config().build(model_parts=[model])
        container.bind(None)
        return [(group["algorithm"], group["param_names"]) for group in container.curvadion.param_groups]

    plain = groups(wrap=False)
    assert groups(wrap=True) == plain
    assert [(algorithm, len(names)) for algorithm, names in plain] == [
        ("dion", 14),
        ("adamw", 1),
        ("adamw", 1),
        ("adamw", 5),
    ]


def test_the_table_of_all_parameters_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    container = CurvaDionOptimizer.Config().build(model_parts=[parse("debug").model_spec.model.build()])
    monkeypatch.setattr("curvadion.titan.optimizer.logger.info", lines.append)
    container.bind(None)
    [table] = [line for line in lines if "what becomes of each parameter" in line]
    assert table.endswith(str(container.curvadion.explain()))
    assert_routing(container.curvadion, {r"attention\.|feed_forward\.": "dion", ".*": "adamw"})


def test_groups_by_torchtitans_own_patterns() -> None:
    config = parse("debug").optimizer
    matrices = {
        "pattern": r"(attention\..*|feed_forward\.)w.*weight$",
        "optimizer_name": "CurvaDion",
        "optimizer_kwargs": {"tau": 0.5},
    }
    rest = {
        "pattern": ".*",
        "optimizer_name": "CurvaDion",
        "optimizer_kwargs": {"algorithm": "adamw", "lr": 1e-3},
    }
    config.param_groups = [ParamGroupConfig(**matrices), ParamGroupConfig(**rest)]
    container = config.build(model_parts=[parse("debug").model_spec.model.build()])
    container.bind(None)
    assert [(len(g["params"]), g["algorithm"], g["tau"]) for g in container.curvadion.param_groups] == [
        (14, "dion", 0.5),
        (7, "adamw", 0.3),
    ]
    config.param_groups[1].optimizer_name = "AdamW"
    with pytest.raises(ValueError, match="must have optimizer_name='CurvaDion'.*got AdamW"):
        config.build(model_parts=[parse("debug").model_spec.model.build()])


@pytest.mark.parametrize("axis", ["pp", "cp", "ep"])
def test_other_parallelisms_are_refused(axis: str) -> None:
    config = parse("debug")
    dims = SimpleNamespace(**{"pp": 1, "cp": 1, "ep": 1, axis: 2})
    with pytest.raises(
        NotImplementedError, match=r"does not support .* parallelism: .* got degree 2; set --parallelism\."
    ):
        parallelize_replicas(
            None,
            parallel_dims=dims,
            training=config.training,
            parallelism=config.parallelism,
            compile_config=config.compile,
            ac_config=None,
            dump_folder="",
        )


def test_untested_versions_are_named() -> None:
    assert compat.untested("0.3.0", "2.13.0+cpu") == []
    assert len(compat.untested("0.4.0", "2.16.0")) == 2


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.1"])
def test_a_torch_in_which_torchtitan_dies_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    words = rf"needs torch 2\.13 or newer; this is {re.escape(version)}, in which .* try pip"
    with pytest.raises(ImportError, match=words):
        compat.prepare()


def test_the_extra_and_the_page_say_which_torch_is_needed() -> None:
    oldest = ".".join(map(str, compat.TESTED_TORCH[0]))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"torch>={oldest}" in extras["torchtitan"]
    assert f"torch >= {oldest}" in (ROOT / "docs" / "torchtitan.md").read_text()


def first_gradients(config: str, options: Sequence[object]) -> dict[str, Any]:
    """Return the initial weights, and the gradients that the optimizer sees in the first step."""
    trainer = trainer_for(config, *options)
    start, seen = weights(trainer), {}

    def look() -> None:
        seen.update(
            {name: local_tensor(p.grad).clone() for name, p in trainer.model_parts[0].named_parameters()}
        )

    trainer.optimizers.step = look
    trainer.step = 1
    trainer.train_step(trainer.batch_generator(trainer.dataloader))
    trainer.close()
    return {"weights": start, "gradients": seen}


@pytest.fixture(scope="module")
def two_by_two(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """`first_gradients` of two replicas of two shards, by rank."""
    options = [*flags(assets, tmp_path_factory.mktemp("two_by_two")), *layout(2, 2), *UNCLIPPED]
    return train(4, first_gradients, "debug", options)


def test_gradients_are_local_to_a_replica_and_rightly_scaled(
    two_by_two: list[dict[str, Any]], assets: Path, tmp_path: Path
) -> None:
    """Between replicas all differ, and their mean is what HSDP would have made of them."""
    options = [*flags(assets, tmp_path), *layout(2, 2), *UNCLIPPED]
    local = [rank["gradients"] for rank in two_by_two]
    reduced = [rank["gradients"] for rank in train(4, first_gradients, "debug_adamw", options)]
    for name in local[0]:
        for shard in range(2):
            mine, other = local[shard][name], local[2 + shard][name]
            assert not torch.equal(mine, other), name
            torch.testing.assert_close((mine + other) / 2, reduced[shard][name])
            assert torch.equal(reduced[shard][name], reduced[2 + shard][name]), name


def test_one_shard_scales_alike(assets: Path, tmp_path: Path) -> None:
    """FSDP2 on a mesh of one rank divides in another place."""
    options = [*flags(assets, tmp_path), *layout(2, 1), *UNCLIPPED]
    local = [rank["gradients"] for rank in train(2, first_gradients, "debug", options)]
    reduced = [rank["gradients"] for rank in train(2, first_gradients, "debug_adamw", options)]
    for name in local[0]:
        assert not torch.equal(local[0][name], local[1][name]), name
        torch.testing.assert_close((local[0][name] + local[1][name]) / 2, reduced[0][name])


def test_initial_weights_do_not_depend_on_the_mesh(
    two_by_two: list[dict[str, Any]], assets: Path, tmp_path: Path
) -> None:
    """DTensor on a CPU mesh would fill all shards with the same numbers."""
    whole = train(1, first_gradients, "debug", [*flags(assets, tmp_path), *UNCLIPPED])[0]["weights"]
    for replica in (two_by_two[:2], two_by_two[2:]):
        assert_same({name: torch.cat([rank["weights"][name] for rank in replica]) for name in whole}, whole)


# The first save is after a local step, so that replicas differ and have to be brought together.
def overfit(options: Sequence[object]) -> tuple[list[float], list[float]]:
    """Return the losses of 40 steps on one batch, through torchtitan and through a loop written by hand."""
    constant_lr = ("--lr_scheduler.warmup_steps", 1, "--lr_scheduler.decay_ratio", 0)
    trainer = trainer_for("debug", *options, *constant_lr)
    config, losses = trainer.config.optimizer, []
    by_hand = trainer.config.model_spec.model.build()
    with torch.no_grad():
        for p, own in zip(by_hand.parameters(), trainer.model_parts[0].parameters(), strict=True):
            p.copy_(local_tensor(own))
    trainer.metrics_processor.log = lambda step, loss, *_, **__: losses.append(loss)
    batch = next(iter(trainer.dataloader))
    batches = trainer.batch_generator(itertools.repeat(batch))
    for trainer.step in range(1, 41):
        trainer.train_step(batches)

    opt = CurvaDion(
        param_groups_for(by_hand, adamw_lr=config.adamw_lr),
        lr=config.lr,
        tau=config.tau,
        local_update=config.local_update,
        max_local_steps=config.max_local_steps,
    )
    inputs, labels = batch
    expected = []
    for _ in range(40):
        logits = by_hand(inputs["input"], positions=inputs["positions"])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), trainer.config.training.max_norm)
        opt.step()
        opt.zero_grad()
        expected.append(loss.item())
    trainer.close()
    return losses, expected


def test_overfits_as_a_loop_by_hand(assets: Path, tmp_path: Path) -> None:
    losses, expected = run_ranks(1, overfit, [*flags(assets, tmp_path), "--training.steps", 40])[0]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] / 2


CHECKPOINTED = [
    *("--training.steps", 8, "--checkpoint.enable", "--checkpoint.interval", 3),
    *("--optimizer.tau", 0.6, "--optimizer.max_local_steps", 2),
]


@pytest.fixture(scope="module")
def uninterrupted(
    assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("uninterrupted")
    options = [
        *flags(assets, out),
        *layout(2, 2),
        *CHECKPOINTED,
        "--validator.enable",
        "--validator.freq",
        4,
        "--validator.steps",
        1,
    ]
    return out, train(4, run, "debug", options)


def test_a_run_learns(uninterrupted: tuple[Path, list[dict[str, Any]]]) -> None:
    ranks = uninterrupted[1]
    losses = ranks[0]["losses"]
    assert set(losses) == set(range(1, 9))
    assert losses[8] < losses[1] - 0.1
    assert not ranks[0]["diverged"], "the final checkpoint is that of the consensus"
    for shard in range(2):
        assert_same(ranks[shard]["weights"], ranks[2 + shard]["weights"])
    metrics = ranks[0]["metrics"]
    assert 0 < metrics["curvadion/sync_rate"] < 1, "the test is of both branches"


def test_validation_and_being_killed_do_not_change_the_run(
    uninterrupted: tuple[Path, list[dict[str, Any]]], assets: Path, tmp_path: Path
) -> None:
    """The same losses, and bit for bit the same weights, as the run that saved at the same steps, looked at
    the consensus in between, and was not killed."""
    whole = uninterrupted[1]
    assert set(whole[0]["validation"]) == {1, 4, 8}
    assert len({rank["validation"][8] for rank in whole}) == 1
    options = [*flags(assets, tmp_path), *layout(2, 2), *CHECKPOINTED]
    killed = train(4, run, "debug", options, 5)
    assert not killed[0]["validation"]
    assert killed[0]["losses"] == {step: whole[0]["losses"][step] for step in range(1, 6)}
    saved = tmp_path / "checkpoint"
    for step, spoil in ((4, "cut"), (5, "no metadata"), (9, "empty metadata")):  # newer, passed over
        shutil.copytree(saved / "step-3", saved / f"step-{step}")
        data, metadata = next((saved / f"step-{step}").glob("*.distcp")), saved / f"step-{step}" / ".metadata"
        if spoil == "cut":
            data.write_bytes(data.read_bytes()[:1000])
        elif spoil == "no metadata":
            metadata.unlink()
        else:
            metadata.write_bytes(b"")
    shutil.copytree(saved / "step-3", saved / "step-40.old")
    resumed = train(4, run, "debug", options)
    assert resumed[0]["losses"] == {step: whole[0]["losses"][step] for step in range(4, 9)}
    for left, right in zip(whole, resumed, strict=True):
        assert_same(left["weights"], right["weights"])
        assert left["metrics"]["curvadion/step"] == right["metrics"]["curvadion/step"] == 8


def weights_by_step(config: str, options: Sequence[object]) -> dict[int, dict[str, torch.Tensor]]:
    """Train, and return the whole weights of this replica after each step."""
    trainer, found = trainer_for(config, *options), {}
    step = trainer.optimizers.step

    def remember() -> None:
        step()
        found[trainer.step] = weights(trainer)

    trainer.optimizers.step = remember
    trainer.train()
    trainer.close()
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_asynchronous_save_is_of_what_replicas_were_equal_in_last(assets: Path, tmp_path: Path) -> None:
    """Saved in step 3, synchronized in steps 1 and 4: it holds the weights of step 1, and step 3's
    counters."""
    options = [*flags(assets, tmp_path), *layout(2, 1), "--training.steps", 5, "--checkpoint.enable"]
    options += ["--checkpoint.interval", 3, "--checkpoint.async_mode", "async"]
    options += ["--optimizer.max_local_steps", 2, "--optimizer.consensus", "outer", "--optimizer.tau", "inf"]
    one, other = train(2, weights_by_step, "debug", options)
    assert_same(one[1], other[1])
    assert not all(torch.equal(one[3][name], other[3][name]) for name in one[3])
    state = {name: torch.zeros_like(value) for name, value in one[1].items()}
    counters = {f"optimizer.state.{name}.step": torch.zeros(()) for name in state}
    dcp.load(wanted := state | counters, checkpoint_id=tmp_path / "checkpoint" / "step-3", no_dist=True)
    assert_same({name: wanted[name] for name in state}, one[1])
    assert {float(wanted[name]) for name in counters} == {3.0}


@pytest.mark.sample
@pytest.mark.parametrize(("replicas", "shards"), [(1, 4), (4, 1)])
def test_resume_on_another_mesh(
    uninterrupted: tuple[Path, list[dict[str, Any]]], assets: Path, tmp_path: Path, replicas: int, shards: int
) -> None:
    """The loss of the step after the load is the same: it is that of the loaded weights, on the same
    tokens."""
    out, whole = uninterrupted
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "step-3").symlink_to(out / "checkpoint" / "step-3")
    options = [*flags(assets, tmp_path), *layout(replicas, shards), *CHECKPOINTED, "--optimizer.tau", 0.7]
    resumed = train(4, run, "debug", options)
    assert resumed[0]["losses"][4] == pytest.approx(whole[0]["losses"][4], rel=1e-6)
    assert set(resumed[0]["losses"]) == set(range(4, 9))
    assert resumed[0]["tau"] == 0.7, "the command line outranks the checkpoint"


def test_tensor_parallel(assets: Path, tmp_path: Path) -> None:
    """2 shards x 2 tensor-parallel ranks train as 2 ranks without tensor parallelism, but for the order of
    sums."""
    common = [*flags(assets, tmp_path), "--training.steps", 4, "--optimizer.max_local_steps", 0]
    plain = train(2, run, "debug", [*common, *layout(1, 2)])
    split = train(4, run, "debug", [*common, *layout(1, 2), "--parallelism.tensor_parallel_degree", 2])
    assert split[0]["losses"] == pytest.approx(plain[0]["losses"], rel=1e-4)


def test_local_gradients_need_curvadion(assets: Path, tmp_path: Path) -> None:
    def build() -> None:
        config = parse("debug_adamw", *flags(assets, tmp_path))
        config.model_spec = parse("debug").model_spec
        os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
        config.build()

    with pytest.raises(RankFailed, match="its optimizer must be CurvaDionOptimizer; got OptimizersContainer"):
        run_ranks(1, build)


def traffic(config: str, options: Sequence[object]) -> list[dict[str, Any]]:
    """Return for each of five steps what the Flight Recorder saw, what the ledger says, and what was
    logged."""
    trainer = trainer_for(config, *options)
    optimizer, batches, logged, trace = (
        trainer.optimizers.curvadion,
        trainer.batch_generator(trainer.dataloader),
        {},
        [],
    )
    trainer.metrics_processor.logger.log = lambda metrics, step: logged.update(metrics)
    wire = Wire(shards=2)
    for trainer.step in range(1, 6):
        wire.since_last()
        trainer.train_step(batches)
        sent = wire.since_last()
        trace.append(
            {
                "replicate": sum(entry.bytes for entry in sent if entry.axis == "replicate"),
                "everybody": [entry.bytes for entry in sent if entry.axis == "both"],
                "ledger": {
                    purpose: size
                    for (axis, purpose), size in optimizer.ledger.last_step.items()
                    if axis == "replicate" and size
                },
                "logged": dict(logged),
            }
        )
    trainer.close()
    return trace


def test_bytes_between_replicas_are_the_ledgers(assets: Path, tmp_path: Path) -> None:
    """torchtitan's own are sums over all ranks: tokens before each step, losses and tokens in each logged
    one, here every second."""
    options = [
        *flags(assets, tmp_path),
        *layout(2, 2),
        "--metrics.log_freq",
        2,
        "--metrics.all_curvadion",
        "--optimizer.tau",
        "inf",
        "--optimizer.max_local_steps",
        1,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FR_BUFFER_SIZE", "20000")
        ranks = train(4, traffic, "debug", options)
    for trace in ranks:
        own = 0
        for step, entry in enumerate(trace, 1):
            assert entry["replicate"] == sum(entry["ledger"].values())
            assert sorted(entry["everybody"]) == ([4, 4, 8, 8] if step in (1, 2, 4) else [8])
            if step in (3, 5):
                assert entry["ledger"].keys() >= {"gate", "factors", "gradients", "parameters"}, (
                    "a synchronized step after a local one"
                )
            elif step in (2, 4):
                assert entry["ledger"] == {"gate": 8}
                assert entry["logged"]["curvadion/since_log/synchronized"] == (0 if step == 2 else 1)
            own += sum(entry["everybody"])
            if step in (1, 2, 4):
                assert entry["logged"]["torchtitan/bytes_total/replicate"] == own
    logged = ranks[0][3]["logged"]
    assert logged["curvadion/since_log/bytes/replicate"] == sum(
        sum(entry["ledger"].values()) for entry in ranks[0][2:4]
    )


def launch(*command: object, **environment: str) -> str:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "configs"), os.environ.get("PYTHONPATH", "")]
    usual = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=os.environ | usual | environment,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.sample
@pytest.mark.parametrize("shards", [1, 2])
def test_from_the_command_line(assets: Path, tmp_path: Path, shards: int) -> None:
    """FSDP2 as a user starts it; TensorBoard holds our keys beside torchtitan's."""
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", shards, "-m", "curvadion.titan")
    run_flags = [
        *flags(assets, tmp_path),
        "--training.steps",
        3,
        "--optimizer.tau",
        0.2,
        "--metrics.enable_tensorboard",
    ]
    output = launch(
        *torchrun,
        "--module",
        "curvadion_configs",
        "--config",
        "debug",
        *run_flags,
        HF_DATASETS_CACHE=str(assets / "cache"),
    )
    assert f"1 replicas of {shards} shards" in output
    assert "Training completed" in output
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (tmp_path / "tb").rglob("events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss_metrics/global_avg_loss", *LOGGED} <= tags
    assert len([tag for tag in tags if tag.startswith("curvadion/")]) == 9, "the others on demand"
    assert len(events.Scalars("curvadion/synchronized")) == 3


def test_dry_run_of_64_gpus(assets: Path, tmp_path: Path) -> None:
    options = [*flags(assets, tmp_path), "--comm.mode", "fake_backend", *layout(8, 8), "--training.steps", 1]
    output = launch(
        *("curvadion.titan", "--module", "curvadion_configs", "--config", "debug_dion", *options),
        NGPU="64",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="64",
        HF_DATASETS_CACHE=str(assets / "cache"),
    )
    assert "8 replicas of 8 shards" in output
    assert "Training completed" in output
