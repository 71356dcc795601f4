"""The equations, on one process: formulas written out by hand, theorems that must hold, and exact small
cases.

Whatever involves layouts and replicas is in test_mesh_parity.py, against the reference in
support/reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support.reference import ReferenceReplicas
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvadion import CurvaDion
from curvadion.algebra.power_iteration import noise_floor, orthogonalize, power_iteration
from curvadion.algebra.sizes import PIECE_ELEMENTS

# One or a few fp64 products and a QR of condition below 1e3: rounding of 1e-16, amplified.
FP64 = {"rtol": 1e-11, "atol": 1e-12}
ALWAYS_OPEN = {"max_local_steps": 0}
ALWAYS_CLOSED = {"tau": math.inf}  # after the first step, which has no previous norm


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build(values: Mapping[str, Tensor], **options: object) -> tuple[CurvaDion, dict[str, nn.Parameter]]:
    """CurvaDion on named parameters of these values; `algorithms` gives names that are not "dion"."""
    algorithms = options.pop("algorithms", {})
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    groups = [{"params": [(n, p)], "algorithm": algorithms.get(n, "dion")} for n, p in parameters.items()]
    return CurvaDion(groups, **options), parameters


def step(optimizer: CurvaDion, parameters: Mapping[str, nn.Parameter], **gradients: Tensor | None) -> bool:
    """Set gradients (None for the rest), step, and say whether the step was synchronized."""
    for name, parameter in parameters.items():
        G = gradients.get(name)
        parameter.grad = None if G is None else G.clone()
    optimizer.step()
    return bool(optimizer.metrics()["curvadion/synchronized"])


def gram_schmidt(A: Tensor) -> Tensor:
    """The textbook, column by column."""
    columns: list[Tensor] = []
    for a in A.T:
        for p in columns:
            a = a - (p @ a) * p
        columns.append(a / a.norm())
    return torch.stack(columns, dim=1)


def dion_by_hand(
    m: Tensor, Q: Tensor, mu: float, error_feedback: bool, right_factor: str
) -> tuple[Tensor, Tensor]:
    """P Q^T and M for one replica, in the orientation of m."""
    if m.shape[0] < m.shape[1]:
        update, M = dion_by_hand(m.T, Q, mu, error_feedback, right_factor)
        return update.T, M.T
    P = gram_schmidt(m @ Q)
    R = m.T @ P
    M = m - (1 - mu) * P @ R.T if error_feedback else mu * m
    return P @ (R / R.norm(dim=0) if right_factor == "column_norm" else gram_schmidt(R)).T, M


# ---- the update rule


@pytest.mark.parametrize("orthogonalization", ["cholesky_qr", "qr"])
@pytest.mark.parametrize("right_factor", ["column_norm", "qr"])
@pytest.mark.parametrize("error_feedback", [True, False], ids=["feedback", "plain"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("branch", ["synchronized", "local_dion", "local_gradient"])
def test_second_step_is_the_written_formula(
    branch: str, shape: tuple[int, int], error_feedback: bool, right_factor: str, orthogonalization: str
) -> None:
    lr, mu, wd, local = 0.1, 0.8, 0.3, 0.5
    optimizer, parameters = build(
        {"W": draw(*shape)},
        lr=lr,
        momentum=mu,
        weight_decay=wd,
        local_lr_scale=local,
        rank_fraction=0.5,
        error_feedback=error_feedback,
        right_factor=right_factor,
        orthogonalization=orthogonalization,
        local_update="dion" if branch == "local_dion" else "gradient",
        **(ALWAYS_OPEN if branch == "synchronized" else ALWAYS_CLOSED),
    )
    W = parameters["W"]
    step(optimizer, parameters, W=draw(*shape, seed=1))

    X, M, Q, G = (
        W.detach().clone(),
        *(optimizer.state[W][k].clone() for k in ("momentum", "Q")),
        draw(*shape, seed=2),
    )
    synchronized = step(optimizer, parameters, W=G)

    assert synchronized == (branch == "synchronized"), "the other branch was taken"
    update, M_new = dion_by_hand(M + G, Q, mu, error_feedback, right_factor)
    decayed, scale = (1 - lr * wd) * X, math.sqrt(shape[0] / shape[1])
    if branch == "synchronized":
        X_new = decayed - lr * scale * update
    elif branch == "local_dion":
        X_new = decayed - local * lr * scale * update
    else:
        M_new, X_new = mu * (M + G), decayed - local * lr * G
    torch.testing.assert_close(optimizer.state[W]["momentum"], M_new, **FP64, msg=lambda m: f"momentum: {m}")
    torch.testing.assert_close(W.detach(), X_new, **FP64, msg=lambda m: f"parameter: {m}")


@pytest.mark.parametrize("error_feedback", [True, False])
def test_a_local_dion_step_of_one_replica_is_the_synchronized_step(error_feedback: bool) -> None:
    runs = []
    for branch in (ALWAYS_OPEN, ALWAYS_CLOSED | {"local_update": "dion"}):
        optimizer, parameters = build(
            {"W": draw(7, 4), "V": draw(4, 8)}, error_feedback=error_feedback, **branch
        )
        for t in range(5):
            step(optimizer, parameters, W=draw(7, 4, seed=t), V=draw(4, 8, seed=t))
        runs.append(parameters)
    for name in ("W", "V"):
        assert torch.equal(runs[0][name], runs[1][name]), f"{name} depends on the branch although K = 1"


def test_dion2_of_all_slices_is_muon_and_normuon_is_as_large() -> None:
    gradients = [
        {"W": draw(7, 4, seed=t), "V": draw(4, 8, seed=t), "S": draw(5, 5, seed=t)} for t in range(3)
    ]
    moved: dict[str, dict[str, Tensor]] = {}
    for rule in ("muon", "dion2", "normuon"):
        values = {name: draw(*G.shape) for name, G in gradients[0].items()}
        options = {
            "weight_decay": 0.0,
            "rank_fraction": 1.0,
            "local_update": rule,
            "error_feedback": False,
            **ALWAYS_CLOSED,
        }
        optimizer, parameters = build(values, **options)
        for G in gradients:
            before = {name: p.detach().clone() for name, p in parameters.items()}
            step(optimizer, parameters, **G)
        moved[rule] = {name: before[name] - p.detach() for name, p in parameters.items()}
    for name in values:
        torch.testing.assert_close(
            moved["dion2"][name], moved["muon"][name], **FP64, msg=lambda m, n=name: f"{n}: {m}"
        )
        torch.testing.assert_close(moved["normuon"][name].norm(), moved["muon"][name].norm(), **FP64)
        rows = moved["normuon"][name].norm(dim=1) / moved["muon"][name].norm(dim=1)
        assert float(rows.max() / rows.min()) > 1.05, f"{name}: rows are not treated differently"


@pytest.mark.parametrize("tall", [False, True])
def test_dion2_takes_the_first_of_equal_slices_and_leaves_the_momentum_of_the_others(tall: bool) -> None:
    """Integers, so that norms are exact: of 3, 7, 5, 7, 5, 5 it takes three, the second, the third and the
    fourth."""
    m = torch.diag(torch.tensor([3.0, 7, 5, 7, 5, 5], dtype=torch.float64)) @ torch.eye(
        6, 8, dtype=torch.float64
    )
    m = m.T if tall else m
    options = {
        "rank_fraction": 0.5,
        "momentum": 0.5,
        "weight_decay": 0.0,
        "local_update": "dion2",
        "error_feedback": False,
    }
    optimizer, parameters = build({"W": draw(*m.shape)}, **options, **ALWAYS_CLOSED)
    W = parameters["W"]
    assert step(optimizer, parameters, W=m), "M is m / 2 now"
    before = W.detach().clone()
    assert not step(optimizer, parameters, W=m / 2), "and here m"
    moved, M = W.detach() - before, optimizer.state[W]["momentum"]
    if tall:
        moved, M, m = moved.T, M.T, m.T
    assert moved.any(dim=1).tolist() == [False, True, True, True, False, False]
    assert torch.equal(M[1:4], m[1:4] / 2), "what was used decays"
    assert torch.equal(M[[0, 4, 5]], m[[0, 4, 5]]), "and nothing else"
    assert not step(optimizer, parameters), "sizes are 3, 3.5, 2.5, 3.5, 5, 5"
    assert torch.equal(M[[0, 2]], torch.stack([m[0], m[2] / 2])), "also in the next step"


def test_without_feedback_and_with_gradient_steps_the_momentum_is_the_plain_sum() -> None:
    optimizer, parameters = build({"W": draw(6, 5)}, error_feedback=False, momentum=0.7, tau=0.3)
    expected, branches = torch.zeros(6, 5, dtype=torch.float64), []
    for t in range(8):
        G = draw(6, 5, seed=t) * (1 + 5 * (t == 4))
        branches.append(step(optimizer, parameters, W=G))
        expected = 0.7 * (expected + G)
    assert True in branches[1:] and False in branches, f"both branches should occur: {branches}"
    torch.testing.assert_close(optimizer.state[parameters["W"]]["momentum"], expected, **FP64)


@pytest.mark.parametrize("shape", [(12, 3), (3, 12), (5, 5)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("rank_fraction", [0.5, 1.0])
def test_update_has_norm_lr_sqrt_out_over_in_sqrt_rank(shape: tuple[int, int], rank_fraction: float) -> None:
    """P is orthonormal and Q has unit columns, so ||P Q^T||_F = sqrt(r) exactly."""
    optimizer, parameters = build(
        {"W": draw(*shape)}, lr=0.1, weight_decay=0.0, rank_fraction=rank_fraction, **ALWAYS_OPEN
    )
    before = parameters["W"].detach().clone()
    step(optimizer, parameters, W=draw(*shape, seed=1))
    r = math.ceil(rank_fraction * min(shape))
    norm = float((parameters["W"] - before).detach().norm())
    assert norm == pytest.approx(0.1 * math.sqrt(shape[0] / shape[1]) * math.sqrt(r), rel=1e-9)


@pytest.mark.parametrize("orthogonalization", ["cholesky_qr", "qr"])
def test_right_factor_qr_at_full_rank_gives_an_orthogonal_update(orthogonalization: str) -> None:
    optimizer, parameters = build(
        {"W": torch.zeros(6, 4, dtype=torch.float64)},
        lr=1.0,
        rank_fraction=1.0,
        right_factor="qr",
        orthogonalization=orthogonalization,
        **ALWAYS_OPEN,
    )
    G = draw(6, 4, seed=1)
    step(optimizer, parameters, W=G)
    update = -parameters["W"].detach() / math.sqrt(6 / 4)
    torch.testing.assert_close(update.T @ update, torch.eye(4, dtype=torch.float64), **FP64)
    for _ in range(100):  # power iteration on an unchanged direction converges to the polar factor U V^T
        step(optimizer, parameters, W=G)
    before = parameters["W"].detach().clone()
    step(optimizer, parameters, W=G)
    update = (before * (1 - 0.01) - parameters["W"].detach()) / math.sqrt(6 / 4)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(
        update, U @ Vh, rtol=0, atol=1e-6, msg=lambda m: f"not descending along U V^T: {m}"
    )


@pytest.mark.parametrize(
    "branch", [ALWAYS_OPEN, ALWAYS_CLOSED, ALWAYS_CLOSED | {"local_update": "dion"}], ids=str
)
@pytest.mark.parametrize("algorithm", ["dion", "adamw", "lion"])
def test_weight_decay_is_decoupled_and_uses_lr_on_both_branches(branch: dict, algorithm: str) -> None:
    """Without a gradient, zero or missing, only the decay is left, and local_lr_scale has no part in it."""
    W = torch.full((4, 2), 16.0)
    optimizer, parameters = build(
        {"W": W}, lr=0.5, weight_decay=0.5, local_lr_scale=0.1, algorithms={"W": algorithm}, **branch
    )
    for t in range(1, 4):
        step(optimizer, parameters, W=torch.zeros_like(W) if t == 1 else None)
        assert torch.equal(parameters["W"].detach(), W * 0.75**t), f"step {t}: not (1 - lr wd)^t X"


@pytest.mark.parametrize(
    ("shape", "rank_fraction", "rank_multiple_of", "r"),
    [
        ((8, 32), 0.25, 1, 2),
        ((10, 7), 0.25, 1, 2),  # 1.75 rounds up
        ((10, 7), 0.25, 4, 4),
        ((10, 7), 0.6, 4, 7),  # 8, clipped
        ((5, 5), 1.0, 1, 5),
        ((3, 9), 0.01, 1, 1),  # never zero
        ((100, 100), 0.07, 1, 7),  # 7.000000000000001 in binary
        ((6, 6), 0.5, 8, 6),
    ],
)
def test_rank_is_rounded_up_and_clipped(
    shape: tuple[int, int], rank_fraction: float, rank_multiple_of: int, r: int
) -> None:
    optimizer, parameters = build(
        {"W": draw(*shape)}, rank_fraction=rank_fraction, rank_multiple_of=rank_multiple_of
    )
    assert tuple(optimizer.state[parameters["W"]]["Q"].shape) == (min(shape), r)


# ---- the gate


def norm_five(scale: float) -> Tensor:
    """A matrix of Frobenius norm 5 * scale, exactly."""
    return scale * torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])


def run_two_norms(first: float, second: float, tau: float) -> tuple[CurvaDion, bool]:
    """||m_1|| = 5 * first and ||m_2|| = 5 * second; returns whether the second step was synchronized."""
    optimizer, parameters = build({"W": torch.ones(3, 2)}, momentum=0.5, error_feedback=False, tau=tau)
    assert step(optimizer, parameters, W=norm_five(first)), "the first step has no previous norm"
    return optimizer, step(optimizer, parameters, W=norm_five(second - 0.5 * first))


# ---- AdamW and Lion


def column_major(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else x


def with_gaps(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 7.0)], dim=-1)[..., 0]


ORDERS: list[Callable[[Tensor], Tensor]] = [Tensor.contiguous, column_major, with_gaps]


@pytest.mark.parametrize("order_of_G", ORDERS)
@pytest.mark.parametrize("order_of_X", ORDERS)
@pytest.mark.parametrize("branch", [ALWAYS_OPEN, ALWAYS_CLOSED], ids=["synchronized", "local"])
def test_adamw_is_torch_adamw(
    branch: dict, order_of_X: Callable[[Tensor], Tensor], order_of_G: Callable[[Tensor], Tensor]
) -> None:
    """In whatever order X and G lie in memory, as where a model is in channels_last; moments are as X is
    read."""
    values = {"embedding": draw(7, 3), "bias": draw(5)}
    options = {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    optimizer, parameters = build(values, algorithms=dict.fromkeys(values, "adamw"), **options, **branch)
    theirs = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    torch_adamw = torch.optim.AdamW(theirs.values(), **options)
    for parameter in parameters.values():
        parameter.data = order_of_X(parameter.data)
    for t in range(5):
        gradients = {"embedding": draw(7, 3, seed=t), "bias": draw(5, seed=t) if t != 2 else None}
        for name, parameter in parameters.items():
            G = gradients[name]
            parameter.grad = None if G is None else order_of_G(G)
        optimizer.step()
        for name, parameter in theirs.items():  # where torch skips a missing gradient, here it counts as zero
            parameter.grad = torch.zeros_like(parameter) if gradients[name] is None else gradients[name]
        torch_adamw.step()
        for name in values:
            torch.testing.assert_close(
                parameters[name], theirs[name], **FP64, msg=lambda m, n=name: f"{n}: {m}"
            )
            for key in ("step", "exp_avg", "exp_avg_sq"):
                mine, other = optimizer.state[parameters[name]][key], torch_adamw.state[theirs[name]][key]
                torch.testing.assert_close(mine, other, **FP64, msg=lambda m, k=key: f"{k}: {m}")


def test_lion_by_hand() -> None:
    """Binary fractions, so the comparison is exact."""
    optimizer, parameters = build(
        {"w": torch.tensor([4.0, -4.0, 8.0, 2.0])},
        lr=0.5,
        betas=(0.5, 0.75),
        weight_decay=0.25,
        algorithms={"w": "lion"},
    )
    step(optimizer, parameters, w=torch.tensor([2.0, -1.0, 0.0, 4.0]))
    assert parameters["w"].tolist() == [3.5 - 0.5, -3.5 + 0.5, 7.0, 1.75 - 0.5]
    assert optimizer.state[parameters["w"]]["exp_avg"].tolist() == [0.5, -0.25, 0.0, 1.0]
    step(optimizer, parameters, w=torch.tensor([-1.0, 0.25, 1.0, 0.0]))
    # signs of m / 2 + g / 2: -, 0, +, +
    assert parameters["w"].tolist() == [2.625 + 0.5, -2.625, 6.125 - 0.5, 1.09375 - 0.5]
    assert optimizer.state[parameters["w"]]["exp_avg"].tolist() == [0.125, -0.125, 0.25, 0.75]


@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
def test_betas_of_a_group_are_respected(algorithm: str) -> None:
    own, default = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = CurvaDion(
        [
            {"params": [own], "algorithm": algorithm, "betas": (0.5, 0.25)},
            {"params": [default], "algorithm": algorithm},
        ],
        betas=(0.75, 0.875),
    )
    own.grad, default.grad = torch.full((2,), 8.0), torch.full((2,), 8.0)
    optimizer.step()
    weight = {"adamw": (0.5, 0.25), "lion": (0.75, 0.125)}[algorithm]  # AdamW: 1 - beta1, Lion: 1 - beta2
    for parameter, share in zip((own, default), weight, strict=True):
        assert optimizer.state[parameter]["exp_avg"].tolist() == [8.0 * share] * 2


# ---- orthogonalization

METHODS = ["cholesky_qr", "qr"]


def with_condition(rows: int, cols: int, condition: float, seed: int = 0) -> Tensor:
    U, V = torch.linalg.qr(draw(rows, cols, seed=seed)).Q, torch.linalg.qr(draw(cols, cols, seed=seed + 1)).Q
    return U * torch.logspace(0, -math.log10(condition), cols, dtype=torch.float64) @ V.T


@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e6, 1e7], ids="{:.0e}".format)
@pytest.mark.parametrize("shape", [(64, 16), (200, 48), (32, 32)], ids=str)
def test_cholesky_qr_is_orthonormal_up_to_condition_1e7(shape: tuple[int, int], condition: float) -> None:
    A = torch.stack([with_condition(*shape, condition, seed=s) for s in range(3)])
    [P] = orthogonalize([A.float()])
    assert P.dtype == torch.float32
    error = float((P.mT.double() @ P.double() - torch.eye(shape[1], dtype=torch.float64)).abs().max())
    assert error <= 1e-6, f"|P^T P - I| is {error:.1e}"
    residual = A - P.double() @ (P.mT.double() @ A)
    assert float(residual.abs().max()) <= 1e-6, "the columns of A are not in the span of P"


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e5], ids="{:.0e}".format)
@pytest.mark.parametrize("shape", [(64, 16), (200, 48), (96, 96)], ids=str)
def test_above_the_noise_floor_a_second_pass_in_float32_is_enough(
    shape: tuple[int, int], condition: float
) -> None:
    A = torch.stack([with_condition(*shape, condition, seed=s) for s in range(3)]).float()
    [P] = orthogonalize([A], floor=noise_floor(A))
    P, A = P.double(), A.double()
    torch.testing.assert_close(
        P.mT @ P, torch.eye(shape[1], dtype=P.dtype).expand(3, -1, -1), rtol=0, atol=2e-6
    )
    # Each column is a combination of as many of P's: to the rounding of its own length.
    residual = (A - P @ (P.mT @ A).triu()).norm(dim=1) / A.norm(dim=1)
    assert float(residual.max()) <= 2e-6, f"{float(residual.max()):.1e} of a column is not in the span"


class Widest(TorchDispatchMode):
    """Remembers how many float64 elements the largest tensor had that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("floor", [0.0, 1e-5])
def test_float64_copies_are_made_of_a_few_rows_at_a_time(
    floor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    P = [draw(7, 12, 4).float(), draw(2, 60, 4, seed=1).float(), draw(2, 0, 4).float()]
    expected = orthogonalize(P, floor=floor)
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", 100)  # two of the first, 25 rows of the second
    with Widest() as widest:
        actual = orthogonalize(P, floor=floor)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    # Gram matrices of a batch are together, and without a floor what the first pass returns.
    assert widest.elements <= (7 * 4 * 4 if floor else 2 * 60 * 4)


@pytest.mark.parametrize("right_factor", ["column_norm", "qr"])
def test_a_step_taken_in_pieces_is_the_same_step(right_factor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        f"w{i}": draw(*shape, seed=i) for i, shape in enumerate([(12, 5)] * 5 + [(4, 9)] * 3 + [(8, 8)])
    }
    moved = []
    for elements in (1 << 17, 100):
        monkeypatch.setitem(PIECE_ELEMENTS, "cpu", elements)
        parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        options = {
            "rank_fraction": 0.6,
            "right_factor": right_factor,
            "local_update": "dion",
            **ALWAYS_CLOSED,
        }
        optimizer = CurvaDion([{"params": list(parameters.items())}], **options)
        for t in range(3):
            step(optimizer, parameters, **{name: draw(*v.shape, seed=9 + t) for name, v in values.items()})
        state = [optimizer.state[p][key] for p in parameters.values() for key in ("momentum", "Q")]
        moved.append([*parameters.values(), *state])
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-12, atol=1e-12)


DEGENERATE = {
    "zero": torch.zeros(12, 4),
    "rank_one": draw(12, 1) @ draw(1, 4),
    "rank_two": draw(12, 2) @ draw(2, 4),
    "zero_first_column": draw(12, 4) * torch.tensor([0.0, 1.0, 1.0, 1.0]),
    "equal_columns": draw(12, 1).expand(12, 4),
    "repeated_in_the_middle": draw(12, 4)[:, [0, 0, 1, 2]],
    "dead_rows": torch.cat([torch.zeros(6, 4, dtype=torch.float64), draw(6, 4)]),
    "fewer_live_rows_than_columns": torch.cat([draw(2, 4), torch.zeros(10, 4, dtype=torch.float64)]),
    "one_entry": torch.eye(12, 4)[:, [2, 3, 0, 1]] * torch.tensor([1.0, 0.0, 0.0, 0.0]),
    "scales": draw(12, 4) * torch.tensor([1.0, 1e-3, 1.0, 1e-3]),
    "tiny": draw(12, 4) * 1e-12,
    "huge": draw(12, 4) * 1e12,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_columns_are_zero_and_the_rest_a_basis(name: str, dtype: torch.dtype, method: str) -> None:
    A = DEGENERATE[name].double()
    rank = int(torch.linalg.matrix_rank(A / A.norm(dim=0).max().clamp_min(1e-300), atol=1e-6))
    [P] = orthogonalize([torch.stack([A, draw(12, 4)]).to(dtype)], method=method)
    assert P.isfinite().all()
    P = P[0].double()
    gram = P.T @ P
    live = gram.diagonal() > 0.5
    count = int(live.sum())
    # In float32 the rounding of A itself is a direction within the accuracy asked for (condition 1e7): more
    # may live.
    assert count == rank or (count > rank and dtype == torch.float32), f"{count} live columns for rank {rank}"
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(gram, torch.diag(live.double()), rtol=0, atol=tolerance)
    assert not P[:, ~live].any(), "a dead column must be exactly zero"
    residual = (A - P @ (P.T @ A)).norm() / A.norm().clamp_min(1e-300)
    assert residual <= 10 * tolerance, f"A is not in the span of P: {residual:.1e}"


@pytest.mark.parametrize("name", DEGENERATE)
def test_all_methods_span_the_same_space(name: str) -> None:
    projectors = [
        P @ P.mT for m in METHODS for P in orthogonalize([DEGENERATE[name][None].double()], method=m)
    ]
    for other in projectors[1:]:
        torch.testing.assert_close(projectors[0], other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("condition", [1e3, 1e7, 1e9, 1e12, 1e16], ids="{:.0e}".format)
@pytest.mark.parametrize("right_factor", ["column_norm", "qr"])
def test_q_stays_usable_whatever_the_spectrum(right_factor: str, condition: float, method: str) -> None:
    """Every column of Q stays finite and of unit length: a zero column would never move again."""
    for seed in range(5):
        optimizer, parameters = build(
            {"W": draw(24, 12).float()},
            rank_fraction=1.0,
            right_factor=right_factor,
            orthogonalization=method,
            **ALWAYS_OPEN,
        )
        for t in range(3):
            step(optimizer, parameters, W=with_condition(24, 12, condition, seed=10 * seed + t).float())
            Q = optimizer.state[parameters["W"]]["Q"]
            torch.testing.assert_close(
                Q.norm(dim=0), torch.ones(12), rtol=0, atol=1e-4, msg=lambda m: f"Q: {m}"
            )
            assert parameters["W"].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_right_factor_qr_agrees_with_the_left_on_which_columns_are_dead(
    dtype: torch.dtype, method: str
) -> None:
    """Wherever the threshold lies: a column that is live in P and dead in R must not leave a zero column in
    Q."""
    pivots = torch.logspace(-17, -3, 1401, dtype=torch.float64)
    M = torch.zeros(len(pivots), 4, 2, dtype=torch.float64)
    M[:, 0, 0] = M[:, 0, 1] = 1
    M[:, 1, 1] = pivots
    Q = torch.eye(2, dtype=dtype).expand(len(pivots), 2, 2)
    [factors] = power_iteration([M.to(dtype)], [Q], orthogonalization=method, right_factor="qr")
    P, new = factors.P, factors.Q
    zero = pivots[new.norm(dim=-2).amin(-1) < 0.5]
    assert not len(zero), (
        f"{len(zero)} of 1401 have a zero column in Q, such as the pivot {float(zero[0]):.3e}"
    )
    assert P.isfinite().all() and new.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("right_factor", ["column_norm", "qr"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (33, 33)], ids=str)
def test_update_of_a_rank_deficient_fp32_momentum_has_its_rank(
    shape: tuple[int, int], right_factor: str, method: str
) -> None:
    """Rounding noise must not become part of the update: with unit columns of Q it would weigh as much as the
    signal."""
    options = {"rank_fraction": 0.5, "right_factor": right_factor, "orthogonalization": method, **ALWAYS_OPEN}
    optimizer, parameters = build({"W": torch.zeros(shape)}, lr=1.0, weight_decay=0.0, **options)
    U, V = draw(shape[0], 3), draw(3, shape[1], seed=1)
    r = math.ceil(0.5 * min(shape))
    for t in range(4):
        before, Q = parameters["W"].detach().clone(), optimizer.state[parameters["W"]]["Q"].clone()
        step(optimizer, parameters, W=(U @ draw(3, 3, seed=2 + t) @ V).float())
        update = (parameters["W"].detach() - before) / math.sqrt(shape[0] / shape[1])
        values = torch.linalg.svdvals(update)
        assert int((values > 1e-3).sum()) == 3, (
            f"step {t}: the update's singular values are {values[:6].tolist()}"
        )
        kept = (optimizer.state[parameters["W"]]["Q"] == Q).all(dim=0)
        assert int(kept.sum()) == r - 3, f"step {t}: {int(kept.sum())} of {r - 3} dead columns of Q were kept"


# ---- what the state does in bad weather


def test_a_zero_gradient_leaves_q_alive() -> None:
    optimizer, parameters = build({"W": draw(6, 4)}, rank_fraction=1.0, **ALWAYS_OPEN)
    Q = optimizer.state[parameters["W"]]["Q"].clone()
    for _ in range(3):
        step(optimizer, parameters, W=torch.zeros(6, 4, dtype=torch.float64))
    assert torch.equal(optimizer.state[parameters["W"]]["Q"], Q), (
        "zero columns of R must keep the old columns of Q"
    )
    before = parameters["W"].detach().clone()
    step(optimizer, parameters, W=draw(6, 4, seed=1))
    assert torch.linalg.matrix_rank(parameters["W"].detach() - 0.9998 * before) == 4, "the update lost rank"


def test_a_zero_gradient_updates_nothing_but_the_decay() -> None:
    optimizer, parameters = build({"W": draw(6, 4)}, weight_decay=0.0, **ALWAYS_OPEN)
    step(optimizer, parameters, W=torch.zeros(6, 4, dtype=torch.float64))
    assert torch.equal(parameters["W"].detach(), draw(6, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_step_that_is_skipped_changes_nothing(bad: float) -> None:
    runs = []
    for with_bad_step in (False, True):
        optimizer, parameters = build({"W": draw(6, 4)}, on_nonfinite="skip")
        for t in range(6):
            if with_bad_step and t == 3:
                G = draw(6, 4)
                G[2, 1] = bad
                step(optimizer, parameters, W=G)
            step(optimizer, parameters, W=draw(6, 4, seed=t))
        runs.append((optimizer, parameters["W"]))
    (clean, W_clean), (skipped, W_skipped) = runs
    assert torch.equal(W_clean, W_skipped), "the run went on differently after the skipped step"
    for key, value in clean.state[W_clean].items():
        assert torch.equal(value, skipped.state[W_skipped][key]), f"{key} remembers the skipped step"
    assert skipped.metrics()["curvadion/skipped_steps"] == 1


def test_a_missing_gradient_is_a_zero_gradient() -> None:
    algorithms = {"b": "adamw", "l": "lion"}
    runs = []
    for missing in (None, 0.0):
        optimizer, parameters = build(
            {"W": draw(6, 4), "b": draw(3), "l": draw(3)}, algorithms=algorithms, tau=0.3
        )
        for t in range(5):
            gradients = {name: draw(*p.shape, seed=t) for name, p in parameters.items()}
            if t in (1, 3):
                gradients = {
                    n: None if missing is None else torch.zeros_like(g) for n, g in gradients.items()
                }
            step(optimizer, parameters, **gradients)
        runs.append((optimizer, parameters))
    for name, parameter in runs[0][1].items():
        assert torch.equal(parameter, runs[1][1][name]), f"{name}: None differs from zeros"
        for key, value in runs[0][0].state[parameter].items():
            assert torch.equal(value, runs[1][0].state[runs[1][1][name]][key]), (
                f"{key} of {name}: None is not zeros"
            )


SHAPES = [(8, 3), (3, 8), (5, 5), (16, 2), (7, 6), (2, 9), (8, 3)]


def test_many_distinct_shapes_at_once_are_each_as_alone() -> None:
    names = [f"W{i}" for i in range(len(SHAPES))]
    values = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(zip(names, SHAPES, strict=True))}

    def run(some: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        optimizer, parameters = build(some, **ALWAYS_OPEN)
        for t in range(3):
            step(
                optimizer, parameters, **{n: draw(*v.shape, seed=10 * t + int(n[1])) for n, v in some.items()}
            )
        return parameters

    together = run(values)
    for name, value in values.items():
        torch.testing.assert_close(
            together[name], run({name: value})[name], **FP64, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- dtypes


# X is rounded to bf16 (8 significant bits: half an ulp is up to 2^-8 of the value) once in each of 6 steps.
BF16_X = 6 * 2**-8
# Momentum and its norms are fp32 and do not see X; a few products of condition below 1e3.
FP32_M = 1e-4


@pytest.mark.parametrize("local_update", ["gradient", "dion"])
def test_bf16_parameters_with_fp32_momentum(local_update: str) -> None:
    values = {"tall": draw(12, 5), "wide": draw(4, 10), "embedding": draw(9, 4), "bias": draw(6)}
    values = {name: value.bfloat16() for name, value in values.items()}
    algorithms = {"embedding": "adamw", "bias": "lion"}
    options = {"lr": 0.05, "momentum": 0.9, "tau": 0.4, "local_update": local_update}
    optimizer, parameters = build(
        values, algorithms=algorithms, momentum_dtype=torch.float32, rank_fraction=0.5, **options
    )
    reference = ReferenceReplicas(
        {name: value.double() for name, value in values.items()},
        replicas=1,
        Q0={n: optimizer.state[p]["Q"].double() for n, p in parameters.items() if "Q" in optimizer.state[p]},
        groups={name: {"algorithm": algorithm} for name, algorithm in algorithms.items()},
        **options,
    )
    branches = []
    for t, scale in enumerate([1, 0.2, 0.2, 2, 0.2, 0.2]):
        gradients = {name: (scale * draw(*p.shape, seed=t)).bfloat16() for name, p in parameters.items()}
        branches.append(step(optimizer, parameters, **gradients))
        outcome = reference.step([{name: G.double() for name, G in gradients.items()}])
        assert branches[-1] == outcome.synchronized, f"step {t} took another branch than the reference"
    assert True in branches[1:] and False in branches, f"both branches should occur: {branches}"
    expected = reference.replicas[0]
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.bfloat16
        error = float((parameter.detach().double() - expected.X[name]).abs().max())
        bound = BF16_X * float(expected.X[name].abs().max())
        assert error <= bound, f"{name} is off by {error:.1e}, more than rounding explains ({bound:.1e})"
    for name in ("tall", "wide"):
        M = optimizer.state[parameters[name]]["momentum"]
        assert M.dtype == torch.float32
        torch.testing.assert_close(M.double(), expected.M[name], rtol=FP32_M, atol=FP32_M)


MOMENTS = [(torch.float32, torch.float64), (torch.bfloat16, torch.float64), (torch.float64, torch.float32)]


@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
@pytest.mark.parametrize(("dtype", "momentum_dtype"), MOMENTS)
def test_moments_of_another_dtype_than_the_parameters(
    algorithm: str, dtype: torch.dtype, momentum_dtype: torch.dtype
) -> None:
    """As in float64 throughout, but for how often a value is rounded when it is stored."""
    values = {"embedding": draw(7, 3).to(dtype), "bias": draw(5).to(dtype)}
    runs = []
    for start, options in ((values, {"momentum_dtype": momentum_dtype}), ({}, {})):
        start = start or {name: value.double() for name, value in values.items()}
        optimizer, parameters = build(start, lr=0.03, algorithms=dict.fromkeys(values, algorithm), **options)
        for t in range(4):
            gradients = {name: draw(*p.shape, seed=t).to(dtype).to(p.dtype) for name, p in parameters.items()}
            step(optimizer, parameters, **gradients)
        runs.append(parameters)
        assert options == {} or optimizer.state[parameters["bias"]]["exp_avg"].dtype == momentum_dtype
    rounding = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for name, exact in runs[1].items():
        assert runs[0][name].dtype == dtype
        torch.testing.assert_close(runs[0][name].double(), exact, rtol=rounding, atol=rounding)


# ---- as any torch optimizer


@pytest.mark.parametrize("orthogonalization", ["cholesky_qr", "qr"])
@pytest.mark.parametrize("branch", [ALWAYS_OPEN, {"tau": math.inf, "local_update": "muon"}])
def test_autocast_around_a_step_changes_nothing(orthogonalization: str, branch: dict) -> None:
    runs = []
    for on in (False, True):
        values = {"W": draw(64, 32, dtype=torch.float32), "b": draw(3, dtype=torch.float32)}
        options = {"lr": 0.1, "algorithms": {"b": "adamw"}, "orthogonalization": orthogonalization}
        optimizer, parameters = build(values, **options, **branch)
        for t in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                step(
                    optimizer,
                    parameters,
                    W=draw(64, 32, seed=t, dtype=torch.float32),
                    b=draw(3, seed=t, dtype=torch.float32),
                )
        runs.append(parameters)
    for name in ("W", "b"):
        assert torch.equal(runs[0][name], runs[1][name]), f"{name} feels the autocast"


def test_a_compiled_training_step_calls_step_as_it_is() -> None:
    runs = []
    for compiled in (False, True):
        optimizer, parameters = build({"W": draw(6, 4)}, lr=0.1, tau=0.2)
        W = parameters["W"]

        def train(scale: Tensor, W: nn.Parameter = W, optimizer: CurvaDion = optimizer) -> None:
            W.grad = scale * torch.ones_like(W)
            optimizer.step()

        run = torch.compile(train, backend="eager") if compiled else train
        for t in range(4):
            run(torch.tensor(1.0 + t % 2, dtype=torch.float64))
        runs.append(W)
    assert torch.equal(*runs)


def test_lr_may_be_a_tensor_and_may_change() -> None:
    runs = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        optimizer, parameters = build(
            {"W": draw(6, 4), "b": draw(3)}, lr=lr, algorithms={"b": "adamw"}, **ALWAYS_OPEN
        )
        for t in range(4):
            if t == 2:
                for group in optimizer.param_groups:
                    if isinstance(lr, Tensor):
                        group["lr"].fill_(0.05)
                    else:
                        group["lr"] = 0.05
            step(optimizer, parameters, W=draw(6, 4, seed=t), b=draw(3, seed=t))
        runs.append(parameters)
    for name in ("W", "b"):
        torch.testing.assert_close(runs[0][name], runs[1][name], **FP64, msg=lambda m, n=name: f"{n}: {m}")


def test_a_scheduler_governs_matrices_and_the_rest() -> None:
    optimizer, parameters = build({"W": draw(6, 4), "b": draw(3)}, algorithms={"b": "adamw"})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t < 2))
    for t in range(4):
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        step(optimizer, parameters, W=draw(6, 4, seed=t), b=draw(3, seed=t))
        scheduler.step()
        for name, parameter in parameters.items():
            assert torch.equal(parameter.detach(), before[name]) == (t >= 2), (
                f"step {t}: lr did not govern {name}"
            )


def test_a_group_added_later_is_optimized_and_synchronizes() -> None:
    optimizer, parameters = build({"W": draw(6, 4)}, **ALWAYS_CLOSED)
    for t in range(3):
        step(optimizer, parameters, W=draw(6, 4, seed=t))
    parameters["V"] = nn.Parameter(draw(4, 5))
    optimizer.add_param_group({"params": [("V", parameters["V"])]})
    assert step(optimizer, parameters, W=draw(6, 4), V=draw(4, 5, seed=1)), (
        "a new matrix has no previous norm"
    )
    assert not torch.equal(parameters["V"].detach(), draw(4, 5)), "the new matrix did not move"
    assert not step(optimizer, parameters, W=draw(6, 4), V=draw(4, 5, seed=1))


# ---- the first Q


def first_Q(
    name: str, *, before: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    optimizer, parameters = build({**(before or {}), name: draw(8, 6, dtype=dtype)}, rank_fraction=0.5)
    return optimizer.state[parameters[name]]["Q"]


def test_first_q_depends_on_the_canonical_name_alone() -> None:
    torch.manual_seed(1)
    random_state = torch.get_rng_state()
    Q = first_Q("layers.0.weight")
    assert torch.equal(torch.get_rng_state(), random_state), "construction drew from the global generator"
    torch.manual_seed(2)
    assert torch.equal(first_Q("layers.0.weight"), Q), "Q depends on the global seed"
    assert torch.equal(first_Q("layers.0.weight", before={"other": draw(4, 4)}), Q), (
        "Q depends on other parameters"
    )
    torch.testing.assert_close(first_Q("layers.0.weight", dtype=torch.float64).float(), Q)
    assert not torch.allclose(first_Q("layers.1.weight"), Q), "two names share one Q"
    assert Q.abs().sum(dim=0).all() and torch.linalg.matrix_rank(Q) == 3


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.layers.0.weight",  # DistributedDataParallel
        "_orig_mod.layers.0.weight",  # torch.compile
        "layers.0._checkpoint_wrapped_module.weight",  # activation checkpointing
        "_orig_mod.module.layers._orig_mod.0.weight",
    ],
)
def test_wrappers_do_not_change_the_first_q(wrapped: str) -> None:
    assert torch.equal(first_Q(wrapped), first_Q("layers.0.weight"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("r", [4, 16, 48])
def test_a_decaying_spectrum_with_dead_rows_gives_an_orthonormal_basis(r: int, method: str) -> None:
    """Few live rows and singular values down to the rounding of float32: residuals fall into every window
    there is."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        P = torch.zeros(64, r)
        P[:8] = torch.logspace(0, -6, 8)[:, None] * torch.randn(8, r, generator=generator)
        [Z] = orthogonalize([P[None]], method=method)
        Z = Z[0].double()
        assert Z.isfinite().all(), "a dependent column must be zero, not NaN"
        live = (Z.norm(dim=0) > 0.5).double()
        torch.testing.assert_close(
            Z.T @ Z, torch.diag(live), rtol=0, atol=1e-5, msg="live columns are orthonormal, others zero"
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_noise_column_does_not_disturb_the_columns_after_it(method: str) -> None:
    """P_2 = M q_2 is rounding noise; taken for a direction it would take part of u_2 away from P_3."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        U = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64, generator=generator))[0]
        V = torch.linalg.qr(torch.randn(48, 8, dtype=torch.float64, generator=generator))[0]
        M = torch.outer(U[:, 0], V[:, 0]) + 0.5 * torch.outer(U[:, 1], V[:, 1])
        [factors] = power_iteration(
            [M.float()[None]], [V[:, [0, 5, 1, 6]].float()[None]], orthogonalization=method
        )
        P, Q = factors.P, factors.Q
        expected = torch.outer(U[:, 0], V[:, 0]) + torch.outer(U[:, 1], V[:, 1])
        torch.testing.assert_close((P @ Q.mT)[0].double(), expected, rtol=0, atol=1e-5)
