"""A checkpoint that earlier code wrote loads, and the run goes on to the same parameters.

tests/data/checkpoint_afcffb3.pt holds, for two sets of options, parameters and `state_dict()` after five
steps as commit afcffb3 left them, and its parameters after four more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvadion import CurvaDion

FILE = Path(__file__).parent / "data" / "checkpoint_afcffb3.pt"
ALGORITHMS = {"embedding.weight": "adamw", "norm.weight": "lion"}
# Newton-Schulz has since taken its norm in float64, and other CPUs round products in other ways.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("name", ["average", "outer"])
def test_a_checkpoint_of_earlier_code_goes_on_as_it_did(name: str) -> None:
    saved: dict[str, Any] = torch.load(FILE, weights_only=True)[name]
    named: dict[str, nn.Parameter] = {
        n: nn.Parameter(value.clone()) for n, value in saved["parameters"].items()
    }
    matrices = [(n, p) for n, p in named.items() if n not in ALGORITHMS]
    rest = [
        {"params": [(n, named[n])], "algorithm": algorithm, "lr": 1e-3} for n, algorithm in ALGORITHMS.items()
    ]
    optimizer = CurvaDion([{"params": matrices}, *rest], **saved["options"])
    optimizer.load_state_dict(saved["state_dict"])
    assert optimizer.metrics()["curvadion/step"] == 5
    for step in range(5, 9):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    after: dict[str, Tensor] = saved["after"]
    for n, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), after[n], **TOLERANCE)
