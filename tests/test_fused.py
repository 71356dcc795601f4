"""Weights that are several matrices, and others that structure tells, in stand-ins for the modules of
libraries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from curvadion import CurvaDion, assert_routing, param_groups_for

WIDTH, HEADS, KEYS, HEAD = 8, 4, 2, 2


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class Conv1D(nn.Module):
    """As in transformers: weight in x out."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = weight(inputs, outputs), weight(outputs)


class GPT2Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split_size = WIDTH
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)


class Attention(nn.Module):
    """As in timm and ModernBERT; with head_first q, k and v of each head are neighbours."""

    def __init__(self, name: str, **attributes: Any) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(WIDTH, 3 * WIDTH))
        vars(self).update(attributes)


class Phi3Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=HEADS)
        self.num_key_value_heads, self.head_dim = KEYS, HEAD
        self.qkv_proj = nn.Linear(WIDTH, (HEADS + 2 * KEYS) * HEAD)


class GPTNeoXAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)


class Experts(nn.Module):
    """As transformers marks them."""

    def __init__(self, **attributes: bool) -> None:
        super().__init__()
        vars(self).update(attributes)
        turned = attributes.get("is_transposed", False)
        self.gate_up_proj = weight(3, WIDTH, 12) if turned else weight(3, 12, WIDTH)
        self.down_proj = weight(3, 6, WIDTH) if turned else weight(3, WIDTH, 6)


class GroupedExperts(nn.Module):
    """As in torchtitan, by the names of its releases."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, weight(3, 6, WIDTH))


IN_OUT = {"weight_layout": "in_out"}
PLAIN: dict[str, Any] = {}
EXPERTS = {"batch_dims": 1}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.MultiheadAttention(WIDTH, 2), {"in_proj_weight": {"splits": 3}, "out_proj.weight": PLAIN}),
        (GPT2Attention(), {"c_attn.weight": {"splits": 3, **IN_OUT}, "c_proj.weight": IN_OUT}),
        (Attention("qkv"), {"qkv.weight": {"splits": 3}}),
        (Attention("Wqkv"), {"Wqkv.weight": {"splits": 3}}),
        (Attention("qkv", head_first=True), {"qkv.weight": PLAIN}),
        (Phi3Attention(), {"qkv_proj.weight": {"splits": (8, 4, 4)}}),
        (GPTNeoXAttention(), {"query_key_value.weight": PLAIN}),
        (nn.ModuleDict({"gate_up_proj": nn.Linear(WIDTH, 12)}), {"gate_up_proj.weight": {"splits": 2}}),
        (
            Experts(is_transposed=False, has_gate=True, is_concatenated=True),
            {"gate_up_proj": {"splits": 2, **EXPERTS}, "down_proj": EXPERTS},
        ),
        (
            Experts(is_transposed=True, has_gate=True, is_concatenated=False),
            {"gate_up_proj": {**EXPERTS, **IN_OUT}, "down_proj": {**EXPERTS, **IN_OUT}},
        ),
        (GroupedExperts(("w1", "w2", "w3")), dict.fromkeys(("w1", "w2", "w3"), EXPERTS)),
        (GroupedExperts(("w1_EFD", "w2_EDF")), dict.fromkeys(("w1_EFD", "w2_EDF"), EXPERTS)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_which_matrices_a_weight_is(module: nn.Module, expected: dict[str, dict[str, Any]]) -> None:
    # An embedding before, a head after them: as in a model.
    model = nn.ModuleDict(
        {"embed": nn.Embedding(50, WIDTH), "blocks": nn.ModuleList([module]), "head": nn.Linear(WIDTH, 50)}
    )
    groups = param_groups_for(model)
    opt = CurvaDion(groups, local_update="muon", max_local_steps=3)  # takes them so
    for name, options in expected.items():
        group = next(g for g in opt.param_groups if f"blocks.0.{name}" in g["param_names"])
        usual = {"algorithm": "dion", "weight_layout": "out_in", "batch_dims": 0, "splits": None}
        assert {key: group[key] for key in usual} == usual | options, name


def test_experts_of_unknown_layout_are_refused_with_what_to_write() -> None:
    with pytest.raises(ValueError, match='"batch_dims": 1') as refused:
        param_groups_for(Experts())
    assert 'gate_up_proj$": "adamw"' in str(refused.value)
    options = {"algorithm": "dion", "batch_dims": 1}
    [group] = param_groups_for(Experts(), overrides={"proj": options})
    assert group["batch_dims"] == 1
    opt = CurvaDion([group])
    assert_routing(opt, {"gate_up_proj": "dion"})
    assert [row.block for row in opt.explain()] == ["[0]", "[1]", "[2]"] * 2


def test_an_override_leaves_a_fused_projection_whole() -> None:
    attention = nn.MultiheadAttention(WIDTH, 2)
    groups = param_groups_for(attention, overrides={"in_proj_weight": {"splits": None}})
    assert next(g for g in groups if g["params"][0][0] == "in_proj_weight")["splits"] is None


def test_biases_of_experts_are_biases() -> None:
    class Biased(GroupedExperts):
        def __init__(self) -> None:
            super().__init__(("mlp1_weight_EGD",))
            self.mlp1_bias_EG = weight(3, 6)
            self.gate_up_proj_bias = weight(3, 6)

    groups = {name: group for group in param_groups_for(Biased()) for name, _ in group["params"]}
    for name in ("mlp1_bias_EG", "gate_up_proj_bias"):
        assert (groups[name]["algorithm"], groups[name]["weight_decay"]) == ("adamw", 0.0)
    assert groups["mlp1_weight_EGD"]["batch_dims"] == 1


@pytest.mark.parametrize("last", ["proj_out", "fc", "final_layer.linear"])
def test_the_last_layer_is_an_output_layer_also_where_its_outputs_are_as_many_as_its_inputs(
    last: str,
) -> None:
    """As in diffusion over pixels: patches of 16 x 16 x 3 in a model of width 768."""
    blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
    layer: nn.Module = nn.Linear(WIDTH, WIDTH)
    for word in reversed(last.split(".")[1:]):
        layer = nn.ModuleDict({word: layer, "adaLN": nn.Linear(WIDTH, 2 * WIDTH)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(*blocks)]), last.split(".")[0]: layer})
    groups = {name: group["name"] for group in param_groups_for(model) for name, _ in group["params"]}
    assert groups[f"{last}.weight"] == "head"
    assert groups["blocks.0.1.weight"] == "matrices"
    assert groups.get("final_layer.adaLN.weight", "matrices") == "matrices"
