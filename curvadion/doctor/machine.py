"""What can be told of a rank without asking another: versions, devices, kernels."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from curvadion.doctor.findings import FINE, WARNING, Finding
from curvadion.rooms import untested
from curvadion_kernels import choose


def device_of(rank: int) -> torch.device:
    """Return the device of the rank with this number on its machine."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def versions() -> dict[str, str]:
    """Return the versions that all ranks must have in common."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("curvadion", "triton", "torchtitan"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def look(device: torch.device) -> list[Finding]:
    """Look at this rank's versions, device and kernels."""
    findings = [Finding(FINE, "versions", ", ".join(f"{name} {v}" for name, v in versions().items()))]
    if complaint := untested(torch.__version__):
        findings.append(Finding(WARNING, "torch", complaint))
    if device.type == "cuda":
        about: Any = torch.cuda.get_device_properties(device)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        findings.append(
            Finding(
                FINE,
                "device",
                f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}",
            )
        )
        if not bf16:
            text = "bfloat16 is emulated: construct with newton_schulz_dtype=torch.float32"
            findings.append(Finding(WARNING, "device", text))
    else:
        threads = torch.get_num_threads()
        findings.append(Finding(FINE, "device", f"cpu, {os.cpu_count()} cores, {threads} threads a process"))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if here > 1 and threads * here > 2 * (os.cpu_count() or 1):
            text = f"{here} processes of {threads} threads share {os.cpu_count()} cores; set OMP_NUM_THREADS"
            findings.append(Finding(WARNING, "threads", text))
    ops = choose("auto", device)
    level = WARNING if device.type == "cuda" and ops.kernels != "triton" else FINE
    findings.append(Finding(level, "kernels", f"{ops.kernels}: {ops.why}"))
    return findings
