"""Gate and up of the shared and of the chosen expert for one token, without tensor cores, as ``gemv`` multiplies.

Launched by ``moe_few`` alone. The shared expert's programs come first: their weights are on their way while the
token is still being routed, which hides most of the routing.
"""

# Triton 3.6 compiles tuples of tiles that grow by +, not by *; mypy cannot type either.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from outrider.kernels.activation import swiglu_rounded
from outrider.kernels.gemv import _load_tiles, _multiply
from outrider.kernels.overlap import wait_for_inputs
from outrider.kernels.quantize import to_fp8


@triton.jit
def _pairs(first, inter, OUTPUTS: tl.constexpr):
    """Rows ``first, first + inter, first + 1, ...`` (a gate, its up, the next gate) and which of them exist."""
    places = tl.arange(0, 2 * OUTPUTS)
    gates = first + places // 2
    return gates + places % 2 * inter, gates < inter


@triton.jit
def _store_pairs(total, scale_ptr, out_ptr, first, inter, MODEL_DTYPE: tl.constexpr, OUTPUTS: tl.constexpr):
    """SwiGLU of ``total [2 * OUTPUTS]``, quantised."""
    gate, up = tl.split(tl.reshape(total, (OUTPUTS, 2)))
    out = swiglu_rounded(gate, up, MODEL_DTYPE).to(tl.float32)
    columns = first + tl.arange(0, OUTPUTS)
    tl.store(out_ptr + columns, to_fp8(out, tl.load(scale_ptr)), mask=columns < inter)


@triton.jit
def _gate_up_one_kernel(
    rows_ptr,
    w_ptr,
    shared_ptr,
    out_ptr,
    shared_out_ptr,
    id_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_scale_ptr,
    shared_x_scale_ptr,
    shared_w_scale_ptr,
    shared_out_scale_ptr,
    inter,
    shared_inter,
    MODEL_DTYPE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    shared_programs = tl.cdiv(shared_inter, OUTPUTS)
    program = tl.program_id(0)
    if program < shared_programs:
        first = program * OUTPUTS
        rows, inside = _pairs(first, shared_inter, OUTPUTS)
        tiles = _load_tiles(shared_ptr, rows, inside, DEPTH, STEP)
        scale = tl.load(shared_w_scale_ptr + rows, mask=inside, other=0.0) * tl.load(shared_x_scale_ptr)
        wait_for_inputs(OVERLAP)
        total = _multiply(tiles, rows_ptr + ROWS * DEPTH, DEPTH, 2 * OUTPUTS, STEP) * scale
        _store_pairs(total, shared_out_scale_ptr, shared_out_ptr, first, shared_inter, MODEL_DTYPE, OUTPUTS)
    else:
        wait_for_inputs(OVERLAP)
        expert = tl.load(id_ptr)
        if expert >= 0:  # -1: another rank's
            first = (program - shared_programs) * OUTPUTS
            rows, inside = _pairs(first, inter, OUTPUTS)
            tiles = _load_tiles(w_ptr + expert.to(tl.int64) * 2 * inter * DEPTH, rows, inside, DEPTH, STEP)
            scale = tl.load(x_scale_ptr) * tl.load(w_scale_ptr + expert)
            total = _multiply(tiles, rows_ptr, DEPTH, 2 * OUTPUTS, STEP) * scale
            _store_pairs(total, out_scale_ptr, out_ptr, first, inter, MODEL_DTYPE, OUTPUTS)


_POINTERS = {
    "rows_ptr": "*fp8e4nv",
    "w_ptr": "*fp8e4nv",
    "shared_ptr": "*fp8e4nv",
    "out_ptr": "*fp8e4nv",
    "shared_out_ptr": "*fp8e4nv",
    "id_ptr": "*i32",
}
_SCALES = dict.fromkeys(
    (
        "x_scale_ptr",
        "w_scale_ptr",
        "out_scale_ptr",
        "shared_x_scale_ptr",
        "shared_w_scale_ptr",
        "shared_out_scale_ptr",
    ),
    "*fp32",
)
AOT_SPECS = [
    (
        _gate_up_one_kernel,
        {**_POINTERS, **_SCALES, "inter": "i32", "shared_inter": "i32"},
        {"MODEL_DTYPE": tl.bfloat16, "DEPTH": 5120, "ROWS": 16, "OUTPUTS": 1, "STEP": 1024, "OVERLAP": True},
        {"num_warps": 2},
        ("rows_ptr", "w_ptr", "shared_ptr", "out_ptr", "shared_out_ptr", "inter", "shared_inter"),
    )
]
