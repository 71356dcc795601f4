"""What the constructor refuses, and that the message says the rule, the value it got and a way out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import Toy, gathered, grid, local, outcome
from support.ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from curvadion import (
    LOW_COMMUNICATION,
    LOW_COMMUNICATION_KEPT,
    LOWER_COMMUNICATION,
    LOWEST_COMMUNICATION,
    CurvaDion,
    ReplicaMismatchError,
)
from curvadion.consensus.codec import bits_per_value
from curvadion.state.memory import refuse_shared


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (4, 3)))


def fails(error: type[Exception], *words: str, params: Any = None, **options: Any) -> str:
    """Construct, expect `error`, and expect every one of `words` in its message."""
    with pytest.raises(error) as caught:
        CurvaDion([matrix()] if params is None else params, **options)
    return said(str(caught.value), *words)


def said(message: str, *words: str) -> str:
    for word in words:
        assert word.lower() in message.lower(), f"the message should say {word!r}: {message}"
    return message


NUMBERS: dict[str, list[Any]] = {
    "lr": [-0.1, math.nan, math.inf],
    "momentum": [-0.1, math.nan, 1.0, 1.5],
    "weight_decay": [-0.1, math.nan, math.inf],
    "rank_fraction": [0.0, -0.5, 1.01, math.nan],
    "rank_multiple_of": [0, -1],
    "tau": [-0.1, math.nan],
    "local_lr_scale": [-1.0, math.nan, math.inf],
    "eps": [-1e-8, math.nan],
    "betas": [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan)],
    "warmup_steps": [-1],
    "min_local_steps": [-1],
    "max_local_steps": [-1],
    "check_every": [-1],
}
PER_GROUP = {"lr", "momentum", "weight_decay", "rank_fraction", "rank_multiple_of", "tau", "local_lr_scale"}
PER_GROUP |= {
    "eps",
    "betas",
    "local_update",
    "error_feedback",
    "right_factor",
    "orthogonalization",
    "algorithm",
}


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option in NUMBERS for value in NUMBERS[option]]
)
def test_a_number_out_of_range(option: str, value: Any) -> None:
    fails(ValueError, option, repr(value), **{option: value})


@pytest.mark.parametrize(
    ("option", "value"), [(option, values[0]) for option, values in NUMBERS.items() if option in PER_GROUP]
)
def test_a_number_out_of_range_in_a_group(option: str, value: Any) -> None:
    fails(ValueError, option, repr(value), params=[{"params": [matrix()], option: value}])
    opt = CurvaDion([matrix()])
    with pytest.raises(ValueError, match=option):
        opt.add_param_group({"params": [matrix()], option: value})


@pytest.mark.parametrize("algorithm", ["dion", "adamw", "lion"])
@pytest.mark.parametrize("tensor", [False, True])
def test_weight_decay_must_not_change_the_sign_of_weights(tensor: bool, algorithm: str) -> None:
    def lr(value: float) -> Any:
        return torch.tensor(value) if tensor else value

    def group(**options: Any) -> dict[str, Any]:
        return {"params": [matrix()], "algorithm": algorithm, **options}

    words = "lr * weight_decay must be at most 1", "2.5", "1 / lr = 0.4"
    fails(ValueError, *words, params=[group()], lr=lr(2.5), weight_decay=0.5)
    fails(ValueError, *words, params=[group(lr=lr(2.5))], weight_decay=0.5)
    fails(ValueError, *words, params=[group(weight_decay=0.5)], lr=lr(2.5))
    CurvaDion([group(lr=lr(0.1))], weight_decay=10)  # all of it; in float32 more than 1
    opt = CurvaDion([group(lr=lr(2.0))], weight_decay=0.5)
    with pytest.raises(ValueError, match=r"lr \* weight_decay"):
        opt.add_param_group(group(lr=lr(2.5)))
    CurvaDion([group(weight_decay=0.0)], lr=lr(2.5), weight_decay=0.5)  # what no group has, hurts none
    (p,), before = opt.param_groups[0]["params"], matrix()
    p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.equal(p, torch.zeros_like(before))
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 2.0)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"lr \* weight_decay .* got lr=4 "):
        opt.step()
    assert torch.equal(p, torch.zeros_like(before))


CHOICES = {
    "local_update": ("gradient", "dion"),
    "consensus": ("average", "none"),
    "right_factor": ("column_norm", "qr"),
    "orthogonalization": ("auto", "cholesky_qr", "qr"),
    "on_nonfinite": ("raise", "skip"),
}


@pytest.mark.parametrize("option", CHOICES)
def test_an_unknown_choice_lists_the_known_ones(option: str) -> None:
    fails(ValueError, option, "'bogus'", *CHOICES[option], **{option: "bogus"})
    if option in PER_GROUP:
        fails(
            ValueError, option, "'bogus'", *CHOICES[option], params=[{"params": [matrix()], option: "bogus"}]
        )
    for choice in CHOICES[option]:
        CurvaDion([matrix()], **{option: choice})


@pytest.mark.parametrize(
    ("option", "value", "nearest"),
    [
        ("local_update", "normoun", "normuon"),
        ("local_update", "dion3", "dion2"),
        ("local_update", "sgd", "gradient"),  # nothing is near, so the first one
        ("consensus", "averaged", "average"),
        ("gate", "rmcc", "rmmc"),
        ("gate", "Drift", "drift"),
        ("outer_bits", 3, 4),
        ("outer_bits", 7, 8),
        ("outer_bits", 64, 32),
        ("outer_bits", "2", 2),
        ("outer_bits", "ternary", 4),
        ("on_nonfinite", "skipping", "skip"),
        ("owners", "allways", "always"),
        ("newton_schulz", "polar", "polar_express"),
        ("right_factor", "column_normalize", "column_norm"),
        ("kernels", "tritons", "triton"),
    ],
)
def test_an_unknown_choice_is_told_the_nearest(option: str, value: Any, nearest: Any) -> None:
    assert fails(ValueError, option, **{option: value}).endswith(f"try {nearest!r}")


@pytest.mark.parametrize("option", ["gate", "local_update", "consensus", "outer_bits", "kernels"])
def test_what_cannot_be_a_name_is_an_unknown_choice_too(option: str) -> None:
    fails(ValueError, option, "['dion']", **{option: ["dion"]})


def test_an_unknown_algorithm() -> None:
    fails(
        ValueError,
        "algorithm",
        "'sgd'",
        "dion",
        "adamw",
        "lion",
        params=[{"params": [matrix()], "algorithm": "sgd"}],
    )


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
def test_a_dion_group_takes_matrices_only(shape: tuple[int, ...]) -> None:
    named = [("blocks.3.norm.weight", nn.Parameter(torch.ones(shape)))]
    message = fails(ValueError, "blocks.3.norm.weight", "adamw", params=[{"params": named}])
    assert str(shape) in message or str(list(shape)) in message, (
        f"the message should give the shape: {message}"
    )


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_dion_group_takes_no_empty_matrices(shape: tuple[int, ...]) -> None:
    named = [("blocks.3.weight", nn.Parameter(torch.empty(shape)))]
    fails(ValueError, "blocks.3.weight", "elements", "adamw", str(shape), params=[{"params": named}])


def test_a_group_that_is_no_dict_is_torchs_error() -> None:
    opt = CurvaDion([matrix()])
    with pytest.raises(TypeError, match="must be a dict"):
        opt.add_param_group([matrix()])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("momentun", "momentum"),
        ("rank_fractoin", "rank_fraction"),
        ("weigth_decay", "weight_decay"),
        ("algo", None),
    ],
)
def test_an_unknown_group_key(key: str, meant: str | None) -> None:
    words = [key, meant] if meant else [key]
    fails(ValueError, *words, params=[{"params": [matrix()], key: 0.1}])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("replicate_mesh", None),
        ("warmup_steps", 3),
        ("min_local_steps", 1),
        ("max_local_steps", 5),
        ("consensus", "none"),
        ("momentum_dtype", torch.float32),
        ("payload_dtype", torch.bfloat16),
        ("on_nonfinite", "skip"),
        ("check_every", 10),
    ],
)
def test_an_option_of_the_whole_optimizer_inside_a_group(option: str, value: Any) -> None:
    fails(ValueError, option, "group", params=[{"params": [matrix()], option: value}])


def test_keys_that_host_trainers_add_are_accepted() -> None:
    CurvaDion([{"params": [matrix()], "fused": True, "foreach": False, "name": "hidden", "initial_lr": 0.1}])


def test_an_option_is_not_accepted_and_ignored() -> None:
    with pytest.raises(TypeError, match="dampening"):
        CurvaDion([matrix()], dampening=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", ["replicate", 2, [0, 1], torch.ones(2)])
def test_a_wrong_type_for_replicate_mesh(value: Any) -> None:
    fails(TypeError, "replicate_mesh", repr(value), "DeviceMesh", "ProcessGroup", replicate_mesh=value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", "0.1"),
        ("momentum", None),
        ("tau", "0.1"),
        ("betas", 0.9),
        ("betas", (0.9,)),
        ("warmup_steps", 2.5),
        ("max_local_steps", "3"),
        ("rank_multiple_of", 1.5),
        ("error_feedback", "yes"),
        ("local_update", 1),
        ("momentum_dtype", "float32"),
        ("payload_dtype", 16),
    ],
)
def test_a_wrong_type(option: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        CurvaDion([matrix()], **{option: value})
    said(str(caught.value), option, repr(value))


@pytest.mark.parametrize("option", ["momentum_dtype", "payload_dtype"])
def test_an_integer_dtype(option: str) -> None:
    with pytest.raises((TypeError, ValueError), match=option):
        CurvaDion([matrix()], **{option: torch.int64})


@pytest.mark.parametrize(
    ("dtype", "momentum_dtype"), [(torch.float16, None), (torch.float32, torch.float16)], ids=str
)
def test_a_second_moment_in_float16_is_refused(
    dtype: torch.dtype, momentum_dtype: torch.dtype | None
) -> None:
    """After one gradient of 1e-5 it is 0, and the first moment over eps a step of a hundred times lr."""
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    with pytest.raises(ValueError, match="second moment must not be float16.*momentum_dtype=torch.float32"):
        CurvaDion([{"params": [p], "algorithm": "adamw"}], momentum_dtype=momentum_dtype)
    opt = CurvaDion([{"params": [p], "algorithm": "adamw"}], momentum_dtype=torch.float32, lr=1e-3)
    for gradient in (1e-5, 0.0, 0.0):
        p.grad = torch.full_like(p, gradient)
        opt.step()
    assert bool(((p - 1).abs() < 0.01).all())


def test_integer_and_complex_parameters_are_refused() -> None:
    for dtype in (torch.complex64,):
        with pytest.raises((TypeError, ValueError), match="complex"):
            CurvaDion([nn.Parameter(torch.ones(3, 4, dtype=dtype))])


def test_the_bounds_must_leave_room() -> None:
    fails(ValueError, "min_local_steps", "max_local_steps", "5", "2", min_local_steps=5, max_local_steps=2)


def test_no_parameters_and_duplicates_are_torch_errors() -> None:
    with pytest.raises(ValueError, match="empty"):
        CurvaDion([])
    same = matrix()
    with pytest.raises(ValueError, match="group"):
        CurvaDion([{"params": [same]}, {"params": [same]}])


def halves(dim: int, overlap: int = 0) -> list[torch.Tensor]:
    """Two parts of one block of memory, with so many rows or columns in common."""
    whole = torch.linspace(-1, 1, 48).view(6, 8)
    half = whole.shape[dim] // 2
    return [whole.narrow(dim, 0, half + overlap), whole.narrow(dim, half, half)]


SHARED = {
    "the same": lambda: [torch.ones(6, 4)] * 2,
    "a transpose": lambda: [(whole := torch.ones(6, 4)), whole.T],
    "a row": lambda: halves(0, overlap=1),
    "a column": lambda: halves(1, overlap=1),
    "bytes": lambda: [(whole := torch.ones(6, 4)), whole.view(torch.bfloat16)[:, :2]],
}
APART = {
    "rows": lambda: halves(0),
    "columns": lambda: halves(1),
    "nothing": lambda: [(whole := torch.ones(6, 4)), whole[:0].flatten()],
    "meta": lambda: [torch.ones(6, 4, device="meta")] * 2,
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("what", SHARED)
def test_two_parameters_of_the_same_memory_are_refused(what: str, groups: int) -> None:
    """Both would be moved: a head that was tied by its data, not by the parameter."""
    named = [(name, nn.Parameter(x)) for name, x in zip("ab", SHARED[what](), strict=True)]
    parts = [named] if groups == 1 else [[one] for one in named]
    params = [{"params": part, "algorithm": "adamw"} for part in parts]
    fails(ValueError, "memory of its own", "'b'", "'a'", "tie them", params=params)
    named[1][1].requires_grad_(False)  # moves with the other, and by nothing else
    CurvaDion(params)
    named[1][1].requires_grad_(True)
    opt = CurvaDion([{"params": [named[0]]}])
    with pytest.raises(ValueError, match="memory of its own"):
        opt.add_param_group({"params": [named[1]], "algorithm": "adamw"})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("what", APART)
def test_parts_of_one_block_of_memory_are_parameters(what: str) -> None:
    results = []
    for separate in (False, True):
        params = [nn.Parameter(x.clone() if separate else x) for x in APART[what]()]
        opt = CurvaDion([{"params": [p], "algorithm": "dion" if p.ndim > 1 else "adamw"} for p in params])
        for step in range(3 if what != "meta" else 0):
            for p in params:
                p.grad = torch.sin(step + torch.arange(1.0, 1 + p.numel())).view(p.shape)
            opt.step()
        results.append([p.detach() for p in params])
    assert all(a.is_meta or torch.equal(a, b) for a, b in zip(*results, strict=True))


class Handled(torch.Tensor):
    """A tensor whose address is that of an object in front of its memory, as on MPS, and not of its bytes."""

    handle: int

    @staticmethod
    def of(x: torch.Tensor, handle: int) -> Handled:
        made = torch.Tensor._make_subclass(Handled, x)
        made.handle = handle
        return made

    def data_ptr(self) -> int:
        return self.handle + self.storage_offset() * self.element_size()

    def untyped_storage(self) -> Any:
        return SimpleNamespace(data_ptr=lambda: self.handle)


def test_addresses_of_two_blocks_are_not_compared() -> None:
    """They may be handles, closer to each other than the blocks are long; or those of freed memory, all 0."""
    a, b = torch.ones(2, 64, 64).unbind()
    refuse_shared([("a", Handled.of(a.clone(), 4096)), ("b", Handled.of(a.clone(), 4096 + 160))])
    refuse_shared([("a", Handled.of(a, 4096)), ("b", Handled.of(b, 4096))])
    with pytest.raises(ValueError, match="memory of its own"):
        refuse_shared([("a", Handled.of(a, 4096)), ("b", Handled.of(a.view(-1)[64:], 4096))])
    freed = [("a", a.clone()), ("b", b.clone())]
    for _, x in freed:
        x.untyped_storage().resize_(0)
    refuse_shared(freed)


def test_shards_of_the_same_memory_are_refused_too() -> None:
    def worker() -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False))
        fully_shard(model, mesh=mesh)
        one, other = model.parameters()
        same = nn.Parameter(DTensor.from_local(local(one).detach(), mesh, one.placements))
        return {
            "apart": outcome(lambda: CurvaDion([one, other])),
            "shared": outcome(lambda: CurvaDion([one, other, same])),
        }

    for seen in run_ranks(2, worker):
        assert seen["apart"][0] == "ok"
        assert seen["shared"][0] == "ValueError" and "memory of its own" in seen["shared"][1]


@pytest.mark.parametrize("form", ["iterator", "list", "groups", "named", "named-groups"])
def test_whatever_torch_accepts(form: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False))
    params: Any = {
        "iterator": lambda: model.parameters(),
        "list": lambda: list(model.parameters()),
        "groups": lambda: [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].weight}],
        "named": lambda: model.named_parameters(),
        "named-groups": lambda: [{"params": list(model.named_parameters()), "tau": 0.5}],
    }[form]()
    opt = CurvaDion(params, lr=0.01)
    assert isinstance(opt, torch.optim.Optimizer)
    assert sum(len(group["params"]) for group in opt.param_groups) == 2
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    if "named" in form:
        assert opt.matrix_names == ["0.weight", "1.weight"]
    assert len(opt.matrix_names) == 2


def test_a_learning_rate_may_be_a_tensor() -> None:
    def train(lr: Any) -> torch.Tensor:
        toy = Toy()
        opt = CurvaDion(toy.groups(), lr=lr)
        for step in range(3):
            toy.set_gradients(step, 0)
            opt.step()
        return torch.cat([param.detach().flatten() for param in toy.params.values()])

    torch.testing.assert_close(train(torch.tensor(0.02)), train(0.02))
    fails(ValueError, "lr", lr=torch.tensor(-0.02))


def test_meshes_that_cannot_work() -> None:
    def worker() -> dict[str, tuple[str, str]]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        plain = nn.Linear(6, 8, bias=False)
        hybrid = nn.Linear(6, 8, bias=False)
        fully_shard(hybrid, mesh=mesh)  # native HSDP
        sharded = nn.Linear(6, 8, bias=False)
        fully_shard(sharded, mesh=mesh["shard"])
        # As under tensor parallelism: some matrices split by it, norms and others copied.
        tensor_parallel = Toy(
            mesh["shard"], placements={"layers.1.weight": (Replicate(),), "norm.weight": (Replicate(),)}
        )
        everyone = nn.Linear(6, 8, bias=False)
        flat = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
        fully_shard(everyone, mesh=flat)

        def build(params: Any, replicate_mesh: Any) -> tuple[str, str]:
            return outcome(lambda: CurvaDion(params, replicate_mesh=replicate_mesh))

        return {
            "two-dimensional replicate_mesh": build(plain.parameters(), mesh),
            "native HSDP": build(hybrid.parameters(), mesh["replicate"]),
            "native HSDP without a replicate_mesh": build(hybrid.parameters(), None),
            "overlap: the shard mesh itself": build(sharded.parameters(), mesh["shard"]),
            "overlap: shards over everybody": build(everyone.parameters(), mesh["replicate"]),
            "right": build(sharded.parameters(), mesh["replicate"]),
            "right, tensor-parallel Replicate": build(tensor_parallel.groups(), None),
        }

    for rank, found in enumerate(run_ranks(4, worker)):
        for case, (kind, message) in found.items():
            expected = "ok" if case.startswith("right") else "ValueError"
            assert kind == expected, f"rank {rank}, {case}: {kind} {message}"
        said(found["two-dimensional replicate_mesh"][1], "one dimension", "shard=2", '["replicate"]')
        for case in ("native HSDP", "native HSDP without a replicate_mesh"):
            said(found[case][1], "fully_shard", "Replicate", '["shard"]')
        for case in ("overlap: the shard mesh itself", "overlap: shards over everybody"):
            said(found[case][1], "replicate_mesh", "shard", "overlap")


DIFFERENCES = [
    "tau",
    "lr",
    "max_local_steps",
    "group lr",
    "local_update",
    "extra parameter",
    "shape",
    "order",
    "name",
]
DIFFERENCES += ["algorithm", "dtype", "precision of products"]


@pytest.mark.parametrize("what", DIFFERENCES)
def test_replicas_built_differently_all_raise_at_the_first_step(what: str) -> None:
    def worker() -> Any:
        replicate, mesh = grid(2, 2)
        found = []
        for odd in range(2):  # which replica is the odd one out
            mine = replicate.get_local_rank() == odd
            matrices = {"a": (4, 6), "b": (6, 4)}
            options: dict[str, Any] = {"lr": 0.01, "tau": 0.1}
            if mine and what == "extra parameter":
                matrices["c"] = (4, 4)
            if mine and what == "shape":
                matrices["a"] = (4, 8)
            if mine and what == "name":
                matrices = {"a": (4, 6), "c": (6, 4)}
            if mine and what == "order":
                matrices = dict(reversed(matrices.items()))
            if mine and what in ("tau", "lr", "max_local_steps", "local_update"):
                options[what] = {"tau": 0.2, "lr": 0.011, "max_local_steps": 7, "local_update": "dion"}[what]
            dtype = torch.float64 if mine and what == "dtype" else torch.float32
            toy = Toy(mesh, matrices=matrices, dense={"norm": (6,)}, dtype=dtype)
            groups = toy.groups("lion" if mine and what == "algorithm" else "adamw")
            if mine and what == "group lr":
                groups[1]["lr"] = 0.5
            opt = CurvaDion(groups, replicate_mesh=replicate, **options)
            torch.set_float32_matmul_precision("high" if mine and what.startswith("precision") else "highest")
            toy.set_gradients(0, 0)
            before = [local(param).detach().clone() for param in toy.params.values()]
            result = outcome(opt.step)
            untouched = all(
                torch.equal(local(param), value)
                for param, value in zip(toy.params.values(), before, strict=True)
            )
            found.append((result, untouched))
        return gathered(found)

    for found in run_ranks(4, worker)[0]:
        for (kind, message), untouched in found:
            assert kind == "ReplicaMismatchError", f"{what}: every rank must raise, got {kind}: {message}"
            assert untouched, f"{what}: nothing may change"
            said(message, "same options", "list of parameters", "compare")
    assert issubclass(ReplicaMismatchError, RuntimeError)


def test_a_rank_that_is_a_step_behind_is_found() -> None:
    """A resume that loads different checkpoints on different replicas."""

    def worker() -> tuple[str, str]:
        replicate, mesh = grid(2, 2)
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(), lr=0.0, weight_decay=0.0, replicate_mesh=replicate)
        if replicate.get_local_rank() == 1:
            for state in opt.state.values():
                state["step"] += 1
        return outcome(lambda: opt.load_state_dict(opt.state_dict()))

    for kind, message in run_ranks(4, worker):
        assert kind == "ValueError", f"got {kind}: {message}"
        said(message, "same checkpoint", "steps")


def test_the_process_group_need_not_be_the_whole_world() -> None:
    def worker() -> int:
        group = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
        return CurvaDion([matrix()], replicate_mesh=group).replicas

    assert run_ranks(4, worker) == [2] * 4


def test_a_group_of_which_this_rank_is_no_member() -> None:
    def worker() -> tuple[str, str]:
        group = dist.new_group([0, 1])
        return outcome(lambda: CurvaDion([matrix()], replicate_mesh=group))

    found = run_ranks(3, worker)
    assert [kind for kind, _ in found[:2]] == ["ok", "ok"]
    assert found[2][0] in ("ValueError", "TypeError"), "dist.new_group gives non-members a placeholder"
    said(found[2][1], "replicate_mesh")


def test_placements_the_optimizer_cannot_read_are_refused_by_name() -> None:
    def worker() -> tuple[str, str]:
        _, mesh = grid(1, 2)
        toy = Toy(mesh, matrices={"blocks.0.weight": (4, 6)}, dense={"conv.weight": (4, 2, 2)})
        return outcome(lambda: CurvaDion([{"params": [(n, p)]} for n, p in toy.params.items()]))

    for kind, message in run_ranks(2, worker):
        assert kind == "ValueError"
        said(message, "conv.weight")


# ---- presets, and a gate that only the bounds ask


def test_a_preset_takes_changes() -> None:
    changed = LOW_COMMUNICATION(max_local_steps=15, outer_bits=2)
    assert (changed["max_local_steps"], changed["outer_bits"], changed["momentum"]) == (15, 2, 0.8)
    assert LOW_COMMUNICATION["max_local_steps"] == 7, "the preset itself is as it was"
    optimizer = CurvaDion([nn.Parameter(torch.ones(4, 3))], **LOW_COMMUNICATION(max_local_steps=2))
    synchronized = []
    for _ in range(7):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 3)
        optimizer.step()
        synchronized.append(bool(optimizer.metrics()["curvadion/synchronized"]))
    assert [step for step, s in enumerate(synchronized) if s] == [0, 3, 6], (
        "nothing else has to be kept in step with it"
    )


@pytest.mark.parametrize(
    ("preset", "most"),
    [(LOW_COMMUNICATION_KEPT, 0.009), (LOWER_COMMUNICATION, 0.004), (LOWEST_COMMUNICATION, 0.001)],
)
def test_presets_of_fewer_bytes_are_as_rare_as_they_say(preset: Mapping[str, Any], most: float) -> None:
    """Bits there and back, with K replicas each way (K - 1) / K of the parameters, against bf16 there and
    back."""
    bits = bits_per_value(preset["outer_bits"])
    assert bits / 16 / (preset["max_local_steps"] + 1) <= most
    opt = CurvaDion([nn.Parameter(torch.ones(4, 3))], **preset)
    assert opt.param_groups[0]["nesterov"] and "outer_residual_kept" in preset


def test_a_preset_refuses_what_is_no_option() -> None:
    with pytest.raises(TypeError, match="got 'max_local_step'; did you mean 'max_local_steps'"):
        LOW_COMMUNICATION(max_local_step=15)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gate_every": None}, "gate_every=None asks only where max_local_steps synchronizes"),
        (
            {"gate_every": None, "max_local_steps": 3, "target_sync_rate": 0.5},
            "target_sync_rate needs a gate that is asked",
        ),
        ({"gate_every": None, "max_local_steps": 3, "gate_lag": 1}, "gate_lag needs a gate that is asked"),
        ({"gate_every": 0}, "gate_every must be None or an integer >= 1"),
        ({"gate": "rmcc"}, "gate must be one of 'rmmc', 'drift'.*; got 'rmcc'"),
        ({"outer_bits": 3, "consensus": "outer"}, "outer_bits must be one of 32, 16, 8, 4, 2, 1"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CurvaDion([nn.Parameter(torch.ones(4, 3))], **options)
