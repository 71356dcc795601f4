"""param_groups_for on the models that people bring: where every parameter goes, what overrides it, what is
refused."""

from __future__ import annotations

import re
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from curvadion.param_groups import param_groups_for

WIDTH, HIDDEN, VOCABULARY = 8, 24, 50


class LlamaBlock(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width)
        self.w1 = nn.Linear(width, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, width, bias=False)


class Llama(nn.Module):
    """torchtitan's and Llama's own names: tok_embeddings, layers, norm, output."""

    def __init__(self, vocabulary: int = VOCABULARY, head: str = "output", blocks: int = 2) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(LlamaBlock() for _ in range(blocks))
        self.norm = nn.RMSNorm(WIDTH)
        self.add_module(head, nn.Linear(WIDTH, vocabulary, bias=False))


class GPT2(nn.Module):
    """nanoGPT's tree, with biases, learned positions and a tied head."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(16, WIDTH),
                "h": nn.ModuleList(GPT2Block() for _ in range(2)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.transformer["wte"].weight = self.lm_head.weight


class GPT2Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(WIDTH, 3 * WIDTH), "c_proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})


def placed(groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Group names with the names of their parameters."""
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def options(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Group names with everything but their parameters."""
    return {
        group["name"]: {k: v for k, v in group.items() if k not in ("name", "params")} for group in groups
    }


def heads(model: nn.Module | list[nn.Module]) -> list[str]:
    return placed(param_groups_for(model)).get("head", [])


def test_llama_groups_and_options() -> None:
    groups = param_groups_for(Llama(), adamw_lr=0.005)
    assert placed(groups) == {
        "matrices": [f"layers.{i}.{name}.weight" for i in range(2) for name in ("wqkv", "wo", "w1", "w2")],
        "embeddings": ["tok_embeddings.weight"],
        "head": ["output.weight"],
        "norms_and_biases": [
            f"layers.{i}.{name}_norm.weight" for i in range(2) for name in ("attention", "ffn")
        ]
        + ["norm.weight"],
    }
    assert options(groups) == {
        "matrices": {"algorithm": "dion"},
        "embeddings": {"algorithm": "adamw", "lr": 0.005, "weight_decay": 0.0},
        "head": {"algorithm": "adamw", "lr": 0.005},
        "norms_and_biases": {"algorithm": "adamw", "lr": 0.005, "weight_decay": 0.0},
    }


def test_every_trainable_parameter_once_and_nothing_printed(capfd: pytest.CaptureFixture[str]) -> None:
    model = GPT2(tied=False)
    members = [pair for group in param_groups_for(model) for pair in group["params"]]
    assert capfd.readouterr() == ("", "")
    assert len(members) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    assert all(named[name] is parameter for name, parameter in members)


def test_torch_accepts_the_groups_as_named_parameters() -> None:
    groups = param_groups_for(Llama())
    names = list(placed(groups).values())  # before torch takes the names out of the groups
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    assert [group["param_names"] for group in optimizer.param_groups] == names
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 3e-3, 3e-3, 3e-3]


def test_tied_head_is_an_embedding() -> None:
    groups = placed(param_groups_for(GPT2()))
    assert "head" not in groups
    # named_parameters() gives a tied parameter the name it meets first.
    assert groups["embeddings"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(".h." in name for name in groups["matrices"])


def test_head_registered_before_the_embedding_it_is_tied_to() -> None:
    model = nn.Module()
    model.decoder = nn.Linear(WIDTH, VOCABULARY)
    model.embed = nn.Embedding(VOCABULARY, WIDTH)
    model.embed.weight = model.decoder.weight
    assert placed(param_groups_for(model)) == {
        "embeddings": ["decoder.weight"],
        "norms_and_biases": ["decoder.bias"],
    }


def test_untied_gpt2() -> None:
    groups = placed(param_groups_for(GPT2(tied=False)))
    assert groups["head"] == ["lm_head.weight"]
    assert groups["embeddings"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert len(groups["matrices"]) == 8


@pytest.mark.parametrize(
    "name", ["lm_head", "head", "output", "output_layer", "embed_out", "unembed", "score"]
)
def test_head_by_name(name: str) -> None:
    assert heads(Llama(head=name)) == [f"{name}.weight"]


def test_head_by_name_of_another_size_than_the_vocabulary() -> None:
    model = Llama()
    model.output = None
    model.classifier = nn.Linear(WIDTH, 3)
    assert heads(model) == ["classifier.weight"]


def test_head_inside_a_sequential_of_that_name() -> None:
    model = Llama()
    model.output = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 7))
    assert heads(model) == ["output.1.weight"]


def test_names_inside_blocks_do_not_make_a_head() -> None:
    """BERT calls the second half of every block `output`."""
    model = Llama()
    for block in model.layers:
        block.output = nn.Linear(WIDTH, WIDTH)
    groups = placed(param_groups_for(model))
    assert groups["head"] == ["output.weight"]
    assert "layers.0.output.weight" in groups["matrices"]


class Getter(Llama):
    """A Hugging Face model: it says itself which module is the head."""

    def __init__(self, module: str | None) -> None:
        super().__init__(head="to_vocabulary")
        self.other = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.module = module

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.module is None else self.get_submodule(self.module)


@pytest.mark.parametrize("name", ["to_vocabulary", "other"])
def test_head_by_get_output_embeddings(name: str) -> None:
    assert heads(Getter(name)) == [f"{name}.weight"]
    assert "to_vocabulary.weight" in str(placed(param_groups_for(Getter("other")))["matrices"])


def test_get_output_embeddings_that_returns_none_leaves_the_search_open() -> None:
    assert heads(Getter(None)) == ["other.weight"]


def test_get_output_embeddings_that_returns_the_tied_head() -> None:
    model = Getter("to_vocabulary")
    model.to_vocabulary.weight = model.tok_embeddings.weight
    groups = placed(param_groups_for(model))
    assert groups["embeddings"] == ["tok_embeddings.weight"]
    assert "head" not in groups


def test_get_output_embeddings_behind_a_wrapper() -> None:
    model = nn.Module()
    model.module = Getter("to_vocabulary")
    assert heads(model) == ["module.to_vocabulary.weight"]


def test_head_by_vocabulary_when_nothing_names_it() -> None:
    assert heads(Llama(head="to_vocabulary")) == ["to_vocabulary.weight"]


def test_head_by_vocabulary_away_from_the_embedding() -> None:
    model = nn.ModuleDict(
        {
            "inputs": nn.ModuleDict({"tokens": nn.Embedding(VOCABULARY, WIDTH)}),
            "blocks": nn.ModuleList(LlamaBlock() for _ in range(2)),
            "readout": nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)),
        }
    )
    assert heads(model) == ["readout.1.weight"]


def test_head_by_vocabulary_with_a_frozen_embedding() -> None:
    model = Llama(head="to_vocabulary")
    model.tok_embeddings.requires_grad_(False)
    groups = placed(param_groups_for(model))
    assert groups["head"] == ["to_vocabulary.weight"]
    assert "embeddings" not in groups


@pytest.mark.parametrize("head", ["output", "to_vocabulary"])
def test_byte_level_model_whose_vocabulary_is_its_width(head: str) -> None:
    """Every linear layer has the head's shape; only where it stands tells."""
    groups = placed(param_groups_for(Llama(vocabulary=WIDTH, head=head)))
    assert groups["head"] == [f"{head}.weight"]
    assert len(groups["matrices"]) == 8


def test_byte_level_model_with_the_head_away_from_the_embedding() -> None:
    model = nn.ModuleDict(
        {
            "inputs": nn.ModuleDict({"tokens": nn.Embedding(WIDTH, WIDTH)}),
            "blocks": nn.ModuleList(LlamaBlock() for _ in range(2)),
            "readout": nn.ModuleDict({"projection": nn.Linear(WIDTH, WIDTH)}),
        }
    )
    assert heads(model) == ["readout.projection.weight"]


def test_byte_level_model_whose_head_is_registered_first() -> None:
    model = nn.Module()
    model.to_bytes = nn.Linear(WIDTH, WIDTH)
    model.tokens = nn.Embedding(WIDTH, WIDTH)
    model.mixer = nn.ModuleDict({"up": nn.Linear(WIDTH, HIDDEN), "down": nn.Linear(HIDDEN, WIDTH)})
    assert heads(model) == ["to_bytes.weight"]


def test_byte_level_model_that_multiplies_by_the_embedding_has_no_head() -> None:
    """`F.linear(x, embedding.weight)` leaves no module behind, and the last block's matrices are no head."""
    model = Llama(vocabulary=WIDTH)
    model.output = None
    groups = placed(param_groups_for(model))
    assert "head" not in groups
    assert len(groups["matrices"]) == 8


def nested_perceptron() -> nn.Module:
    """Of widths that divide each other, so that no width alone tells what takes the last layer's outputs."""
    hidden = lambda inputs: nn.Sequential(nn.Linear(inputs, 8), nn.ReLU())  # noqa: E731
    return nn.Sequential(hidden(4), hidden(8), nn.Sequential(nn.Linear(8, 16), nn.Softmax(-1)))


def perceptron(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def perceptron_of_named_layers() -> nn.Module:
    return Plain(lin1=linear(12, 24), norm=nn.LayerNorm(24), lin2=linear(24, 24), lin3=linear(24, 5))


CHAINS: dict[str, tuple[Any, list[str]]] = {
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), ["2.weight"]),
    "an activation at the end": (
        lambda: nn.Sequential(linear(4, 8), nn.Tanh(), linear(8, 3), nn.Sigmoid()),
        ["2.weight"],
    ),
    "equal widths": (lambda: nn.Sequential(linear(8, 8), nn.ReLU(), linear(8, 8)), ["2.weight"]),
    "an autoencoder": (lambda: nn.Sequential(linear(8, 3), nn.ReLU(), linear(3, 8)), ["2.weight"]),
    "nested": (nested_perceptron, ["2.0.weight"]),
    "compiled": (
        lambda: torch.compile(nn.Sequential(linear(4, 8), nn.ReLU(), linear(8, 16))),
        ["_orig_mod.2.weight"],
    ),
    "inside a module": (
        lambda: Plain(net=nn.Sequential(nn.Flatten(), linear(4, 8), nn.ReLU(), linear(8, 16))),
        ["net.3.weight"],
    ),
    "a list": (
        lambda: Plain(layers=nn.ModuleList([linear(4, 8), linear(8, 8), linear(8, 16)])),
        ["layers.2.weight"],
    ),
    "named layers": (perceptron_of_named_layers, ["lin3.weight"]),
    "a bag of words": (lambda: Plain(bag=nn.EmbeddingBag(30, 8), out=linear(8, 16)), ["out.weight"]),
    "of words and layers": (
        lambda: nn.Sequential(nn.Embedding(30, 8), linear(8, 8), nn.ReLU(), linear(8, 4)),
        ["3.weight"],
    ),
    "heads side by side": (
        lambda: Plain(trunk=nn.Sequential(linear(8, 32), linear(32, 32)), pi=linear(32, 5), v=linear(32, 1)),
        ["pi.weight", "v.weight"],
    ),
    "actor and critic": (
        lambda: Plain(actor=perceptron(8, 32, 32, 5), critic=perceptron(8, 32, 32, 1)),
        ["actor.2.weight", "critic.2.weight"],
    ),
    "a dueling network": (
        lambda: Plain(
            features=perceptron(8, 32, 32), advantage=perceptron(32, 16, 5), value=perceptron(32, 16, 1)
        ),
        ["advantage.1.weight", "value.1.weight"],
    ),
    "encoder and decoder": (
        lambda: Plain(encoder=perceptron(20, 16, 4), decoder=perceptron(4, 16, 20)),
        ["decoder.1.weight"],
    ),
    "mean and variance on the way": (
        lambda: Plain(
            fc1=linear(20, 16), mu=linear(16, 4), var=linear(16, 4), up=linear(4, 16), to=linear(16, 27)
        ),
        ["to.weight"],
    ),
    # What may be a block around which x goes on: nothing tells.
    "a block's two layers": (lambda: mlp(8), []),
    "a block's two layers in a sequential": (
        lambda: Plain(net=nn.Sequential(linear(8, 32), linear(32, 8))),
        [],
    ),
    "an attention": (lambda: attention(8), []),
    "a gated block": (lambda: swiglu(8), []),
    "two towers": (lambda: Plain(image=linear(12, 6), text=linear(10, 6)), []),
    "one layer": (lambda: nn.Linear(4, 2), []),
    "blocks of two parts": (
        lambda: Plain(tokens=perceptron(9, 32, 9), channels=perceptron(8, 32, 8)),
        [],
    ),
    "parts that end in a norm": (
        lambda: Plain(a=perceptron(4, 8, 6), b=perceptron(6, 12, 9), norm=nn.LayerNorm(9)),
        [],
    ),
    "grouped queries": (
        lambda: Plain(q=linear(16, 16), k=linear(16, 8), v=linear(16, 8), o=linear(16, 16)),
        [],
    ),
    "ends in a norm": (lambda: nn.Sequential(linear(4, 8), linear(8, 6), nn.LayerNorm(6)), []),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_the_last_of_layers_that_feed_each_other_is_a_head(chain: str) -> None:
    make, wanted = CHAINS[chain]
    groups = placed(param_groups_for(make()))
    assert groups.get("head", []) == wanted
    assert groups.get("matrices") or chain == "a bag of words"


@pytest.mark.parametrize("vocabulary", [WIDTH, VOCABULARY])
def test_sequential_toy(vocabulary: int) -> None:
    model = nn.Sequential(
        nn.Embedding(vocabulary, WIDTH),
        LlamaBlock(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, vocabulary, bias=False),
    )
    groups = placed(param_groups_for(model))
    assert groups["embeddings"] == ["0.weight"]
    assert groups["head"] == ["4.weight"]
    assert groups["matrices"] == [f"1.{name}.weight" for name in ("wqkv", "wo", "w1", "w2")] + ["2.weight"]


def test_sequential_toy_inside_a_module() -> None:
    model = nn.Module()
    model.net = nn.Sequential(nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    assert heads(model) == ["net.2.weight"]


def test_multihead_attention() -> None:
    same = nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True)
    assert placed(param_groups_for(same)) == {
        "matrices": ["out_proj.weight"],
        "matrices split in 3": ["in_proj_weight"],
        "norms_and_biases": ["in_proj_bias", "bias_k", "bias_v", "out_proj.bias"],
    }
    separate = nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=4, bias=False)
    assert placed(param_groups_for(separate)) == {
        "matrices": ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    }


def test_torch_transformer_encoder() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN)
    groups = placed(param_groups_for(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)))
    assert set(groups) == {"matrices", "matrices split in 3", "norms_and_biases"}
    assert len(groups["matrices"]) == 2 * 3 and len(groups["matrices split in 3"]) == 2


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d])
def test_convolutions(kind: type[nn.Module]) -> None:
    model = nn.Sequential(OrderedDict(stem=kind(3, WIDTH, 3), mix=nn.Linear(WIDTH, WIDTH)))
    groups = param_groups_for(model)
    assert placed(groups) == {
        "matrices": ["mix.weight"],
        "convolutions": ["stem.weight"],
        "norms_and_biases": ["stem.bias", "mix.bias"],
    }
    assert options(groups)["convolutions"] == {"algorithm": "adamw", "lr": 3e-3}


def test_layers_of_other_libraries_by_class_name() -> None:
    class Conv1D(nn.Module):
        """transformers.pytorch_utils.Conv1D: a linear layer with its weight as in x out."""

        def __init__(self, outputs: int, inputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(inputs, outputs))
            self.bias = nn.Parameter(torch.zeros(outputs))

    class ColumnParallelLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 4))

    class QuantizedProjection(ColumnParallelLinear):
        pass

    class VocabParallelEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(VOCABULARY, 4))

    model = nn.ModuleDict(
        {
            "a": Conv1D(6, 4),
            "b": ColumnParallelLinear(),
            "c": QuantizedProjection(),
            "d": VocabParallelEmbedding(),
        }
    )
    assert placed(param_groups_for(model)) == {
        "matrices": ["b.weight", "c.weight"],
        "matrices stored as in x out": ["a.weight"],
        "embeddings": ["d.weight"],
        "norms_and_biases": ["a.bias"],
    }


def test_two_dimensional_norm_weight() -> None:
    assert placed(param_groups_for(nn.LayerNorm((4, 6)))) == {"norms_and_biases": ["weight", "bias"]}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(4, HIDDEN, WIDTH))
        self.w2 = nn.Parameter(torch.zeros(4, WIDTH, HIDDEN))


def mixture_of_experts() -> Llama:
    model = Llama()
    for block in model.layers:
        block.experts = Experts()
    model.positions = nn.Parameter(torch.zeros(16, WIDTH))
    return model


def test_unplaced_parameters_are_all_listed_with_overrides_that_work() -> None:
    model = mixture_of_experts()
    with pytest.raises(ValueError, match="5 of 20 could not be placed") as caught:
        param_groups_for(model)
    message = str(caught.value)
    unplaced = ["positions", *(f"layers.{i}.experts.{name}" for i in range(2) for name in ("w1", "w2"))]
    for name in unplaced:
        assert re.search(rf"^ +{re.escape(name)} +\(", message, re.MULTILINE), name
    assert "(4, 24, 8) owned by Experts" in message

    # The line to write is the last one: written as it stands, it settles the matter.
    groups = eval(message.splitlines()[-1], {"param_groups_for": param_groups_for, "model": model})
    settled = [group for group in groups if "unplaced" in group["name"]]
    assert sorted(name for group in settled for name, _ in group["params"]) == sorted(unplaced)
    assert all(group["algorithm"] == "adamw" and group["lr"] == 3e-3 for group in settled)


def test_an_override_without_an_algorithm_does_not_place_a_parameter() -> None:
    with pytest.raises(ValueError, match="could not be placed"):
        param_groups_for(mixture_of_experts(), overrides={"positions|experts": {"lr": 0.1}})


def test_unplaced_frozen_parameters_are_nobodys_business() -> None:
    model = mixture_of_experts()
    model.positions.requires_grad_(False)
    for block in model.layers:
        block.experts.requires_grad_(False)
    assert set(placed(param_groups_for(model))) == {"matrices", "embeddings", "head", "norms_and_biases"}


def test_frozen_parameters_are_left_out() -> None:
    model = Llama()
    model.norm.requires_grad_(False)
    model.output.requires_grad_(False)
    names = [name for group in param_groups_for(model) for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_all_frozen() -> None:
    with pytest.raises(ValueError, match="must have a trainable parameter"):
        param_groups_for(Llama().requires_grad_(False))


def test_scalar_algorithm() -> None:
    groups = options(param_groups_for(Llama(), scalar_algorithm="lion", adamw_lr=1e-4))
    assert {name: group["algorithm"] for name, group in groups.items()} == {
        "matrices": "dion",
        "embeddings": "lion",
        "head": "lion",
        "norms_and_biases": "lion",
    }
    with pytest.raises(ValueError, match='must be "adamw" or "lion", got \'dion\''):
        param_groups_for(Llama(), scalar_algorithm="dion")  # type: ignore[arg-type]


def test_tensor_learning_rate_is_not_shared_between_groups() -> None:
    groups = param_groups_for(Llama(), adamw_lr=torch.tensor(0.005))
    rates = [group["lr"] for group in groups if "lr" in group]
    assert len({id(rate) for rate in rates}) == len(rates) == 3
    assert all(torch.equal(rate, torch.tensor(0.005)) for rate in rates)


def test_overrides_change_the_algorithm_or_the_options() -> None:
    groups = param_groups_for(
        Llama(),
        adamw_lr=0.005,
        overrides={
            r"\.w2\.": "adamw",
            r"^output": {"lr": 0.001, "weight_decay": 0.1},
            r"tok_embeddings": "dion",
            r"layers\.0\.w[a-z]": {"tau": 0.5, "name": "attention of block 0"},
        },
    )
    assert options(groups) == {
        r"matrices: \.w2\.": {"algorithm": "adamw", "lr": 0.005},
        "attention of block 0": {"algorithm": "dion", "tau": 0.5},
        "matrices": {"algorithm": "dion"},
        "embeddings: tok_embeddings": {"algorithm": "dion", "weight_decay": 0.0},
        "head: ^output": {"algorithm": "adamw", "lr": 0.001, "weight_decay": 0.1},
        "norms_and_biases": {"algorithm": "adamw", "lr": 0.005, "weight_decay": 0.0},
    }
    assert placed(groups)["attention of block 0"] == ["layers.0.wqkv.weight", "layers.0.wo.weight"]
    assert placed(groups)[r"matrices: \.w2\."] == ["layers.0.w2.weight", "layers.1.w2.weight"]


def test_one_pattern_over_several_kinds_keeps_their_other_options() -> None:
    groups = options(param_groups_for(Llama(), overrides={r"^layers\.0\.": {"tau": 0.5}}))
    assert groups[r"matrices: ^layers\.0\."] == {"algorithm": "dion", "tau": 0.5}
    assert groups[r"norms_and_biases: ^layers\.0\."] == {
        "algorithm": "adamw",
        "lr": 3e-3,
        "weight_decay": 0.0,
        "tau": 0.5,
    }


def test_first_matching_override_wins() -> None:
    groups = placed(param_groups_for(Llama(), overrides={r"\.0\.w2": "lion", r"\.w2": "adamw"}))
    assert groups[r"matrices: \.0\.w2"] == ["layers.0.w2.weight"]
    assert groups[r"matrices: \.w2"] == ["layers.1.w2.weight"]


def test_overrides_know_a_tied_parameter_by_all_its_names() -> None:
    groups = placed(param_groups_for(GPT2(), overrides={"lm_head": {"lr": 0.1}}))
    assert groups["embeddings: lm_head"] == ["transformer.wte.weight"]


def test_overrides_know_a_shared_module_by_all_its_names() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4)})
    model["decoder"] = model["encoder"]
    groups = placed(param_groups_for(model, overrides={"decoder": "adamw"}))
    assert groups == {
        "matrices: decoder": ["encoder.weight"],
        "norms_and_biases: decoder": ["encoder.bias"],
    }


@pytest.mark.parametrize(
    "overrides",
    [{"lm_haed": "adamw"}, {r"\.w2": "lion", r"layers\.1\.w2": "adamw"}, {"": "adamw", "norm": "adamw"}],
    ids=["misspelt", "shadowed", "shadowed by a pattern that takes all"],
)
def test_overrides_that_decide_nothing_are_refused(overrides: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must decide at least one") as caught:
        param_groups_for(Llama(), overrides=overrides)
    assert repr(list(overrides)[-1]) in str(caught.value)
    assert "tok_embeddings.weight" in str(caught.value)


def test_override_of_a_frozen_parameter_only() -> None:
    model = Llama()
    model.output.requires_grad_(False)
    with pytest.raises(ValueError, match="only frozen parameters"):
        param_groups_for(model, overrides={"output": "adamw"})


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"layers.[": "adamw"}, ValueError, "must be a regular expression"),
        ({"output": 0.1}, TypeError, "an algorithm or a mapping of group options"),
        ({"output": {"params": []}}, ValueError, "drop 'params'"),
    ],
)
def test_malformed_overrides(overrides: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups_for(Llama(), overrides=overrides)


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"got Parameter. Pass the model itself, not model.parameters\(\)"):
        param_groups_for(Llama().parameters())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got int"):
        param_groups_for(3)  # type: ignore[arg-type]


def test_lazy_layers_must_run_first() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'0.weight' is not initialized yet"):
        param_groups_for(model)
    model(torch.zeros(2, 3))
    assert placed(param_groups_for(model)) == {"matrices": ["0.weight"], "norms_and_biases": ["0.bias"]}


def test_flattened_parameters_are_refused() -> None:
    class FullyShardedDataParallel(nn.Sequential):
        """FSDP1, which shows matrices as 1-D slices; they would all pass for norms."""

    with pytest.raises(ValueError, match="fully_shard"):
        param_groups_for(FullyShardedDataParallel(nn.Linear(4, 4)))


def test_model_parts_of_a_pipeline() -> None:
    """The embedding is in one part, the head, which nothing names, in the other."""
    whole = Llama(head="to_vocabulary")
    first, last = nn.Module(), nn.Module()
    first.tok_embeddings, first.layers = whole.tok_embeddings, nn.ModuleDict({"0": whole.layers[0]})
    last.layers, last.norm, last.to_vocabulary = (
        nn.ModuleDict({"1": whole.layers[1]}),
        whole.norm,
        whole.to_vocabulary,
    )
    parts, one = placed(param_groups_for([first, last])), placed(param_groups_for(whole))
    assert {name: sorted(members) for name, members in parts.items()} == {
        n: sorted(m) for n, m in one.items()
    }


def test_wrapped_blocks_and_model() -> None:
    """Activation checkpointing and torch.compile put words into the names; groups and patterns do not see
    them."""
    model = Llama(head="output")
    for i, block in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(block)
    model.output = checkpoint_wrapper(model.output)
    wrapped = torch.compile(model)
    groups = param_groups_for(wrapped, overrides={r"^layers\.0\.w1\.weight$": "adamw"})
    members = placed(groups)
    assert members["head"] == ["_orig_mod.output._checkpoint_wrapped_module.weight"]
    assert members[r"matrices: ^layers\.0\.w1\.weight$"] == [
        "_orig_mod.layers.0._checkpoint_wrapped_module.w1.weight"
    ]
    assert {name for names in members.values() for name in names} == {
        n for n, _ in wrapped.named_parameters()
    }


def _groups_of_ddp() -> dict[str, list[str]]:
    sequential = nn.Sequential(nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    return placed(param_groups_for(DistributedDataParallel(sequential)))


def _groups_of_shards(tied: bool) -> dict[str, list[str]]:
    mesh = init_device_mesh("cpu", (2,))
    model = GPT2(tied=tied)
    for block in model.transformer["h"]:
        fully_shard(block, mesh=mesh)
    # On its own, so that FSDP changes the class of the linear layer itself.
    fully_shard(model.lm_head if not tied else model.transformer["ln_f"], mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = param_groups_for(model)
    assert all(isinstance(parameter, DTensor) for group in groups for _, parameter in group["params"])
    return placed(groups)


class Forward(Llama):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            x = x + block.w2(F.silu(block.w1(x)))
        return self.output(x)


def _groups_of_tensor_parallel() -> dict[str, list[str]]:
    """Byte-level and sharded by columns: sizes must be those of the whole matrix, not of the shard."""
    model = Forward(vocabulary=WIDTH, head="output")
    plan = {"layers.*.w1": ColwiseParallel(), "layers.*.w2": RowwiseParallel(), "output": ColwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    return placed(param_groups_for(model))


def test_data_parallel_wrapper() -> None:
    expected = {
        "matrices": ["module.1.weight"],
        "embeddings": ["module.0.weight"],
        "head": ["module.2.weight"],
        "norms_and_biases": ["module.1.bias", "module.2.bias"],
    }
    assert run_ranks(2, _groups_of_ddp) == [expected, expected]


@pytest.mark.parametrize("tied", [False, True])
def test_fsdp_changes_nothing(tied: bool) -> None:
    expected = placed(param_groups_for(GPT2(tied=tied)))
    assert run_ranks(2, _groups_of_shards, tied) == [expected, expected]


def test_tensor_parallelism_changes_nothing() -> None:
    expected = placed(param_groups_for(Forward(vocabulary=WIDTH, head="output")))
    assert run_ranks(2, _groups_of_tensor_parallel) == [expected, expected]


# ---- look-alikes of real architectures: what is no hidden matrix


class Plain(nn.Module):
    """Modules by name, registered in that order."""

    def __init__(self, **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class Conv1D(nn.Module):
    """transformers.pytorch_utils.Conv1D: its weight is in x out."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.zeros(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def blocks(make: Any, number: int = 2) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(number))


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def attention(width: int = 16) -> Plain:
    return Plain(qkv=linear(width, 3 * width), proj=linear(width, width))


def mlp(width: int = 16) -> Plain:
    return Plain(fc1=linear(width, 4 * width), fc2=linear(4 * width, width))


def swiglu(width: int = 16, hidden: int = 40) -> Plain:
    return Plain(gate_proj=linear(width, hidden), up_proj=linear(width, hidden), down=linear(hidden, width))


def resnet() -> nn.Module:
    block = lambda: Plain(conv1=nn.Conv2d(8, 8, 3), bn1=nn.BatchNorm2d(8))  # noqa: E731
    return Plain(conv1=nn.Conv2d(3, 8, 3), layer1=nn.Sequential(block(), block()), fc=nn.Linear(8, 10))


def vgg() -> nn.Module:
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return Plain(features=features, classifier=nn.Sequential(linear(72, 24), linear(24, 24), linear(24, 10)))


def mnist() -> nn.Module:
    return Plain(conv1=nn.Conv2d(1, 4, 3), conv2=nn.Conv2d(4, 8, 3), fc1=linear(98, 20), fc2=linear(20, 10))


def convnext() -> nn.Module:
    block = lambda: Plain(conv_dw=nn.Conv2d(8, 8, 7, groups=8), mlp=mlp(8))  # noqa: E731
    head = Plain(norm=nn.LayerNorm(8), fc=nn.Linear(8, 10))
    return Plain(stem=nn.Sequential(nn.Conv2d(3, 8, 4)), stages=blocks(block), head=head)


def vit() -> nn.Module:
    block = lambda: Plain(attn=attention(), mlp=mlp())  # noqa: E731
    return Plain(
        cls_token=nn.Parameter(torch.zeros(1, 1, 16)),
        patch_embed=Plain(proj=nn.Conv2d(3, 16, 4)),
        blocks=blocks(block),
        heads=Plain(head=linear(16, 10)),
    )


def dit() -> nn.Module:
    """The original's: its last layer is called `final_layer.linear`, and what modulates it comes after."""
    block = lambda: Plain(attn=attention(), adaLN=nn.Sequential(nn.SiLU(), linear(16, 96)))  # noqa: E731
    final = Plain(linear=linear(16, 12), adaLN_modulation=nn.Sequential(nn.SiLU(), linear(16, 32)))
    time = Plain(mlp=nn.Sequential(linear(24, 16), nn.SiLU(), linear(16, 16)))
    return Plain(
        x_embedder=linear(12, 16), t_embedder=time, y=nn.Embedding(11, 16), blocks=blocks(block), final=final
    )


def dit_without_inner_blocks() -> nn.Module:
    return Plain(x_embedder=linear(4, 16), blocks=blocks(lambda: linear(16, 16)), proj_out=linear(16, 4))


def pixart() -> nn.Module:
    """Diffusers': projections of the caption and of time are registered after the output."""
    caption = Plain(linear_1=linear(20, 16), linear_2=linear(16, 16))
    return Plain(
        pos_embed=Plain(proj=nn.Conv2d(4, 16, 2)),
        transformer_blocks=blocks(lambda: Plain(attn1=attention(), ff=mlp())),
        proj_out=linear(16, 12),
        adaln_single=Plain(linear=linear(16, 96)),
        caption_projection=caption,
    )


def moe(gate: nn.Module, experts: nn.Module, **more: nn.Module) -> nn.Module:
    layer = lambda: Plain(attn=attention(), mlp=Plain(gate=gate, experts=experts, **more))  # noqa: E731
    return Plain(embed_tokens=nn.Embedding(50, 16), layers=blocks(layer, 1), lm_head=linear(16, 50))


def mixtral() -> nn.Module:
    return moe(linear(16, 4), nn.ModuleList(swiglu() for _ in range(4)))


def qwen_moe() -> nn.Module:
    experts = nn.ModuleList(swiglu() for _ in range(4))
    return moe(linear(16, 4), experts, shared_expert=swiglu(), shared_expert_gate=linear(16, 1))


def deepseek() -> nn.Module:
    class MoEGate(Plain):
        """A router that holds its weight itself."""

    gate = MoEGate(weight=nn.Parameter(torch.zeros(4, 16)))
    return moe(gate, nn.ModuleList(swiglu() for _ in range(4)), shared_experts=swiglu())


def mamba() -> nn.Module:
    A_log = nn.Parameter(torch.zeros(32, 4))
    A_log._no_weight_decay = True
    layer = lambda: Plain(  # noqa: E731
        A_log=A_log,
        in_proj=linear(16, 64),
        conv1d=nn.Conv1d(32, 32, 4, groups=32),
        x_proj=linear(32, 9),
        dt_proj=nn.Linear(1, 32),
        out_proj=linear(32, 16),
    )
    return Plain(embedding=nn.Embedding(50, 16), layers=blocks(layer, 1), lm_head=linear(16, 50))


def t5() -> nn.Module:
    names = ("q", "k", "v", "o")
    layer = lambda: Plain(  # noqa: E731
        **{name: linear(16, 16) for name in names},
        relative_attention_bias=nn.Embedding(8, 2),
        wi=linear(16, 64),
    )
    stack = lambda: Plain(block=blocks(layer))  # noqa: E731
    return Plain(shared=nn.Embedding(50, 16), encoder=stack(), decoder=stack(), lm_head=linear(16, 50))


def whisper() -> nn.Module:
    encoder = Plain(conv1=nn.Conv1d(8, 16, 3), embed_positions=nn.Embedding(20, 16), layers=blocks(attention))
    decoder = Plain(embed_tokens=nn.Embedding(50, 16), layers=blocks(attention))
    model = Plain(encoder=encoder, decoder=decoder, proj_out=linear(16, 50))
    model.proj_out.weight = model.decoder.embed_tokens.weight
    return model


def gpt2_of_transformers() -> nn.Module:
    attn = lambda: Plain(c_attn=Conv1D(48, 16), c_proj=Conv1D(16, 16))  # noqa: E731
    layer = lambda: Plain(attn=attn(), mlp=Plain(c_fc=Conv1D(64, 16), c_proj=Conv1D(16, 64)))  # noqa: E731
    model = Plain(transformer=Plain(wte=nn.Embedding(50, 16), h=blocks(layer)), lm_head=linear(16, 50))
    model.lm_head.weight = model.transformer.wte.weight
    return model


def llava() -> nn.Module:
    """The projector comes last, and feeds the language model."""
    vision = Plain(patch=nn.Conv2d(3, 20, 4), layers=blocks(lambda: attention(20)))
    language = Plain(embed=nn.Embedding(50, 16), layers=blocks(attention), lm_head=linear(16, 50))
    projector = Plain(linear_1=linear(20, 16), linear_2=linear(16, 16))
    return Plain(vision_tower=vision, language_model=language, multi_modal_projector=projector)


def bert() -> nn.Module:
    """Its blocks have an `output` each; one head is tied, one tells whether a sentence follows another."""
    layer = lambda: Plain(attention=attention(), output=Plain(dense=linear(64, 16)))  # noqa: E731
    heads = Plain(transform=linear(16, 16), decoder=linear(16, 50), seq_relationship=linear(16, 2))
    model = Plain(embedding=nn.Embedding(50, 16), layer=blocks(layer), pooler=linear(16, 16), cls=heads)
    model.cls.decoder.weight = model.embedding.weight
    return model


def multi_token_prediction() -> nn.Module:
    """Further heads stand in numbered blocks."""
    language = Plain(embed=nn.Embedding(200, 16), layers=blocks(attention), lm_head=linear(16, 200))
    return Plain(
        language=language,
        mtp=blocks(lambda: Plain(eh_proj=linear(32, 16), attn=attention(), out=linear(16, 200)), 1),
        medusa=nn.ModuleList([nn.Sequential(linear(16, 16), linear(16, 200))]),
    )


def roberta_classifier() -> nn.Module:
    head = Plain(dense=linear(16, 16), out_proj=linear(16, 3))
    return Plain(embedding=nn.Embedding(50, 16), layer=blocks(attention), classifier=head)


def old_weight_norm() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 8), nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 11))


def new_weight_norm() -> nn.Module:
    weight_norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(nn.Embedding(11, 8), weight_norm(nn.Linear(8, 8)), nn.Linear(8, 11))


def weight_norm_along_inputs() -> nn.Module:
    """Magnitudes are of one row, or of a convolution's dimensions."""
    old, new = nn.utils.weight_norm, nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        new(nn.Conv1d(3, 8, 3)), old(linear(8, 8), dim=1), new(linear(8, 8), dim=1), linear(8, 11)
    )


# Per architecture, for each kind the last words that tell its 2-D weights apart.
NOT_HIDDEN: dict[Any, dict[str, list[str]]] = {
    resnet: {"head": ["fc.weight"]},
    vgg: {"head": ["classifier.2.weight"]},
    mnist: {"head": ["fc2.weight"]},
    convnext: {"head": ["head.fc.weight"]},
    vit: {"head": ["heads.head.weight"], "norms_and_biases": ["cls_token"]},
    dit: {"head": ["final.linear.weight"], "embeddings": ["y.weight"]},
    dit_without_inner_blocks: {"head": ["proj_out.weight"]},
    pixart: {"head": ["proj_out.weight"]},
    mixtral: {"head": ["lm_head.weight"], "gates": ["layers.0.mlp.gate.weight"]},
    qwen_moe: {
        "head": ["lm_head.weight"],
        "gates": ["layers.0.mlp.gate.weight", "layers.0.mlp.shared_expert_gate.weight"],
    },
    deepseek: {"head": ["lm_head.weight"], "gates": ["layers.0.mlp.gate.weight"]},
    mamba: {"head": ["lm_head.weight"], "gates": ["layers.0.dt_proj.weight"]},
    t5: {"head": ["lm_head.weight"]},
    whisper: {"embeddings": ["decoder.embed_tokens.weight", "encoder.embed_positions.weight"]},
    gpt2_of_transformers: {"embeddings": ["transformer.wte.weight"]},
    llava: {"head": ["language_model.lm_head.weight"]},
    bert: {"head": ["cls.seq_relationship.weight"], "embeddings": ["embedding.weight"]},
    multi_token_prediction: {"head": ["language.lm_head.weight", "mtp.0.out.weight", "medusa.0.1.weight"]},
    roberta_classifier: {"head": ["classifier.out_proj.weight"]},
    old_weight_norm: {"head": ["2.weight"], "norms_and_biases": ["1.weight_g"]},
    new_weight_norm: {"head": ["2.weight"], "norms_and_biases": ["1.parametrizations.weight.original0"]},
    weight_norm_along_inputs: {
        "head": ["3.weight"],
        "norms_and_biases": [
            "0.parametrizations.weight.original0",
            "1.weight_g",
            "2.parametrizations.weight.original0",
        ],
        "convolutions": ["0.parametrizations.weight.original1"],
    },
}


@pytest.mark.parametrize("architecture", NOT_HIDDEN, ids=lambda make: make.__name__)
def test_what_is_no_hidden_matrix(architecture: Any) -> None:
    model, wanted = architecture(), NOT_HIDDEN[architecture]
    groups = param_groups_for(model, overrides={"A_log": "adamw"} if architecture is mamba else {})
    where = {name: group for group, names in placed(groups).items() for name in names}
    told = {name: kind for kind, names in wanted.items() for name in names}
    assert {name: where[name] for name in told} == told
    for name, parameter in model.named_parameters():
        others = ("embeddings", "unplaced without decay: A_log")
        if parameter.ndim == 2 and name not in told and where[name] not in others:
            assert where[name].startswith("matrices"), name
    for kind in ("head", "gates"):
        assert [name for name, group in where.items() if group == kind] == wanted.get(kind, [])


def test_layers_that_are_stored_as_in_x_out() -> None:
    class LinearOfAnotherLibrary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(4, 16)), nn.Parameter(torch.zeros(16))

    model = gpt2_of_transformers()
    model.other, model.plain = LinearOfAnotherLibrary(), linear(16, 16)
    groups = param_groups_for(model, overrides={r"h\.1\.mlp": "adamw"})
    in_out = {
        name for group in groups if group.get("weight_layout") == "in_out" for name, _ in group["params"]
    }
    of_blocks = {name for name, p in model.named_parameters() if ".h." in name and p.ndim == 2}
    assert in_out == {name for name in of_blocks if "h.1.mlp" not in name} | {"other.weight"}
    assert options(groups)["matrices stored as in x out"] == {"algorithm": "dion", "weight_layout": "in_out"}


def test_overrides_win_over_what_was_found() -> None:
    groups = placed(param_groups_for(qwen_moe(), overrides={r"\.gate\.": "dion", "lm_head": "dion"}))
    assert groups["gates: \\.gate\\."] == ["layers.0.mlp.gate.weight"]
    assert groups["head: lm_head"] == ["lm_head.weight"]


def test_where_parameters_go_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="curvadion.param_groups"):
        param_groups_for(qwen_moe())
    lines = [record.getMessage() for record in caplog.records]
    assert "gates, adamw: layers.*.mlp.gate.weight (4, 16) (called gate)" in lines
    assert "gates, adamw: layers.*.mlp.shared_expert_gate.weight (1, 16) (one row or column)" in lines
    assert "matrices, dion: layers.*.mlp.experts.*.up_proj.weight (40, 16) x 4 (a linear layer's)" in lines


# ---- weight decay


def test_what_is_marked_has_no_weight_decay() -> None:
    groups = param_groups_for(mamba(), overrides={"A_log": "adamw"})
    assert options(groups)["unplaced without decay: A_log"] == {
        "algorithm": "adamw",
        "lr": 3e-3,
        "weight_decay": 0.0,
    }

    class Swin(Plain):
        def no_weight_decay(self) -> set[str]:
            return {"bias_table"}

    model = Plain(trunk=Swin(bias_table=nn.Parameter(torch.zeros(5, 3)), proj=linear(8, 8)))
    groups = param_groups_for(model, overrides={"bias_table": "lion"})
    assert {name: group.get("weight_decay") for name, group in options(groups).items()} == {
        "matrices": None,
        "unplaced without decay: bias_table": 0.0,
    }


def test_an_override_may_give_weight_decay_to_what_is_marked() -> None:
    groups = param_groups_for(mamba(), overrides={"A_log": {"algorithm": "adamw", "weight_decay": 0.1}})
    assert options(groups)["unplaced without decay: A_log"]["weight_decay"] == 0.1


def test_suggested_overrides_give_weight_decay_to_weights_alone() -> None:
    with pytest.raises(ValueError, match="could not be placed") as caught:
        param_groups_for(mixture_of_experts())
    suggestion = str(caught.value).splitlines()[-1]
    groups = eval(suggestion, {"param_groups_for": param_groups_for, "model": mixture_of_experts()})
    decays = {name: group.get("weight_decay") for group in groups for name, _ in group["params"]}
    assert decays["positions"] == 0.0
    assert decays["layers.0.experts.w1"] is None


def test_suggested_overrides_give_weight_decay_to_recurrent_layers_and_projections() -> None:
    model = Plain(
        rnn=nn.GRU(8, 8),
        cell=nn.LSTMCell(8, 8),
        text_projection=nn.Parameter(torch.zeros(8, 4)),
        positions=nn.Parameter(torch.zeros(6, 8)),
    )
    with pytest.raises(ValueError, match="could not be placed") as caught:
        param_groups_for(model)
    suggestion = str(caught.value).splitlines()[-1]
    groups = eval(suggestion, {"param_groups_for": param_groups_for, "model": model})
    decays = {name: group.get("weight_decay") for group in groups for name, _ in group["params"]}
    assert {name for name, decay in decays.items() if decay is None} == {
        "text_projection",
        *(f"rnn.weight_{kind}_l0" for kind in ("ih", "hh")),
        *(f"cell.weight_{kind}" for kind in ("ih", "hh")),
    }
