"""Weights inside wrappers, as low-precision libraries make them: a model of these must train as one of plain
weights does, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from support.models import TinyGPT

aten = torch.ops.aten
KEPT = {  # what FSDP2 and DTensor make of a weight is a weight, as in torchao's float8 training
    *(aten.detach.default, aten.clone.default, aten.copy_.default, aten._to_copy.default),
    *(aten.empty_like.default, aten.new_zeros.default, aten.view.default, aten.as_strided.default),
    *(aten.slice.Tensor, aten.split.Tensor),
}


class Wrapped(Tensor):
    """A tensor around others; it has no memory itself. It computes with the first, and casts nothing."""

    inner: tuple[Tensor, ...]

    @staticmethod
    def __new__(cls, *inner: Tensor, dtype: torch.dtype | None = None) -> Wrapped:
        first = inner[0]
        strides = first.stride() if first.layout == torch.strided else None
        made = Tensor._make_wrapper_subclass(
            cls, first.shape, strides=strides, dtype=dtype or first.dtype, device=first.device
        )
        made.inner = inner
        return made

    def __getattr__(self, name: str) -> Tensor:
        if not name.startswith("inner_"):
            raise AttributeError(name)
        return self.inner[int(name.removeprefix("inner_"))]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [f"inner_{k}" for k in range(len(self.inner))], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Wrapped:
        return Wrapped(*inner.values())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*tree_map_only(Wrapped, lambda x: x.inner[0], args), **kwargs)
        if func not in KEPT:
            return result
        like = next(x for x in args if isinstance(x, Wrapped))
        dtype = None if like.dtype == like.inner[0].dtype else like.dtype
        result = tree_map_only(Tensor, lambda x: Wrapped(x, *like.inner[1:], dtype=dtype), result)
        return return_and_correct_aliasing(func, args, kwargs, result)

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        return (self.inner[0],), None

    def fsdp_post_all_gather(
        self, gathered: Sequence[Tensor], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        return None if out is not None else (gathered[0], tuple(gathered))


torch.serialization.add_safe_globals([Wrapped])


class WrappedGPT(TinyGPT):
    """`TinyGPT`, all weights of whose linear layers are wrapped."""

    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(Wrapped(module.weight))
