"""Compile every Triton kernel for GPUs that are not here, and report what the compiler made of it.

    python benchmarks/compiled.py                 # a table
    python benchmarks/compiled.py --json          # one JSON object per kernel and target
    python benchmarks/compiled.py --quick         # what the tests compile: a third of the time

Per kernel and target: registers, stack and spills (both must be 0), the widest loads and stores of global
memory with their number, and the matrix instructions. Needs triton, no GPU; NVIDIA's disassembler comes
inside the triton package.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are decorated

import torch

try:
    import triton
    import triton.backends.nvidia
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    raise SystemExit(
        f"kernels are compiled with {error.name}, which is missing: pip install 'curvadion[kernels]'"
    ) from None

from curvadion_kernels import triton_ops as T

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {tl.float32: "*fp32", tl.float64: "*fp64", tl.bfloat16: "*bf16"}
NAMES = {tl.float32: "fp32", tl.float64: "fp64", tl.bfloat16: "bf16"}


def variants(target: GPUTarget) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Yield (name, kernel, argument types, constants, launch options) of everything that a training run
    launches."""
    addresses = dict.fromkeys(("addresses", "m_addresses", "x_addresses", "g_addresses"), "*i64")
    chunked = {**addresses, "owner": "*i32", "sizes": "*i64", "count": "i32"}
    cut = {"CHUNK": T.CHUNK, "BLOCK": T.BLOCK}
    strides = {"decay": "*fp64", "decay_stride": "i32"}
    for state, grad in ((tl.float32, tl.float32), (tl.float32, tl.bfloat16), (tl.bfloat16, tl.bfloat16)):
        names = f"{NAMES[state]}, {NAMES[grad]}"
        for store in (True, False):
            yield (
                f"momentum_norm ({names}{'' if store else ', norms only'})",
                T.momentum_norm_kernel,
                {**chunked, **strides, "partial": "*fp32", "live": "*fp32"},
                {"M_TYPE": state, "G_TYPE": grad, "TYPE": tl.float32, "STORE": store, **cut},
                T.ELEMENTWISE,
            )
        yield (
            f"local_step ({names})",
            T.local_step_kernel,
            {**chunked, **strides, "step_size": "*fp64", "step_stride": "i32", "key": "*i64"},
            {"X_TYPE": state, "G_TYPE": grad, "TYPE": tl.float32, "GATED": True, **cut},
            T.ELEMENTWISE,
        )
    yield (
        "nonfinite (fp32)",
        T.nonfinite_kernel,
        {**chunked, "partial": "*fp32"},
        {"G_TYPE": tl.float32, "TYPE": tl.float32, **cut},
        T.ELEMENTWISE,
    )
    yield (
        "segment_sum",
        T.segment_sum_kernel,
        {"partial": "*fp32", "live": "*fp32", "segments": "*i64", "sums": "*fp32", "count": "i32"},
        {"BLOCK": T.SUM_BLOCK},
        {"num_warps": 4},
    )
    yield (
        "gate_key",
        T.gate_key_kernel,
        {
            **dict.fromkeys(("sums", "last_norm", "tau", "norm_out", "rmmc_out"), "*fp32"),
            "key_out": "*i64",
            "count": "i32",
            "hold_closed": "i32",
        },
        {"BLOCK": T.GATE_BLOCK},
        {"num_warps": 4},
    )
    for kind in (tl.float32, tl.bfloat16):
        for feedback, other in ((True, ""), (True, "right"), (True, "left"), (False, "right")):
            for precision in ("tf32", "tf32x3") if target.backend == "cuda" else ("ieee",):
                tile = T.apply_tile(precision)
                what = (
                    {"": "Q = R scale", "right": "Q and R", "left": "Q and R, transposed"}[other]
                    if feedback
                    else "X only"
                )
                yield (
                    f"low_rank_apply ({NAMES[kind]}, {what}, {precision})",
                    T.low_rank_apply_kernel,
                    {
                        "addresses": "*i64",
                        "M": POINTERS[kind],
                        "scalars": "*fp64",
                        "rows": "i32",
                        "cols": "i32",
                        "r": "i32",
                        **dict.fromkeys(("left", "right", "other", "scale"), "*fp32"),
                    },
                    {
                        "X_TYPE": kind,
                        "TYPE": tl.float32,
                        "ALIGNED": True,
                        "FEEDBACK": feedback,
                        "OTHER": other,
                        "PRECISION": precision,
                        **{key: tile[key] for key in ("ROWS", "COLS", "RANK", "GROUP")},
                    },
                    {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]},
                )
    yield (
        "column_sumsq",
        T.column_sumsq_kernel,
        {"R": "*fp32", "partial": "*fp64", "rows": "i32", "r": "i32", "blocks": "i32"},
        {"ROWS": T.COLUMN_ROWS, "TILE": T.COLUMN_TILE[0], "COLS": T.COLUMN_TILE[1]},
        {"num_warps": 4},
    )
    for kind in (tl.float32, tl.bfloat16):
        sizes = dict.fromkeys(("size", "x_size", "count", "stride"), "i32")
        yield (
            f"sign_encode ({NAMES[kind]})",
            T.sign_encode_kernel,
            {**dict.fromkeys(("residual", "x"), POINTERS[kind]), "payload": "*u8", **sizes},
            {"ROWS": T.SIGN_ROWS},
            T.SIGN_OPTIONS,
        )
        yield (
            f"sign_decode ({NAMES[kind]})",
            T.sign_decode_kernel,
            {"values": POINTERS[kind], "payloads": "*u8", **sizes},
            {"ROWS": T.SIGN_ROWS},
            T.SIGN_OPTIONS,
        )
    for kind, dtype in ((tl.float32, torch.float32), (tl.bfloat16, torch.bfloat16)):
        precision = "tf32x3" if target.backend == "cuda" and kind == tl.float32 else "ieee"
        tile = T.symmetric_tile(dtype, precision, hip=target.backend == "hip")
        for what, contiguous in (("Y", "col_stride"), ("Y, column-major", "row_stride"), ("G", "col_stride")):
            yield (
                f"symmetric_product ({NAMES[kind]}, of {what})",
                T.symmetric_product_kernel,
                {
                    **dict.fromkeys(("A", "C"), POINTERS[kind]),
                    **dict.fromkeys(("rows", "n", "batch_stride", "row_stride", "col_stride"), "i32"),
                    **dict.fromkeys(("alpha", "beta"), "fp32"),
                },
                {
                    contiguous: 1,
                    "ADD": what == "G",
                    "PRECISION": precision,
                    "TILE": tile["TILE"],
                    "DEPTH": tile["DEPTH"],
                },
                {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]},
            )


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: GPUTarget, options: dict[str, int]
) -> Any:
    """Compile as the launcher would for aligned pointers and sizes divisible by 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    sizes = ("rows", "cols", "r", "n", "size", "batch_stride", "row_stride", "col_stride")
    aligned = [name for name in names if types.get(name, "").startswith("*") or name in sizes]
    aligned = [name for name in aligned if name not in constants]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def in_quick(name: str, label: str) -> bool:
    """Say whether the quick report has it: each kernel once; all low-rank modes and mixed dtypes on sm_90;
    bfloat16 on gfx942; symmetric products of bfloat16, all on sm_90."""
    if "norms only" in name:
        return False
    if name.startswith("symmetric_product"):
        return label == "sm_90" or "bf16, of G" in name
    if name.startswith("low_rank_apply"):
        scaled = "Q = R scale" in name
        return (
            "bf16" not in name
            and (", tf32)" not in name or (scaled and label == "sm_90"))
            and (scaled or label == "sm_90")
        )
    return (
        "bf16" not in name
        or (label == "gfx942" and "(bf16" in name)
        or (label == "sm_90" and "(fp32, bf16" in name)
    )


def inspect_cuda(compiled: Any, disassemble: bool = True) -> dict[str, Any]:
    """Read resources and instructions off the machine code; disassembling takes longer than compiling."""
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
        )
        code = ""
        if disassemble:
            code = subprocess.run(
                [tools / "nvdisasm", "-ndf", "-c", binary], capture_output=True, text=True, check=True
            ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout + usage.stderr
    registers, stack, local = map(int, found.groups())
    count: Counter[str] = Counter()
    for operation, modifiers in re.findall(
        r"\b(LDGSTS|LDG|STG|LDL|STL|HMMA|HGMMA|UTCHMMA|UTCQMMA|UTC\w*MMA)((?:\.[A-Za-z0-9_]+)*)", code
    ):
        bits = re.search(r"\.(128|64)\b", modifiers)
        name = {"LDGSTS": "load", "LDG": "load", "STG": "store", "LDL": "local", "STL": "local"}.get(
            operation, operation
        )
        count[f"{name}{int(bits[1]) // 8 if bits else 4}" if name in ("load", "store") else name] += 1
    return {
        "registers": registers,
        "stack": stack,
        "spills": local + count.pop("local", 0),
        "instructions": dict(sorted(count.items())),
    }


def inspect_hip(compiled: Any) -> dict[str, Any]:
    """Read the same off AMD's assembly."""
    code = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", code)
        assert found is not None, key
        return int(found[1])

    count: Counter[str] = Counter()
    for kind, width in re.findall(
        r"\b(?:global|buffer|flat)_(load|store)_(?:dword|b|u?short|ubyte)(x?\d*)", code
    ):
        count[f"{kind}{ {'x4': 16, '128': 16, 'x3': 12, 'x2': 8, '64': 8}.get(width, 4) }"] += 1
    count["MFMA"] = len(re.findall(r"\bv_mfma_", code))
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "instructions": {key: value for key, value in sorted(count.items()) if value},
    }


def main() -> None:
    """Compile, inspect, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    parser.add_argument(
        "--target", choices=sorted(TARGETS), action="append", help="only this one; may be given several times"
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="leave out variants, and the instructions of kernels that move few bytes",
    )
    arguments = parser.parse_args()
    for label in arguments.target or TARGETS:
        target = TARGETS[label]
        for name, kernel, types, constants, options in variants(target):
            if arguments.kernel not in name or (arguments.quick and not in_quick(name, label)):
                continue
            compiled = build(kernel, types, constants, target, options)
            disassemble = not arguments.quick or name.startswith(
                ("momentum_norm", "local_step", "low_rank_apply", "symmetric_product", "sign_")
            )
            found = inspect_cuda(compiled, disassemble) if target.backend == "cuda" else inspect_hip(compiled)
            row = {
                "kernel": name,
                "target": label,
                **found,
                "shared": compiled.metadata.shared,
                "triton": triton.__version__,
            }
            if arguments.json:
                print(json.dumps(row), flush=True)
            else:
                instructions = " ".join(f"{key}:{value}" for key, value in found["instructions"].items())
                counts = (("registers", 4), ("stack", 4), ("spills", 3), ("shared", 7))
                sizes = " ".join(f"{ {**row, **found}[key]:{width}} {key}" for key, width in counts)
                print(f"{label:7} {name:58} {sizes}  {instructions}", flush=True)


if __name__ == "__main__":
    main()
