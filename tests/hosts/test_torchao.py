"""float8 training by torchao, emulated on the CPU: weights that FSDP2 gathers in float8, each a wrapper.

They run where torchao is: pip install torchao==0.18.0, then pytest tests/hosts/test_torchao.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.models import TinyGPT
from support.ranks import run_ranks
from support.resume import Found, Place, moves, place, resume
from torch import nn
from torch.distributed.fsdp import FSDPModule

float8 = pytest.importorskip("torchao.float8", reason="needs torchao: pip install torchao==0.18.0")


def model(gathered_in_float8: bool = True) -> TinyGPT:
    def chosen(module: nn.Module, name: str) -> bool:
        return name.startswith("layers.")

    config = float8.Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=gathered_in_float8)
    converted: Any = float8.convert_to_float8_training(
        TinyGPT(32, 16), config=config, module_filter_fn=chosen
    )
    return converted


@pytest.mark.parametrize("mode", ["gradient", "dion", "1 bit", "Nesterov"])
def test_weights_gathered_in_float8_train_as_those_that_are_cast_after(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchao scales both by the largest element of the whole weight, here in advance."""

    def rescale(trained: nn.Module) -> None:
        if isinstance(trained, FSDPModule):
            float8.precompute_float8_dynamic_scale_for_fsdp(trained)

    def worker() -> list[bool]:
        same = []
        for where in filter(lambda where: where.here, map(place, [(1, 1), (1, 2), (2, 2)])):
            runs = []
            for gathered in (True, False):
                monkeypatch.setattr(Place, "model", partial(model, gathered))
                runs.append(where.course(mode, rescale)[0])
            same.append(runs[0] == runs[1])
        return same

    for same in run_ranks(4, worker):
        assert same and all(same), same


def test_a_run_in_float8_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "model", staticmethod(model))

    def worker() -> list[Found]:
        return [
            resume("1 bit", "DCP nested", (2, 2), tmp_path / "0"),
            *moves("Nesterov", (1, 4), [(2, 2), (1, 1)], tmp_path / "1", live=False),
        ]

    for found in run_ranks(4, worker):
        assert found and not [one for one in found if one.wrong]
