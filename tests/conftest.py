"""Settings shared by all tests.

The tests fork their ranks (see ranks.py). A fork copies memory but only one thread, so a parent that has
started torch's intra-op thread pool may leave a lock held for ever in the child: the parent keeps to one
thread, always. support/__init__.py keeps autograd from starting others. MKL counts its buffers by thread,
and a fork of a parent where threads have come and gone may look for its own for ever: MKL is not to keep any.

Without a GPU, the Triton kernels run in Triton's interpreter. `pytest --kernels triton` runs every optimizer
of every test on them.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support import interpreter

os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")  # read at the first product
torch.set_num_threads(1)
if not torch.cuda.is_available():
    interpreter.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the suite run once more on the other kernels."""
    choices = ("auto", "triton", "reference")
    parser.addoption(
        "--kernels",
        choices=choices,
        default="auto",
        help="what CurvaDion(kernels=...) is where a test does not say",
    )
    parser.addoption(
        "--each-once",
        action="store_true",
        help="every test with the first of its parameter sets only, long ones cut short",
    )
    parser.addoption(
        "--whole",
        action="store_true",
        help="every case of tests that take a sample of them otherwise; scripts/nightly.sh does",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make `--kernels` the constructor's default."""
    config.addinivalue_line("markers", "sample: of all sets of parameters a sample, see `in_sample`")
    from curvadion import CurvaDion

    defaults = CurvaDion.__init__.__kwdefaults__
    assert defaults is not None
    defaults["kernels"] = config.getoption("--kernels")
    if defaults["kernels"] == "triton":
        from support import (
            ranks,
        )  # not before the interpreter is on: it imports much of torch, and that triton

        ranks.DEADLINE *= 5


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Obey `--each-once`, and take a sample of what is marked so."""
    if config.getoption("--each-once"):
        first = {(item.path, getattr(item, "originalname", item.name)): item for item in reversed(items)}
        kept = set(map(id, first.values()))
    elif not config.getoption("--whole"):
        numbers: Counter[tuple[Path, str]] = Counter()
        kept = {id(item) for item in items if item.get_closest_marker("sample") is None}
        for item in [item for item in items if id(item) not in kept]:
            test = item.path, getattr(item, "originalname", item.name)
            sizes = [len(mark.args[1]) for mark in item.iter_markers("parametrize")]
            if in_sample(sizes, numbers[test]):
                kept.add(id(item))
            numbers[test] += 1
    else:
        return
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def in_sample(sizes: Sequence[int], number: int) -> bool:
    """Whether the places in their lists, of the parameters that this number of the product has, add up to a
    multiple of the shortest list's length.

    Of the product of two lists that leaves each value at least once, of three every pair of values.
    """
    total = 0
    for size in reversed(sizes):
        number, place = divmod(number, size)
        total += place
    return total % min(sizes) == 0


@pytest.fixture
def complete(request: pytest.FixtureRequest) -> bool:
    """Whether a test should take all of its cases, not a sample."""
    return bool(request.config.getoption("--whole"))


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether a long test should be cut short."""
    return bool(request.config.getoption("--each-once"))
