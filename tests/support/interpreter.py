"""Triton's interpreter, which runs the kernels on CPU tensors, made right for what our kernels use.

Up to 3.7 it keeps bfloat16 as raw 16-bit integers: float32 -> bfloat16 truncates, and arithmetic, comparisons
and `tl.dot` work on the integers. And 3.6, with numpy 2.4, cannot convert a loaded number to a Python
integer, which `range(begin, end)` in a kernel needs. The replacements below are for private functions of
triton: `test_kernels.py` checks that they take effect.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np


def install() -> None:
    """Turn the interpreter on for this process, and mend it. Before the kernels are imported; without triton
    there is nothing to do."""
    if ("triton" in sys.modules and sys.modules["triton"] is None) or importlib.util.find_spec(
        "triton"
    ) is None:
        return
    kernels = sys.modules.get("curvadion_kernels.triton_ops")
    if kernels is not None and not kernels.interpreted():
        raise RuntimeError(
            "the interpreter must be installed before curvadion_kernels.triton_ops is imported"
        )
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
    import triton.language as tl
    from triton.runtime import interpreter

    if not isinstance(tl.cdiv, interpreter.InterpretedFunction):
        raise RuntimeError(
            "the interpreter must be installed before triton is imported, by whatever module; call "
            "install() earlier"
        )
    if not hasattr(interpreter, "_mended"):
        interpreter._mended = True
        _mend(interpreter)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as the interpreter keeps it, to float32."""
    return (
        (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16))
        .view(np.float32)
        .reshape(np.shape(bits))
    )


def narrow(values: np.ndarray) -> np.ndarray:
    """Float32 to the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.reshape(np.shape(values)))


ARITHMETIC = {np.add, np.subtract, np.multiply, np.divide, np.fmod, np.maximum, np.minimum}
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def _mend(interpreter: Any) -> None:
    import triton.language as tl

    builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot, binary, unary = builder.cast_impl, builder.create_dot, builder.binary_op, builder.unary_op

    def is_bfloat16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def widened(handle: Any) -> Any:
        return Handle(widen(handle.data), tl.float32) if is_bfloat16(handle) else handle

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16:
            return (
                source if is_bfloat16(source) else Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
            )
        return cast(self, widened(source), dtype)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def binary_op(self: Any, a: Any, b: Any, operation: Callable[..., np.ndarray]) -> Any:
        if is_bfloat16(a) and operation in ARITHMETIC:
            return Handle(narrow(operation(widen(a.data), widen(b.data))), tl.bfloat16)
        if is_bfloat16(a) and operation in COMPARISONS:
            return Handle(operation(widen(a.data), widen(b.data)), tl.int1)
        return binary(self, a, b, operation)

    def unary_op(self: Any, a: Any, operation: Callable[..., np.ndarray]) -> Any:
        if is_bfloat16(a):
            return Handle(narrow(operation(widen(a.data))), tl.bfloat16)
        return unary(self, a, operation)

    builder.cast_impl, builder.create_dot, builder.binary_op, builder.unary_op = (
        cast_impl,
        create_dot,
        binary_op,
        unary_op,
    )

    # Integer sums are checked for overflow in int64, a quarter of the time; the compiler does not check them
    # either.
    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )

    # Each call of one kernel function by another patches triton.language anew, which takes milliseconds: once
    # per launch is enough.
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch_lang(function)

    def launch_patched(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_patched

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(()).item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
