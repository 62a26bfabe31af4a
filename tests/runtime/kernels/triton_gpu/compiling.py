"""Compile every Triton kernel for GPUs that this machine need not have; run as a program.

``python compiling.py CAPABILITY SCHEME[:SCHEME_OF_DOWN] ...`` prints a line for each kernel: its
name, scheme, registers, spilled bytes and shared memory. Triton's interpreter must be off, hence a
process of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moepack_runtime.kernels.triton_gpu import dense, matmul, matvec, sizes

# Types of arguments by name; what is not here is a 32-bit integer, or a constant.
TYPES = {
    "x": "*bf16", "h": "*bf16", "bias": "*bf16", "out": "*fp32", "partial": "*fp32",
    "packed": "*u8", "weights": "*fp32", "index": "*i64", "table": "*i64", "tiles": "*i64",
    "place": "*i64", "layout_of": "*i64", "tile_expert": "*i32", "tile_first": "*i32",
    "tile_last": "*i32", "alpha": "fp32", "limit": "fp32", "up_offset": "fp32",
}  # fmt: skip
# Multiples of 16 where shapes are as they usually are; Triton specialises for that.
ALIGNED = ("tile_nbytes", "first_offset", "down_offset", "bias_offset", "hidden", "intermediate",
           "rows", "cols", "stride", "h_stride", "width")  # fmt: skip


def constants(name: str, scheme: str) -> dict[str, Any]:
    """What a launch of a kernel passes as compile-time constants."""
    vector = {"W": sizes.vector_cells(scheme), "EVEN": True, "SCHEME": scheme}
    rows = {"M": 16, "C": sizes.columns_tile(), "W": sizes.chunk_cells(scheme),
            "PRECISION": "ieee", "SCHEME": scheme}  # fmt: skip
    each: dict[str, dict[str, Any]] = {
        "experts_up": {**vector, "GATED": True, "HAS_BIAS": True, "KIND": "silu"},
        "experts_down": {**vector, "HAS_BIAS": True, "N": sizes.VECTOR_TILES},
        "linear": {**vector, "N": sizes.VECTOR_TILES},
        "up_rows": {**rows, "GATED": True, "HAS_BIAS": True, "KIND": "silu",
                    "DOWN_CELL": sizes.cell_width(scheme), "DOWN_W": sizes.chunk_cells(scheme)},
        "down_rows": {**rows, "HAS_BIAS": True},
        "linear_rows": {**rows, "HAS_BIAS": True},
        "dense_rows": {"SCHEME": scheme, "HAS_TILES": True, "W": sizes.chunk_cells(scheme)},
        "combine": {"EACH": False, "HAS_WEIGHTS": True, "HAS_INDEX": True, "HAS_BIAS": True,
                    "SIZE": sizes.COMBINE_SIZE},
    }  # fmt: skip
    return each[name]


KERNELS = {
    name: getattr(module, name)
    for module, names in (
        (matvec, ("experts_up", "experts_down", "linear", "combine")),
        (matmul, ("up_rows", "down_rows", "linear_rows")),
        (dense, ("dense_rows",)),
    )
    for name in names
}


ROWS = ("up_rows", "down_rows", "linear_rows")
"""Kernels whose programs take 16, 32 or 64 rows."""


def compile_kernel(name: str, scheme: str, capability: int, **changes: Any) -> Any:
    """One kernel to machine code."""
    function = KERNELS[name]
    fixed = {**constants(name, scheme), **changes}
    types = {"h": "*fp32"} if name.startswith("experts") else {}
    signature = {
        argument: "constexpr" if argument in fixed else {**TYPES, **types}.get(argument, "i32")
        for argument in function.arg_names
    }
    places = {argument: place for place, argument in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(places[argument],): value for argument, value in fixed.items()},
        attrs={
            (places[argument],): [["tt.divisibility", 16]]
            for argument, kind in signature.items()
            if kind.startswith("*") or argument in ALIGNED
        },
    )
    options = {"num_warps": 4}
    if name in ROWS:
        options["num_stages"] = sizes.ROWS_STAGES
    if name in ("combine", "dense_rows"):
        options["enable_fp_fusion"] = False
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def main(capability: int, schemes: list[str]) -> None:
    most = sizes.most_rows(divmod(capability, 10))
    for scheme in schemes:
        for name in KERNELS:
            for changes in ({}, {"M": most}) if name in ROWS else ({},):
                compiled = compile_kernel(name, scheme, capability, **changes)
                registers, spilled = resources(compiled.asm["cubin"])
                vector = "v4" in compiled.asm["ptx"]
                shared = compiled.metadata.shared
                print(name, scheme, registers, spilled, shared, vector, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
