"""What torchtitan 0.3.0 needs and older torch, or a machine without an accelerator, does not have.

torchtitan 0.3.0 is written for torch 2.14 or newer. `prepare()` supplies the names that it misses before
that, and on a machine without an accelerator lets it run on CPU over gloo. On torch >= 2.14 with a GPU it
does nothing, and this module can go: delete it, its call in `__init__.py` and that of `initialize_whole` in
`parallelize.py`.
"""

import logging
import os
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from curvadion.sharding.layout import Layout, ShardMesh, canonical_name

logger = logging.getLogger(__name__)

TESTED_TORCHTITAN = "0.3.0"
TESTED_TORCH = ((2, 13), (2, 13))  # first and last minor version


def prepare() -> None:
    """Make torchtitan importable and runnable here. Call it before anything imports torchtitan.

    Raises:
        ImportError: torchtitan, or triton, which it imports and does not declare, is missing; or torch is so
            old that a run would die.
        RuntimeError: there is no accelerator, and torchtitan was imported first.
    """
    for package, why in (
        ("torchtitan", "of which curvadion.titan is a plug-in"),
        ("triton", "which torchtitan imports on every machine"),
    ):
        try:
            version(package)
        except PackageNotFoundError as error:
            raise ImportError(
                f"curvadion.titan needs {package}, {why}; it is not installed; try pip install "
                "'curvadion[torchtitan]'"
            ) from error
    oldest = TESTED_TORCH[0]
    if minor_version(torch.__version__) < oldest:
        raise ImportError(
            f"curvadion.titan needs torch {_text(oldest)} or newer; this is {torch.__version__}, in which "
            f"torchtitan {TESTED_TORCHTITAN} dies in backward on a CPU, with its own AdamW too; try pip "
            f"install 'torch>={_text(oldest)}'"
        )
    for complaint in untested(version("torchtitan"), torch.__version__):
        logger.warning(complaint)
    supply_names()
    use_cpu_if_alone()


def untested(torchtitan: str, torch_version: str) -> list[str]:
    """Return a sentence for each version outside the tested range."""
    complaints = []
    if torchtitan != TESTED_TORCHTITAN:
        complaints.append(
            f"curvadion.titan is tested with torchtitan {TESTED_TORCHTITAN}; this is {torchtitan}, which "
            "may not fit"
        )
    first, last = TESTED_TORCH
    if not first <= minor_version(torch_version) <= last:
        tested = " to ".join(dict.fromkeys(map(_text, TESTED_TORCH)))
        complaints.append(
            f"curvadion.titan is tested with torch {tested}; this is {torch_version}, which may not fit"
        )
    return complaints


def minor_version(torch_version: str) -> tuple[int, ...]:
    """Return (2, 13) of "2.13.0+cpu"."""
    return tuple(map(int, torch_version.split(".")[:2]))


def _text(minor: tuple[int, ...]) -> str:
    return ".".join(map(str, minor))


def supply_names() -> None:
    """Give torch the public names that torchtitan 0.3.0 uses and this torch may lack."""
    if not hasattr(dist, "set_timeout"):  # torch 2.14; called once, after the first step
        setattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)  # noqa: B010 - not known to mypy


class CpuModule(ModuleType):
    """`torch.cpu` and the calls that torchtitan makes on every device module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def set_device(self, device: Any) -> None:
        """Do nothing: there is one CPU device."""

    def current_device(self) -> int:
        """Return 0 where torch.cpu returns a string."""
        return 0

    def get_device_name(self, device: Any = None) -> str:
        """Return the device's name."""
        return "cpu"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        """Return the machine's memory as that of the device."""
        return SimpleNamespace(
            name="cpu", total_memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        )

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """Return the process's peak memory under the names of the CUDA allocator."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Do nothing: the peak of a process cannot be reset."""

    def empty_cache(self) -> None:
        """Do nothing: there is no cache."""


def use_cpu_if_alone() -> None:
    """Let torchtitan run on CPU where there is no accelerator; elsewhere do nothing.

    torchtitan chooses its device when `torchtitan.tools.utils` is imported, and every module copies the
    choice when it is imported.
    """
    if torch.accelerator.is_available():
        return
    harmless = ("torchtitan.tools", "torchtitan.observability")  # what torchtitan.tools.utils itself imports
    copied = sorted(
        name for name in sys.modules if name.startswith("torchtitan.") and not name.startswith(harmless)
    )
    import torchtitan.tools.utils as utils

    if utils.device_type == "cpu":
        return
    if copied:
        raise RuntimeError(
            "without an accelerator torchtitan has to be told to use the CPU before it is imported; got "
            f"{', '.join(copied[:3])} imported already; run python -m curvadion.titan in place of python -m "
            "torchtitan.train, or import curvadion.titan first"
        )
    utils.device_type = "cpu"
    utils.device_module = CpuModule("curvadion.titan.cpu")


@torch.no_grad()
def initialize_whole(model: nn.Module) -> None:
    """Give a sharded model on CPU the initial weights that one process would have given it.

    DTensor has no random generator for CPU meshes: every rank would fill its shard with the same numbers, so
    that matrices begin with equal blocks of rows, and the numbers would depend on the mesh. Does nothing on
    an accelerator.
    """
    params = {canonical_name(name): p for name, p in model.named_parameters()}
    shards = ShardMesh(params.values())
    if shards.mesh is None or shards.mesh.device_type != "cpu":
        return
    config: Any = model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())  # torchtitan's seed, the same on all ranks
        whole = config.build()
        whole.init_weights()
    for name, source in whole.named_parameters():
        layout = Layout.of(params[canonical_name(name)], shards)
        part = tuple(
            slice(begin, begin + length)
            for begin, length in zip(layout.offset, layout.local_shape, strict=True)
        )
        local = params[canonical_name(name)]
        getattr(local, "_local_tensor", local).copy_(source[part])
