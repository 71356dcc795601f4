"""What Triton's compiler makes of the kernels for four GPUs that need not be here: no spills, wide accesses,
matrix instructions.

The report comes from benchmarks/compiled.py, in a process of its own: this one may have Triton's interpreter
on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MATRIX = {
    "sm_80": ("HMMA",),
    "sm_90": ("HGMMA",),
    "sm_100": ("UTCHMMA", "UTCQMMA", "UTCMMA"),
    "gfx942": ("MFMA",),
}
KERNELS = (
    "momentum_norm",
    "local_step",
    "nonfinite",
    "segment_sum",
    "gate_key",
    "low_rank_apply",
    "column_sumsq",
    "symmetric_product",
    "sign_encode",
    "sign_decode",
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton cannot be imported; pip install -e '.[dev]', on Linux",
)


@pytest.fixture(scope="session")
def report() -> list[dict[str, Any]]:
    """One row per kernel and target."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""))),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "benchmarks/compiled.py", "--json", "--quick"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows(report: list[dict[str, Any]], *kernels: str, target: str) -> list[dict[str, Any]]:
    found = [row for row in report if row["target"] == target and row["kernel"].startswith(kernels)]
    assert found, f"nothing was compiled of {kernels} for {target}"
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_stack_and_no_spills(report: list[dict[str, Any]], kernel: str, target: str) -> None:
    for row in rows(report, kernel, target=target):
        assert (row["stack"], row["spills"]) == (0, 0), row


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["momentum_norm (fp32, fp32)", "local_step (fp32, fp32)"])
def test_elementwise_kernels_move_16_bytes_at_a_time(
    report: list[dict[str, Any]], kernel: str, target: str
) -> None:
    """Of both tensors they read, and of the one they write."""
    (row,) = rows(report, kernel, target=target)
    assert row["instructions"].get("load16", 0) >= 2 and row["instructions"].get("store16", 0) >= 1, row


@pytest.mark.parametrize("target", TARGETS)
def test_signs_come_with_16_bytes_at_a_time(report: list[dict[str, Any]], target: str) -> None:
    """What is read of x and of the residual, and what is written of values."""
    (encode,) = rows(report, "sign_encode (fp32)", target=target)
    (decode,) = rows(report, "sign_decode (fp32)", target=target)
    assert encode["instructions"].get("load16", 0) >= 2 and encode["instructions"].get("store16", 0) >= 1, (
        encode
    )
    assert decode["instructions"].get("store16", 0) >= 1, decode


@pytest.mark.parametrize("kernel", ["momentum_norm (bf16, bf16)", "local_step (bf16, bf16)"])
def test_bfloat16_on_gfx942_moves_8_bytes_at_a_time(report: list[dict[str, Any]], kernel: str) -> None:
    """Four elements a thread is what AMD's compiler makes of the same code; a scalar access would be an
    eighth of the width."""
    (row,) = rows(report, kernel, target="gfx942")
    assert row["instructions"].get("load8", 0) >= 2 and row["instructions"].get("store8", 0) >= 1, row


@pytest.mark.parametrize("kernel", ["momentum_norm", "local_step"])
def test_mixed_dtypes_are_read_in_the_same_pieces(report: list[dict[str, Any]], kernel: str) -> None:
    """Four elements a thread of each; otherwise every block would be exchanged between threads through shared
    memory."""
    (mixed,) = rows(report, f"{kernel} (fp32, bf16)", target="sm_90")
    (plain,) = rows(report, f"{kernel} (fp32, fp32)", target="sm_90")
    assert (
        mixed["instructions"].get("load16")
        and mixed["instructions"].get("load8")
        and mixed["instructions"].get("store16")
    ), mixed
    assert mixed["shared"] <= plain["shared"], mixed


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["low_rank_apply", "symmetric_product"])
def test_products_use_matrix_instructions_and_wide_accesses(
    report: list[dict[str, Any]], kernel: str, target: str
) -> None:
    for row in rows(report, kernel, target=target):
        assert any(row["instructions"].get(name) for name in MATRIX[target]), row
        assert row["instructions"].get("load16") and row["instructions"].get("store16"), row


def test_every_mode_of_the_low_rank_apply_is_compiled_for_sm_90(report: list[dict[str, Any]]) -> None:
    names = [row["kernel"] for row in rows(report, "low_rank_apply", target="sm_90")]
    assert len(names) == len(set(names))
    for mode in (
        "Q = R scale, tf32)",
        "Q = R scale, tf32x3)",
        "Q and R, tf32x3)",
        "Q and R, transposed, tf32x3)",
        "X only, tf32x3)",
    ):
        assert any(mode in name for name in names), mode
