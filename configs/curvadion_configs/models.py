"""Llama-style decoders from 160M to 1.3B: RMSNorm, SwiGLU, rotary positions, untied embeddings, no biases."""

from functools import partial

from torch import nn
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.common.param_init import depth_scaled_std
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.parallelize import parallelize_llama
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec

from curvadion.projection.nominal import SIZES, Decoder

SHAPES = {"debug": Decoder(dim=64, layers=2, heads=4, ffn=192, vocabulary=512), **SIZES}


def gpt(size: str) -> ModelSpec:
    """Return a model of one of `SHAPES`, initialized as torchtitan's Llama 3.

    Attention is causal and looks across the borders of documents, as in GPT-3 (arXiv:2005.14165, 2.2), so
    that one implementation serves every device. Wrap it in `curvadion.titan.replicated` or `reduced`.
    """
    shape = SHAPES[size]
    weight = {"weight": partial(nn.init.trunc_normal_, std=0.02)}
    ones = {"weight": nn.init.ones_}
    head_std = shape.dim**-0.5

    def by_depth(layer: int) -> dict[str, partial]:
        return {"weight": partial(nn.init.trunc_normal_, std=depth_scaled_std(0.02, layer))}

    layers = [
        Llama3TransformerBlock.Config(
            attention_norm=RMSNorm.Config(normalized_shape=shape.dim, param_init=ones),
            ffn_norm=RMSNorm.Config(normalized_shape=shape.dim, param_init=ones),
            attention=make_gqa_config(
                dim=shape.dim,
                n_heads=shape.heads,
                wqkv_param_init=weight,
                wo_param_init=by_depth(layer),
                inner_attention=ScaledDotProductAttention.Config(),
                fuse_qkv=False,  # Q, K and V are three matrices, each with an orthonormal update of its own
                rope=ComplexRoPE.Config(
                    dim=shape.dim // shape.heads, max_seq_len=8192, theta=10000.0, scaling="none"
                ),
            ),
            feed_forward=make_ffn_config(
                dim=shape.dim, hidden_dim=shape.ffn, w1_param_init=weight, w2w3_param_init=by_depth(layer)
            ),
        )
        for layer in range(shape.layers)
    ]
    return ModelSpec(
        name="curvadion_gpt",
        flavor=size,
        model=Llama3Model.Config(
            dim=shape.dim,
            vocab_size=shape.vocabulary,
            enable_weight_tying=False,
            tok_embeddings=Embedding.Config(
                num_embeddings=shape.vocabulary,
                embedding_dim=shape.dim,
                param_init={"weight": partial(nn.init.normal_, std=1.0)},
            ),
            norm=RMSNorm.Config(normalized_shape=shape.dim, param_init=ones),
            lm_head=Linear.Config(
                in_features=shape.dim,
                out_features=shape.vocabulary,
                param_init={
                    "weight": partial(nn.init.trunc_normal_, std=head_std, a=-3 * head_std, b=3 * head_std)
                },
            ),
            layers=layers,
        ),
        parallelize_fn=parallelize_llama,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=Llama3StateDictAdapter,
    )
