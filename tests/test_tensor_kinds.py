"""Which kinds of tensors may be parameters and gradients; the others are refused before anything moves, by a
message that names the rule, what was got and what to try."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from support.models import grid, outcome
from support.ranks import run_ranks
from support.wrapped import Wrapped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from curvadion import LOW_COMMUNICATION, CurvaDion, param_groups_for

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*prototype stage", "ignore:Sparse .* tensor support is in beta"
)


class Named(Tensor):
    """A tensor of another class that has memory like any other."""


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)


DENSE, REAL = "parameters must be dense", "parameters must be real floating-point tensors"
ONCE = "parameters must not repeat elements"
ONES: Callable[[], Tensor] = lambda: torch.ones(4, 3)  # noqa: E731
# How it is made, what a trained one is told as a matrix and in a group of AdamW; nothing: it is trained.
KINDS: dict[str, tuple[Callable[[], Tensor], str, str]] = {
    "float64": (lambda: ONES().double(), "", ""),
    "bfloat16": (lambda: ONES().bfloat16(), "", ""),
    "float16": (lambda: ONES().half(), "", "second moment must not be float16"),
    "transposed": (lambda: torch.ones(3, 4).T, "", ""),
    "every other column": (lambda: torch.ones(4, 6)[:, ::2], "", ""),
    "of another class": (lambda: ONES().as_subclass(Named), "", ""),
    "no dimensions": (lambda: torch.ones(()), "must have two dimensions", ""),
    "no elements": (lambda: torch.ones(0, 3), "must have elements", ""),
    "no elements, expanded": (lambda: torch.ones(0, 1).expand(0, 3), "must have elements", ""),
    "expanded": (
        lambda: torch.ones(1, 3).expand(4, 3),
        "must not repeat elements",
        "must not repeat elements",
    ),
    "sparse_coo": (lambda: ONES().to_sparse(), DENSE, DENSE),
    "sparse_csr": (lambda: ONES().to_sparse_csr(), DENSE, DENSE),
    "jagged": (jagged, DENSE, DENSE),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), DENSE, DENSE),
    "a wrapper": (lambda: Wrapped(ONES()), "", ""),
    "a wrapper of two": (lambda: Wrapped(ONES(), torch.ones(3)), DENSE, DENSE),
    "a wrapper of few bits": (lambda: Wrapped(ONES().to(torch.int8), dtype=torch.float32), DENSE, DENSE),
    "a wrapper of a wrapper": (lambda: Wrapped(Wrapped(ONES())), DENSE, DENSE),
    "a wrapper of sparse": (lambda: Wrapped(ONES().to_sparse()), DENSE, DENSE),
    "masked": (lambda: torch.masked.masked_tensor(ONES(), ONES() > 0), DENSE, DENSE),
    "mkldnn": (lambda: ONES().to_mkldnn(), DENSE, DENSE),
    "complex": (lambda: ONES().to(torch.complex64), REAL, REAL),
    "float8": (lambda: ONES().to(torch.float8_e4m3fn), REAL, REAL),
}
FROZEN: dict[str, Callable[[], Tensor]] = {
    "int64": lambda: ONES().long(),
    "uint8": lambda: ONES().to(torch.uint8),
    "bool": lambda: ONES().bool(),
    "quantized": lambda: torch.quantize_per_tensor(ONES(), 0.1, 0, torch.qint8),
    "float4": lambda: torch.zeros(4, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    **{kind: make for kind, (make, *_) in KINDS.items()},
}


def group(name: str, p: Tensor, algorithm: str) -> dict[str, Any]:
    return {"params": [(name, p)], "algorithm": algorithm}


@pytest.mark.parametrize("algorithm", ["dion", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_of_this_kind_is_trained_or_refused_at_construction(kind: str, algorithm: str) -> None:
    make, *told = KINDS[kind]
    said = told[algorithm == "adamw"]
    p = nn.Parameter(make())
    if said:
        with pytest.raises((ValueError, TypeError), match=rf"{said}.*; got .*block\.w.*; ") as caught:
            CurvaDion([group("block.w", p, algorithm)])
        assert caught.traceback[-1].path.match("*/curvadion/state/*.py"), "not torch's own"
        return
    opt = CurvaDion([group("block.w", p, algorithm)], weight_decay=0.0)
    same = nn.Parameter(make().contiguous().double())
    of_same = CurvaDion([group("block.w", same, algorithm)], weight_decay=0.0)
    for x, o in ((p, opt), (same, of_same)):
        x.grad = torch.ones_like(x)
        o.step()
    assert (not p.numel() or not torch.equal(p, make())) and torch.equal(
        p.double(), same.to(p.dtype).double()
    )


@pytest.mark.parametrize("algorithm", ["dion", "adamw"])
@pytest.mark.parametrize("kind", FROZEN)
def test_a_frozen_parameter_of_any_kind_is_left_alone(kind: str, algorithm: str) -> None:
    """As weights in few bits that adapters are trained beside."""
    frozen = nn.Parameter(FROZEN[kind](), requires_grad=False)
    trained = nn.Parameter(ONES())
    opt = CurvaDion([{"params": [("frozen", frozen), ("trained", trained)], "algorithm": algorithm}])
    trained.grad = ONES()
    opt.step()
    opt.synchronize()
    opt.load_state_dict(opt.state_dict())
    opt.explain()
    assert list(opt.state) == [trained]


@pytest.mark.parametrize("kind", [kind for kind, (_, said, _) in KINDS.items() if said])
def test_what_would_be_refused_is_so_when_it_is_to_be_trained_again(kind: str) -> None:
    make, said, _ = KINDS[kind]
    frozen, trained = nn.Parameter(make(), requires_grad=False), nn.Parameter(ONES())
    opt = CurvaDion([("frozen", frozen), ("trained", trained)])
    trained.grad = ONES()
    opt.step()
    frozen.requires_grad_()
    with pytest.raises((ValueError, TypeError), match=rf"{said}.*; got frozen.*; "):
        opt.synchronize()
    frozen.requires_grad_(False)
    opt.synchronize()
    opt.step()


def test_parameters_without_a_shape_are_refused() -> None:
    layer = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="must have a shape; got weight, .*; run a batch through the model"):
        CurvaDion(layer.named_parameters())
    layer(torch.ones(2, 4))
    CurvaDion([("weight", layer.weight)])


def test_layers_in_few_bits_need_no_place_in_the_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    opt = CurvaDion(param_groups_for(model))
    assert all(p is not model[0].weight for group in opt.param_groups for p in group["params"])


def test_a_shard_of_a_kind_that_is_no_parameter_is_refused() -> None:
    def worker() -> str:
        _, mesh = grid(1, 2)
        shard = DTensor.from_local(Wrapped(ONES(), ONES()), mesh, [Shard(0)], run_check=False)
        return outcome(lambda: CurvaDion([("w", nn.Parameter(shard))]))[1]

    for message in run_ranks(2, worker):
        assert message.startswith(DENSE) and "got w, a Wrapped" in message


# What a gradient of ones and twos is made, by kind; and whether it is taken.
GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "expanded": (lambda g: g[:1].clone().expand(g.shape), True),
    "transposed": (lambda g: g.T.contiguous().T, True),
    "of another class": (lambda g: g.as_subclass(Named), True),
    "sparse_coo": (lambda g: g.to_sparse(), False),
    "a wrapper": (Wrapped, True),
    "a wrapper of two": (lambda g: Wrapped(g, g), False),
    "masked": (lambda g: torch.masked.masked_tensor(g, g > 0), False),
}


@pytest.mark.parametrize("where", ["on one rank", "on all ranks"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gradient_of_this_kind_is_taken_or_refused_on_all_ranks_alike(kind: str, where: str) -> None:
    """With a GradScaler, in the first step, in a local one and in one that is synchronized."""
    make, taken = GRADIENTS[kind]

    def worker() -> Any:
        replicate, _ = grid(2, 1)
        here = where == "on all ranks" or replicate.get_local_rank() == 1
        ended = []
        for bad_step in range(3):
            params = [nn.Parameter(ONES()), nn.Parameter(ONES())]
            groups = [group("w", params[0], "dion"), group("v", params[1], "adamw")]
            options = LOW_COMMUNICATION(max_local_steps=1, gate_every=1)
            opt = CurvaDion(groups, replicate_mesh=replicate, check_every=0, **options)
            for step in range(bad_step + 1):
                for p in params:
                    p.grad = torch.ones_like(p) * (1 + replicate.get_local_rank())
                if here and step == bad_step:
                    params[1].grad = make(params[1].grad)
                before = [p.detach().clone() for p in params]
                ended.append((step == bad_step, *outcome(opt.step), list(map(torch.equal, before, params))))
        return ended, here

    for ended, here in run_ranks(2, worker):
        for last, error, message, untouched in ended:
            assert (error == "ok") == (taken or not last), message
            assert untouched == [error != "ok"] * 2
            if error != "ok":
                assert ("a gradient must be dense" in message) == here == ("'v'" in message), message


@pytest.mark.parametrize("kind", [kind for kind, (_, taken) in GRADIENTS.items() if taken])
def test_a_gradient_of_this_kind_is_worth_what_it_holds(kind: str) -> None:
    """Also what a GradScaler has multiplied."""
    results = []
    for make in (GRADIENTS[kind][0], torch.clone):
        params = [nn.Parameter(ONES()), nn.Parameter(ONES())]
        opt = CurvaDion([group("w", params[0], "dion"), group("v", params[1], "adamw")])
        for scale in (1.0, 4.0):
            for p in params:
                p.grad = make(torch.tensor([[1.0, 2.0, 3.0]]).expand(4, 3) * scale)
            opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.zeros(1)  # type: ignore[attr-defined]
            opt.step()
        results.append([p.detach() for p in params])
    assert all(map(torch.equal, *results))


def test_a_gradient_on_its_way_from_other_ranks_is_waited_for() -> None:
    """As functional collectives return it, of which FSDP2 and DTensor know nothing."""

    def worker() -> list[Tensor]:
        _, mesh = grid(1, 2)
        params = [nn.Parameter(ONES()), nn.Parameter(ONES())]
        opt = CurvaDion([group("w", params[0], "dion"), group("v", params[1], "adamw")])
        for p in params:
            p.grad = funcol.all_reduce((1 + mesh.get_local_rank()) * ONES(), "sum", mesh.get_group())
            assert type(p.grad) is not Tensor
        opt.step()
        return [p.detach() for p in params]

    params = [nn.Parameter(ONES()), nn.Parameter(ONES())]
    opt = CurvaDion([group("w", params[0], "dion"), group("v", params[1], "adamw")])
    for p in params:
        p.grad = 3 * ONES()
    opt.step()
    for found in run_ranks(2, worker):
        assert all(map(torch.equal, found, params))


def test_parameters_are_replaced_beside_a_frozen_one_without_a_shape() -> None:
    frozen, p, q = (
        nn.Parameter(KINDS["nested"][0](), requires_grad=False),
        *map(nn.Parameter, (ONES(), ONES())),
    )
    opt = CurvaDion([("frozen", frozen), ("w", p)])
    opt.param_groups[0]["params"][1] = q
    q.grad = ONES()
    opt.step()
    assert torch.equal(p, ONES()) and not torch.equal(q, ONES())
