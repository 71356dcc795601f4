"""Parameters that are several matrices: fused projections, heads, weights of experts.

The reference has each block as a parameter of its own, cut out of the whole values by hand and transposed
where it is stored as in x out; it knows nothing of blocks. On every layout, X, M and the norms of the whole
parameters must be what it has of the pieces.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.cases import RTOL, RTOL_NORM, differences
from support.layouts import local, part_of
from support.ranks import run_ranks
from support.reference import ReferenceReplicas, Replica, rank_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from curvadion import CurvaDion
from curvadion.algebra.power_iteration import initial_right_factor

IN_OUT = {"weight_layout": "in_out"}
# Name: shape, options of its group. Blocks tall, wide and square, of one size and of several; boundaries that
# fall into shards; more ranks than experts.
PARAMETERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "qkv": ((14, 5), {"splits": (8, 3, 3)}),
    "kv": ((14, 5), {"splits": (8, 3, 3)}),  # as qkv: stacked with it
    "gate_up": ((12, 7), {"splits": 2}),
    "heads": ((4, 12), {"splits": 3, "split_along": "inputs"}),
    "conv1d": ((5, 12), {"splits": 4, **IN_OUT}),
    "conv1d_inputs": ((9, 4), {"splits": (3, 6), "split_along": "inputs", **IN_OUT}),
    "experts": ((3, 4, 6), {"batch_dims": 1}),
    "fused_experts": ((4, 6, 5), {"batch_dims": 1, "splits": 2}),
    "in_out_experts": ((2, 4, 10), {"batch_dims": 1, "splits": (7, 3), **IN_OUT}),
    "layers_of_experts": ((2, 2, 4, 3), {"batch_dims": 2}),
    "whole": ((7, 6), {}),
}
SCALES = [1.0, 0.2, 0.2, 2.0, 0.2]
BASE = {"lr": 0.05, "tau": 0.4, "momentum": 0.9, "weight_decay": 0.1, "rank_fraction": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "gradient": {},
    "dion": {"local_update": "dion", "right_factor": "qr", "owners": "always"},
    "dion_together": {"local_update": "dion", "owners": "never", "error_feedback": False},
    "muon": {"local_update": "muon", "owners": "always", "nesterov": True},
    "muon_together": {"local_update": "muon", "owners": "never", "update_scale": "match_rms_adamw"},
    "normuon": {"local_update": "normuon", "eps": 1e-6},
    "dion2": {"local_update": "dion2"},
    "outer": {"local_update": "muon", "consensus": "outer", "outer_lr": 0.7, "outer_momentum": 0.6},
}


def pieces(name: str, value: Any) -> dict[str, Any]:
    """The matrices of a whole value by name, as outputs x inputs."""
    _, options = PARAMETERS[name]
    if value is None:
        return dict.fromkeys(pieces(name, torch.zeros(PARAMETERS[name][0])))
    found = {}
    for index in itertools.product(*(range(n) for n in value.shape[:-2])):
        matrix = value[index].T if "weight_layout" in options else value[index]
        splits = options.get("splits")
        dim = 1 if options.get("split_along") == "inputs" else 0
        if splits is None:
            blocks = [((), matrix)]
        else:
            sizes = [matrix.shape[dim] // splits] * splits if isinstance(splits, int) else list(splits)
            blocks = [((k,), block) for k, block in enumerate(matrix.split(sizes, dim))]
        for place, block in blocks:
            label = ", ".join(map(str, (*index, *place)))
            found[f"{name}[{label}]" if label else name] = block.clone()
    return found


def put_together(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The whole value of which these are the matrices."""
    shape, _ = PARAMETERS[name]
    numbers = torch.arange(math.prod(shape)).view(shape)  # where each element went
    whole = torch.zeros(math.prod(shape), dtype=torch.float64)
    for label, places in pieces(name, numbers).items():
        whole[places.flatten()] = parts[label].flatten()
    return whole.view(shape)


@functools.cache
def initial_values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, (s, _) in PARAMETERS.items()}


@functools.cache
def gradients(replicas: int) -> list[list[dict[str, Tensor | None]]]:
    """gradients(K)[step][replica][name]."""
    generator = torch.Generator().manual_seed(6)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    steps = []
    for step, scale in enumerate(SCALES):
        common = {name: draw(shape) for name, (shape, _) in PARAMETERS.items()}
        by_replica: list[dict[str, Tensor | None]] = []
        for replica in range(replicas):
            G: dict[str, Tensor | None] = {n: scale * (g + 0.5 * draw(g.shape)) for n, g in common.items()}
            experts, qkv = G["experts"], G["qkv"]
            assert experts is not None and qkv is not None
            if step in (2, 4):
                experts[1] = 0  # no token came to this one
                qkv[11:] = 0
            if step == 4 and replica == replicas - 1:
                G["fused_experts"] = None
            by_replica.append(G)
        steps.append(by_replica)
    return steps


@functools.cache
def trajectory(case: str, replicas: int) -> list[tuple[bool, list[Replica]]]:
    options = {k: v for k, v in {**BASE, **CASES[case]}.items() if k != "owners"}
    values = {label: x for n, v in initial_values().items() for label, x in pieces(n, v).items()}
    Q0 = {}
    if options.get("local_update") == "dion" or "consensus" not in options:
        for label, x in values.items():
            r = rank_of(*x.shape, options["rank_fraction"])
            Q0[label] = initial_right_factor(label, min(x.shape), r).double()
    reference = ReferenceReplicas(values, replicas=replicas, Q0=Q0, **options)
    moments = []
    for step in gradients(replicas):
        outcome = reference.step(
            [{k: x for n, g in G.items() for k, x in pieces(n, g).items()} for G in step]
        )
        assert outcome.margin > 1e-4, "an RMMC is so near to tau that rounding might decide"
        moments.append((outcome.synchronized, copy.deepcopy(reference.replicas)))
    return moments


class Model(nn.Module):
    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def place(self, mesh: DeviceMesh, placements: Callable[[Tensor], list[Placement]]) -> None:
        for name, p in list(self.named_parameters()):
            placed = distribute_tensor(p.detach(), mesh, placements(p), src_data_rank=None)
            self.register_parameter(name, nn.Parameter(placed))


def columns(model: Model, mesh: DeviceMesh) -> None:
    model.place(mesh, lambda p: [Shard(p.ndim - 1)])


def rows_of_experts(model: Model, mesh: DeviceMesh) -> None:
    """As torchtitan shards experts that are fewer than the ranks."""
    model.place(mesh, lambda p: [Shard(p.ndim - 2) if p.ndim > 2 else Replicate()])


def fsdp(model: Model, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=mesh)


def fsdp_and_tp(model: Model, mesh: DeviceMesh) -> None:
    """Rows over "tp", columns of some; then FSDP over the first dimension: rows twice, or whole experts."""
    model.place(mesh["tp"], lambda p: [Shard(p.ndim - 1 if p.shape[-1] == 12 else p.ndim - 2)])
    fully_shard(model, mesh=mesh["fsdp"])


def expert_parallel(model: Model, mesh: DeviceMesh, dim: int) -> None:
    """Whole experts over "ep", then FSDP over a dimension of what is left of them and over all else."""
    experts = {name for name, p in model.named_parameters() if p.ndim > 2}
    for name in experts:
        value = distribute_tensor(getattr(model, name).detach(), mesh["ep"], [Shard(0)], src_data_rank=None)
        model.register_parameter(name, nn.Parameter(value))
    fully_shard(model, mesh=mesh["fsdp"], shard_placement_fn=lambda p: Shard(dim if p.ndim > 2 else 0))


def expert_parallel_rows(model: Model, mesh: DeviceMesh) -> None:
    expert_parallel(model, mesh, 1)


def expert_parallel_twice(model: Model, mesh: DeviceMesh) -> None:
    expert_parallel(model, mesh, 0)


# Name: sizes of the shard mesh, how it is laid out, replicas, and the cases that run there: each rule on
# some layouts, with owners and without.
LAYOUTS: dict[str, tuple[dict[str, int], Callable[[Model, DeviceMesh], None] | None, int, list[str]]] = {
    "plain": ({}, None, 2, ["gradient", "dion2", "outer"]),
    "fsdp2": ({"shard": 2}, fsdp, 2, ["gradient", "dion_together", "muon", "normuon"]),
    "fsdp3_empty_shards": ({"shard": 3}, fsdp, 1, ["dion", "muon_together", "dion2"]),
    "columns": ({"tp": 2}, columns, 2, ["dion", "normuon"]),
    "rows_of_experts": ({"shard": 2}, rows_of_experts, 1, ["dion", "muon", "dion2"]),
    "fsdp2_tp2": ({"fsdp": 2, "tp": 2}, fsdp_and_tp, 1, ["dion", "muon_together", "normuon", "dion2"]),
    "fsdp2_ep2": ({"fsdp": 2, "ep": 2}, expert_parallel_rows, 1, ["dion", "muon", "normuon"]),
    "fsdp2_ep2_whole": ({"fsdp": 2, "ep": 2}, expert_parallel_twice, 1, ["dion_together", "muon"]),
}


def build(layout: str) -> tuple[Model, int, DeviceMesh | None]:
    sizes, place, replicas, _ = LAYOUTS[layout]
    names = (*(("replicate",) if replicas > 1 else ()), *sizes)
    shape = (*((replicas,) if replicas > 1 else ()), *sizes.values())
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names) if names else None
    model = Model(initial_values())
    if place is not None:
        assert mesh is not None
        place(model, mesh[tuple(sizes)])
    if mesh is None or replicas == 1:
        return model, 0, None
    return model, mesh.get_local_rank("replicate"), mesh["replicate"]


def groups_of(model: Model) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        options = PARAMETERS[name][1]
        groups.setdefault(repr(options), {"params": [], **options})["params"].append((name, p))
    return list(groups.values())


def like(p: Tensor, value: Tensor | None) -> Tensor | None:
    if value is None or not isinstance(p, DTensor):
        return None if value is None else value.clone()
    part = part_of(value, p).clone()
    shape, stride = value.shape, p.stride()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def optimizer_of(model: Model, peers: DeviceMesh | None, case: str) -> CurvaDion:
    return CurvaDion(groups_of(model), replicate_mesh=peers, **{**BASE, **CASES[case]})


def run_case(model: Model, replica: int, peers: DeviceMesh | None, replicas: int, case: str) -> list[str]:
    with torch.no_grad():
        for name, p in model.named_parameters():
            local(p).copy_(part_of(initial_values()[name], p))
    opt, problems = optimizer_of(model, peers, case), list[str]()
    for step, (synchronized, expected) in enumerate(trajectory(case, replicas)):
        for name, p in model.named_parameters():
            p.grad = like(p, gradients(replicas)[step][replica][name])
        opt.step()
        if bool(opt.metrics()["curvadion/synchronized"]) != synchronized:
            problems.append(f"{case}, step {step}: synchronized is not {synchronized}")
        compared = []
        for name, p in model.named_parameters():
            norms = opt.state[p]["last_norm"].reshape(-1).tolist()
            labels = list(pieces(name, initial_values()[name]))
            for label, norm in zip(labels, norms, strict=True):
                want = expected[replica].last_norm[label]
                if not math.isclose(norm, want, rel_tol=RTOL_NORM):
                    problems.append(f"{case}, step {step}: the norm of {label} is {norm}, not {want}")
            compared += [
                (f"X of {name}", p, put_together(name, expected[replica].X)),
                (f"M of {name}", opt.state[p]["momentum"], put_together(name, expected[replica].M)),
            ]
        errors = differences([(actual, whole) for _, actual, whole in compared])
        for (what, *_), error in zip(compared, errors, strict=True):
            if not error <= RTOL:
                problems.append(f"{case}, step {step}: {what} is off by {error:.1e}")
    return problems


def run_cases(layout: str) -> list[str]:
    model, replica, peers = build(layout)
    replicas, cases = LAYOUTS[layout][2], LAYOUTS[layout][3]
    return [problem for case in cases for problem in run_case(model, replica, peers, replicas, case)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_matrices_of_their_own_on_every_layout(layout: str) -> None:
    sizes, _, replicas, _ = LAYOUTS[layout]
    for case in LAYOUTS[layout][3]:
        trajectory(case, replicas)  # here, not in every forked rank
    problems = run_ranks(math.prod(sizes.values()) * replicas, run_cases, layout)
    lines = [f"rank {rank}: {problem}" for rank, of_rank in enumerate(problems) for problem in of_rank]
    assert not lines, f"{len(lines)} differences from the reference:\n" + "\n".join(lines[:40])


# Fewer experts than ranks, so that some ranks have none: who has some must decide as they do. In each, the
# experts come first: mesh, and (shape, placements, options) of each group.
POLAR: dict[str, Any] = {"newton_schulz": "polar_express"}
SOME_HAVE_NONE: dict[
    str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[Placement, ...], Any]]]
] = {
    "how many matrices there are": (  # so that it pays to have owners
        (4,),
        [
            ((2, 7, 1), (Shard(0),), {"batch_dims": 1}),
            ((4, 8), (Shard(0),), IN_OUT),
            ((12, 6), (Shard(0),), IN_OUT),
        ],
    ),
    "which iteration comes first": (
        (4,),
        [
            ((2, 6, 8), (Shard(0),), {"batch_dims": 1, **POLAR}),
            ((8, 6), (Shard(0),), {}),
            ((6, 12), (Shard(1),), POLAR),
        ],
    ),
    "whether sums must be the same elsewhere": (
        (3, 2),
        [
            ((2, 6, 8), (Shard(0), Replicate()), {"batch_dims": 1}),
            ((9, 6), (Shard(0), Shard(1)), {}),
            ((12, 6), (Shard(0), Shard(1)), {}),
        ],
    ),
}


def train_experts(name: str, options: Mapping[str, Any], *, sharded: bool) -> list[Tensor]:
    """Return the whole parameters after some steps, local and synchronized ones."""
    sizes, parameters = SOME_HAVE_NONE[name]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple("ab")[: len(sizes)]) if sharded else None
    draw = torch.Generator().manual_seed(0)
    params, groups = list[nn.Parameter](), list[dict[str, Any]]()

    def placed(value: Tensor, placements: tuple[Placement, ...]) -> Tensor:
        return value if mesh is None else distribute_tensor(value, mesh, placements, src_data_rank=None)

    for k, (shape, placements, own) in enumerate(parameters):
        value = torch.randn(shape, generator=draw, dtype=torch.float64)
        params.append(nn.Parameter(placed(value, placements)))
        if options["local_update"] == "dion":
            own = {key: value for key, value in own.items() if key not in POLAR}
        groups.append({"params": [(f"w{k}", params[-1])], **own})
    opt = CurvaDion(
        groups, lr=0.05, tau=math.inf, max_local_steps=1, right_factor="qr", rank_fraction=0.5, **options
    )
    for _ in range(4):
        for p, (shape, placements, _) in zip(params, parameters, strict=True):
            p.grad = placed(torch.randn(shape, generator=draw, dtype=torch.float64), placements)
        opt.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]


@pytest.mark.parametrize("orthogonalization", ["cholesky_qr", "qr"])
@pytest.mark.parametrize("owners", ["auto", "always", "never"])
@pytest.mark.parametrize("name", SOME_HAVE_NONE)
def test_ranks_without_experts_call_what_the_others_call(
    name: str, owners: str, orthogonalization: str
) -> None:
    rules = ("dion", "muon", "normuon", "dion2")
    options = [{"local_update": r, "owners": owners, "orthogonalization": orthogonalization} for r in rules]

    def worker() -> list[list[Tensor]]:
        return [train_experts(name, some, sharded=True) for some in options]

    for told in run_ranks(math.prod(SOME_HAVE_NONE[name][0]), worker):
        for some, found in zip(options, told, strict=True):
            for mine, theirs in zip(found, train_experts(name, some, sharded=False), strict=True):
                torch.testing.assert_close(mine.detach(), theirs, rtol=1e-8, atol=1e-10)


# ---- state


def trained(layout: str, case: str, steps: int = 3) -> tuple[Model, CurvaDion, int]:
    model, replica, peers = build(layout)
    opt = optimizer_of(model, peers, case)
    for step in range(steps):
        take_step(model, opt, step, replica)
    opt.synchronize()
    return model, opt, replica


def take_step(model: Model, opt: CurvaDion, step: int, replica: int) -> None:
    for name, p in model.named_parameters():
        p.grad = like(p, gradients(2)[step][replica][name])
    opt.step()


def save(folder: str, layout: str, case: str) -> dict[str, Tensor]:
    """Save after three steps; return the parameters after a fourth, whole."""
    model, opt, replica = trained(layout, case)
    values = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    dcp.save({"model": dict(model.named_parameters()), "opt": state_of(model, opt)}, checkpoint_id=folder)
    take_step(model, opt, 3, replica)
    values = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {n: value.detach().clone() for n, value in values.items()}


def state_of(model: Model, opt: CurvaDion) -> dict[str, Any]:
    return get_optimizer_state_dict(model, opt)


def resume(folder: str, layout: str, case: str) -> dict[str, Tensor]:
    model, replica, peers = build(layout)
    opt = optimizer_of(model, peers, case)
    state = {"model": dict(model.named_parameters()), "opt": state_of(model, opt)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, opt, state["opt"])
    take_step(model, opt, 3, replica)
    values = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {n: value.detach().clone() for n, value in values.items()}


def resume_all(folder: str, saved: dict[str, dict[str, Tensor]], layout: str) -> list[str]:
    problems = []
    for case, expected in saved.items():
        for name, value in resume(f"{folder}/{case}", layout, case).items():
            error = float((value - expected[name]).abs().max() / expected[name].abs().max())
            if not error <= RTOL:
                problems.append(f"{layout}, {case}: {name} goes on {error:.1e} away from where it went")
    return problems


# Q of blocks of several sizes; a number for each output.
SAVED = ("dion", "normuon")


def test_a_checkpoint_of_blocks_goes_from_any_mesh_to_any_other(tmp_path: Any) -> None:
    def save_all() -> dict[str, dict[str, Tensor]]:
        return {case: save(f"{tmp_path}/{case}", "fsdp2_tp2", case) for case in SAVED}

    [saved, *_] = run_ranks(4, save_all)
    for layout in ("fsdp3_empty_shards",):
        sizes, _, replicas, _ = LAYOUTS[layout]
        problems = run_ranks(math.prod(sizes.values()) * replicas, resume_all, str(tmp_path), saved, layout)
        assert not any(problems), problems
    for case in SAVED:  # and into one process
        model = Model(initial_values())
        opt = optimizer_of(model, None, case)
        state = {"model": dict(model.named_parameters()), "opt": state_of(model, opt)}
        dcp.load(state, checkpoint_id=f"{tmp_path}/{case}", no_dist=True)
        set_optimizer_state_dict(model, opt, state["opt"])
        take_step(model, opt, 3, 0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), saved[case][name], rtol=RTOL, atol=RTOL)


def alone(options: dict[str, Any], shape: tuple[int, ...], **common: Any) -> tuple[nn.Parameter, CurvaDion]:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    return p, CurvaDion([{"params": [("w", p)], **options}], **common)


def test_state_has_the_same_shapes_on_every_layout() -> None:
    model = Model(initial_values())
    opt = optimizer_of(model, None, "dion")
    shapes = {n: {k: tuple(t.shape) for k, t in opt.state[p].items()} for n, p in model.named_parameters()}
    assert shapes["whole"]["Q"] == (6, 3) and shapes["whole"]["last_norm"] == ()
    assert shapes["qkv"]["momentum"] == (14, 5) and shapes["qkv"]["last_norm"] == (3,)
    assert shapes["qkv"]["Q"] == (1, 5, 3), "of 8 x 5, along the inputs"
    assert shapes["qkv"]["Q_split"] == (14, 2), "of 3 x 5, along the outputs, which are cut"
    assert shapes["gate_up"]["Q"] == (12, 3) and shapes["experts"]["Q"] == (3, 4, 2)
    assert shapes["heads"]["Q"] == (12, 2), "of 4 x 4, along the inputs, which are cut"

    def here() -> dict[str, dict[str, tuple[int, ...]]]:
        model, _, peers = build("fsdp2_tp2")
        opt = optimizer_of(model, peers, "dion")
        return {n: {k: tuple(t.shape) for k, t in opt.state[p].items()} for n, p in model.named_parameters()}

    assert all(found == shapes for found in run_ranks(4, here))


def test_a_plain_state_dict_of_blocks_is_loaded_again() -> None:
    p, opt = alone({"splits": (5, 2)}, (7, 4), local_update="dion", tau=0.5)
    q, twin = alone({"splits": [5, 2]}, (7, 4), local_update="dion", tau=0.5)
    generator = torch.Generator().manual_seed(1)
    G = [torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    for g in G[:3]:
        p.grad = g
        opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    q.data.copy_(p.data)
    for x, optimizer in ((p, opt), (q, twin)):
        x.grad = G[3]
        optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("saved", "own", "says"),
    [
        ({"splits": 2}, {"splits": (5, 3)}, "splits"),
        ({}, {"splits": 2}, "splits"),
        ({"splits": 2}, {"splits": 2, "split_along": "inputs"}, "split_along"),
    ],
)
def test_a_checkpoint_of_other_blocks_is_refused(
    saved: dict[str, Any], own: dict[str, Any], says: str
) -> None:
    _, before = alone(saved, (8, 4), local_update="muon", max_local_steps=3)
    _, after = alone(own, (8, 4), local_update="muon", max_local_steps=3)
    with pytest.raises(ValueError, match=f"saved with the {says} of each group"):
        after.load_state_dict(before.state_dict())


def test_a_checkpoint_from_before_there_were_blocks_is_loaded() -> None:
    _, before = alone({}, (8, 4), local_update="dion")
    state = before.state_dict()
    for group in state["param_groups"]:
        for key in ("splits", "split_along", "batch_dims"):
            del group[key]
    _, after = alone({}, (8, 4), local_update="dion")
    after.load_state_dict(state)
    assert after.param_groups[0]["splits"] is None
    _, cut = alone({"splits": 2}, (8, 4), local_update="dion")
    with pytest.raises(ValueError, match="state of the same shape"):
        cut.load_state_dict(state)


# ---- what is seen and what is refused


def test_explain_has_a_row_for_each_block() -> None:
    _, opt = alone(
        {"splits": (6, 2), "name": "fused"}, (8, 4), local_update="muon", max_local_steps=3, lr=0.1
    )
    rows = opt.explain()
    assert [(row.name, row.block, row.shape) for row in rows] == [("w", "[0]", (6, 4)), ("w", "[1]", (2, 4))]
    assert [row.lr for row in rows] == pytest.approx([0.1 * math.sqrt(6 / 4), 0.1 * math.sqrt(2 / 4)])
    assert opt.matrix_names == ["w[0]", "w[1]"] and list(opt.named_rmmc()) == opt.matrix_names
    _, experts = alone({"batch_dims": 1}, (16, 4, 4), local_update="muon", max_local_steps=3)
    assert [line.split()[0] for line in str(experts.explain()).splitlines()] == ["name", "w[*]"]


@pytest.mark.parametrize(
    ("options", "shape", "says"),
    [
        ({}, (3, 4, 4), "must have two dimensions.*batch_dims and splits"),
        ({"batch_dims": 1}, (4, 4), "batch_dims=1 that count matrices"),
        ({"splits": 3}, (8, 4), "outputs that splits=3 divides, not 8"),
        ({"splits": (6, 3)}, (8, 4), "as the sizes of splits=.6, 3. make together, 9, not 8"),
        ({"splits": 2, "split_along": "inputs"}, (8, 3), "inputs that splits=2 divides, not 3"),
        ({"splits": (0, 8)}, (8, 4), "splits must be None, a number of equal blocks, or their sizes"),
        ({"splits": ()}, (8, 4), "splits must be"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(
    options: dict[str, Any], shape: tuple[int, ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        alone(options, shape)


@pytest.mark.parametrize("changed", [{"splits": 4}, {"split_along": "inputs"}, {"weight_layout": "in_out"}])
def test_blocks_cannot_change_during_training(changed: dict[str, Any]) -> None:
    p, opt = alone({"splits": 2}, (8, 4))
    p.grad = torch.ones_like(p)
    opt.step()
    opt.param_groups[0] |= changed
    with pytest.raises(ValueError, match="must stay as they were at construction"):
        opt.step()


def test_experts_that_are_no_run_of_memory_move() -> None:
    turned, opt = alone({"batch_dims": 1}, (2, 3, 4), local_update="muon", max_local_steps=3)
    turned.data = turned.data.transpose(0, 2).contiguous().transpose(0, 2)
    whole, twin = alone({"batch_dims": 1}, (2, 3, 4), local_update="muon", max_local_steps=3)
    for p, optimizer in ((turned, opt), (whole, twin)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        before = p.detach().clone()
        optimizer.step()
        assert not torch.equal(p, before)
    torch.testing.assert_close(turned.detach(), whole.detach())


def experts_alone() -> tuple[dict[str, int], list[str]]:
    """Collectives of local steps of experts that lie on one rank each."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    w = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = nn.Parameter(distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None))
    options = {"local_update": "normuon", "max_local_steps": 9, "owners": "always"}
    opt = CurvaDion([{"params": [("w", p)], "batch_dims": 1}], **options)
    for _ in range(3):
        p.grad = like(p, w)
        opt.step()
    calls = {purpose: n for (_, purpose), n in opt.ledger.calls.items() if n and purpose != "check"}
    return calls, sorted(opt.owners)


def test_whole_experts_on_each_rank_need_no_communication() -> None:
    for calls, owners in run_ranks(2, experts_alone):
        assert calls == {"norms": 3}, "the gate's sums of squares, once a step"
        assert not owners, "they are worked on where they are"


def heads_with_owners() -> list[str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    w = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = nn.Parameter(distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None))
    opt = CurvaDion([{"params": [("w", p)], "splits": 4}], local_update="muon", owners="always", tau=9.0)
    for _ in range(2):
        p.grad = like(p, w)
        opt.step()
    assert dist.get_world_size() == 2
    return [f"{name} {owner}" for name, owner in opt.owners.items()]


def test_each_block_has_an_owner_of_its_own() -> None:
    for owned in run_ranks(2, heads_with_owners):
        assert [line.split()[0] for line in owned] == ["w[0]", "w[1]", "w[2]", "w[3]"]
        assert sorted(line.split()[1] for line in owned) == ["0", "0", "1", "1"]
