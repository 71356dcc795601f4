"""Whole runs of the optimizer on the Triton kernels and on the reference: the same trajectory, the same
branches, the same state."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvadion import CurvaDion

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install -e '.[dev]'"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(24, 16), (24, 16), (7, 33), (5, 5), (1, 9)]
STEPS = 9

# One rounding of the stored dtype a step, and what orthogonalization makes of it: it divides by the smallest
# singular value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 3e-2}


def model(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype))
        for shape in (*SHAPES, (11,), (6, 3))
    ]


def gradients(params: list[nn.Parameter], step: int) -> None:
    """A little of something new, so that RMMC is small, except in every fourth step; one gradient is missing
    now and then."""
    generator = torch.Generator().manual_seed(1 + step // 4)
    for k, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator).to(p)
        if step == 5 and k in (1, 5):
            p.grad = None


def run(
    kernels: str, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[list[Tensor], list[float], CurvaDion]:
    """Return the parameters after the run, the branch and RMMC of every step, and the optimizer."""
    params = model(dtype)
    groups = [
        {"params": params[:2]},
        {"params": params[2:5], "lr": 0.01, "momentum": 0.8, "tau": 0.3},
        {"params": params[5:], "algorithm": "adamw", "lr": 1e-3},
    ]
    opt = CurvaDion(groups, lr=0.02, tau=0.2, momentum=0.9, warmup_steps=2, kernels=kernels, **options)
    trace = []
    for step in range(STEPS):
        gradients(params, step)
        for group in opt.param_groups:
            group["lr"] *= 0.98  # a schedule
        opt.step()
        trace += [opt.metrics()["curvadion/synchronized"], opt.metrics()["curvadion/rmmc_max"]]
    return [p.detach() for p in params], trace, opt


@pytest.mark.sample
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"local_update": "gradient"},
        {"local_update": "gradient", "error_feedback": False, "on_nonfinite": "skip"},
        {"local_update": "dion", "rank_fraction": 1.0},
        {"local_update": "dion", "right_factor": "qr", "error_feedback": False},
        {"max_local_steps": 0, "rank_fraction": 0.5},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_same_trajectory(options: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        options = {**options, "momentum_dtype": torch.float32}
    (expected, trace, reference), (got, other_trace, triton) = (
        run(kernels, dtype, options) for kernels in ("reference", "triton")
    )
    assert (reference.kernels, triton.kernels) == ("reference", "triton")
    synchronized = trace[::2]
    assert synchronized == other_trace[::2], "both take the same branches"
    assert 0.0 in synchronized or "max_local_steps" in options, "local steps are part of the run"
    assert 1.0 in synchronized[2:], "and synchronized ones after the warm-up too"
    torch.testing.assert_close(other_trace[1::2], trace[1::2], rtol=1e-4, atol=1e-4, equal_nan=True)
    tolerance = TOLERANCE[dtype]
    for x, y in zip(expected, got, strict=True):
        torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance)
    for p, q in zip(reference.state, triton.state, strict=True):
        for key, value in reference.state[p].items():
            scale = float(value.abs().max()) if value.numel() else 0.0
            own = max(
                tolerance, TOLERANCE[torch.float32] if value.dtype == torch.float32 else 0.0
            )  # norms and counters
            torch.testing.assert_close(
                triton.state[q][key],
                value,
                rtol=own,
                atol=own * (1 + scale),
                msg=lambda text, key=key: f"{key}: {text}",
            )


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("look", ["state", "state_dict", "synchronize", "add_param_group"])
def test_nobody_sees_a_postponed_decay(kernels: str, look: str) -> None:
    """M_i <- mu m_i of a local step may be left for the next pass over M; whoever looks sees it done."""
    p = nn.Parameter(torch.zeros(4, 3, device=DEVICE))
    opt = CurvaDion([p], lr=0.0, tau=float("inf"), momentum=0.5, error_feedback=False, kernels=kernels)
    total = torch.zeros(4, 3, device=DEVICE)
    for step in range(4):
        p.grad = torch.full_like(p, float(step + 1))
        opt.step()
        total = 0.5 * (total + p.grad)
        if step == 2:
            continue  # nobody looks: the next step does it
        if look == "state_dict":
            seen = opt.state_dict()["state"][0]["momentum"]
        else:
            if look == "synchronize":
                opt.synchronize()
            if look == "add_param_group":
                opt.add_param_group(
                    {"params": [nn.Parameter(torch.zeros(2, device=DEVICE))], "algorithm": "adamw"}
                )
            seen = opt.state[p]["momentum"]
        torch.testing.assert_close(seen, total, rtol=0, atol=0)


def test_a_schedule_compiles_and_uploads_next_to_nothing() -> None:
    """A new learning rate is a new number in device memory: no kernel is built for it."""
    from curvadion_kernels import triton_ops

    params = model(torch.float32)[:3]
    opt = CurvaDion(params, lr=0.01, tau=float("inf"), kernels="triton")
    grads = [torch.randn_like(p) for p in params]

    def step(lr: float) -> int:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt.param_groups[0]["lr"] = lr
        before = triton_ops._remembered.cache_info().misses
        opt.step()
        return triton_ops._remembered.cache_info().misses - before

    for _ in range(3):
        step(0.01)
    assert step(0.01) == 0, "the same numbers and addresses are not uploaded again"
    assert step(0.02) == 2, "a new lr is a new decay and a new step size"


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: on a CPU there is nothing to wait for"
)
@pytest.mark.parametrize("kind", ["local", "synchronized", "dion"])
def test_the_host_waits_for_nothing_but_the_gate(kind: str) -> None:
    """With torch's own alarm on: waiting for the gate's event is not flagged, any other wait is an error."""
    params = model(torch.float32)
    groups = [
        {"params": params[:3]},
        {"params": params[3:5], "lr": 0.01},
        {"params": params[5:], "algorithm": "adamw", "lr": 1e-3},
    ]
    options = {
        "local": {"tau": float("inf")},
        "synchronized": {"max_local_steps": 0},
        "dion": {"tau": float("inf"), "local_update": "dion"},
    }
    opt = CurvaDion(groups, lr=0.02, kernels="triton", check_every=0, **options[kind])
    for step in range(5):
        gradients(params, 2 * step)
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for group in opt.param_groups:
            group["lr"] *= 0.99
        if step >= 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_default_device_changes_nothing() -> None:
    with torch.device("cuda"):
        p = nn.Parameter(torch.ones(4, 3))
        opt = CurvaDion([p])
        p.grad = torch.ones_like(p)
        opt.step()
        opt.step()
    assert opt.kernels == "triton"
