"""The examples, as one starts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
EXAMPLES = {
    "transformers_trainer": (TORCHRUN, ()),
    "lightning_trainer": ((), ("--replicas", "2")),
}


def start(name: str, *options: str) -> float:
    """Run an example; the loss that it prints."""
    before, after = EXAMPLES[name]
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, *before, str(ROOT / "examples" / f"{name}.py"), *after, *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return float(re.findall(r"loss on held-out text after \d+ steps: ([\d.]+)", done.stdout)[0])


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_and_resumes(name: str, tmp_path: Path) -> None:
    """Two replicas; random bytes would be at 5.5."""
    first = start(name, "--output", str(tmp_path), "--steps", "40")
    resumed = start(name, "--output", str(tmp_path), "--steps", "60", "--resume")
    assert resumed < first < 3.7
