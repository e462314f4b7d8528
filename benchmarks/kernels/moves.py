"""Kernels that multiply nothing: ``python -m benchmarks.kernels.moves --json OUT``.

Rows of an embedding table in host memory, NVFP4 weights decoded to memory, and the splits of decode attention merged,
at Scout's sizes. The floor is each input read once and each output written once; for embeddings it is their bytes at
the rate of a large copy from the host. Each is compared with plain torch before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.language as tl

from benchmarks.kernels.common import Report, copied_bytes_per_s, graph_us, parse_args
from benchmarks.kernels.elementwise import expect, sets
from benchmarks.record import end_with
from outrider.kernels._dispatch import ceil_div, num_sms, power_of_two_at_least
from outrider.kernels.attention_decode import MERGE_WARPS, DecodeTile, pick_num_splits
from outrider.kernels.attention_merge import _merge_kernel
from outrider.kernels.embedding import embedding_triton
from outrider.kernels.nvfp4 import dequantize_nvfp4
from outrider.kernels.nvfp4_decode import FP8_SHIFT, dequantize_nvfp4_triton, nvfp4_to_fp8_triton
from outrider.kernels.overlap import overlap_options

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = torch.bfloat16
HIDDEN, ROWS, H, K, D = 5120, 32_768, 40, 8, 128
"""``ROWS``: enough that no row is read twice in a graph; the table of 202,048 takes seconds to fill."""
TOKENS = (1, 64, 512, 8192)
WEIGHTS = {"qkv": (7168, 5120), "gate_up": (16384, 5120)}
SEQUENCES, CONTEXT, V_SCALE = (17, 64, 128), 8192, 0.03
"""Up to 16 sequences the decode kernel merges its own splits."""


def bench_embedding(report: Report, table: torch.Tensor, tokens: int, bus: float) -> None:
    """``tokens`` rows of ``table``, which the host holds; ``bus``: bytes a second from there."""
    count = max(1, min(16, len(table) // tokens))
    picks = torch.randperm(len(table))[: count * tokens].view(count, tokens).to(DEVICE)
    expected = table[picks[0].cpu()]
    expect("embedding", embedding_triton(picks[0], table).cpu(), expected, 1e-12)
    calls: list[Callable[[], object]] = [lambda ids=ids: embedding_triton(ids, table) for ids in picks]
    report.memory(f"embedding T={tokens}", "table of the host", graph_us(calls), expected.nbytes, bus)


def bench_decode(report: Report, name: str, num_outputs: int, depth: int) -> None:
    """A matrix of NVFP4 weights as bf16 and as e4m3."""
    top = torch.tensor(0.01, device=DEVICE)

    def weights() -> tuple[torch.Tensor, torch.Tensor]:
        packed = torch.randint(256, (num_outputs, depth // 2), dtype=torch.uint8, device=DEVICE)
        scale = torch.rand(num_outputs, depth // 16, device=DEVICE) + 0.5
        return packed, scale.to(torch.float8_e4m3fn)

    packed, scale = weights()
    exact = dequantize_nvfp4(packed, scale, top, torch.float32)
    expect("nvfp4 to bf16", dequantize_nvfp4_triton(packed, scale, top, BF16), exact, 5e-3)
    as_fp8 = nvfp4_to_fp8_triton(packed, scale).float() * (top * 2**FP8_SHIFT)
    expect("nvfp4 to fp8", as_fp8, exact, 5e-2)
    num_read = packed.nbytes + scale.nbytes
    inputs = [(packed, scale), *(weights() for _ in range(sets(num_read) - 1))]
    case = f"nvfp4 decode {name}"
    calls: list[Callable[[], object]] = [lambda w=w: dequantize_nvfp4_triton(*w, top, BF16) for w in inputs]
    report.memory(case, "to bf16", graph_us(calls), num_read + 2 * exact.numel())
    calls = [lambda w=w: nvfp4_to_fp8_triton(*w) for w in inputs]
    report.memory(case, "to fp8", graph_us(calls), num_read + exact.numel())


def bench_merge(report: Report, num_seqs: int, num_splits: int, context: int) -> None:
    """The splits of ``num_seqs`` sequences of ``context`` tokens, as decode attention leaves them."""
    tile = DecodeTile().tokens
    tiles = ceil_div(context, tile)
    used = ceil_div(tiles, ceil_div(tiles, num_splits))
    lens = torch.full((num_seqs,), context, dtype=torch.int32, device=DEVICE)

    def run(partial: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        out = torch.empty(num_seqs, H * D, dtype=BF16, device=DEVICE)
        _merge_kernel[(H, num_seqs)](
            partial, lse, lens, out, num_splits, V_SCALE, None,
            D=D, TILE=tile, CHUNK=0, SPLITS=power_of_two_at_least(num_splits, 2), MODEL_DTYPE=tl.bfloat16,
            QUANTIZE=False, num_warps=MERGE_WARPS, **overlap_options(DEVICE, num_seqs),
        )  # fmt: skip
        return out

    def splits() -> tuple[torch.Tensor, torch.Tensor]:
        shape = (num_seqs, H, num_splits)
        return torch.randn(*shape, D, device=DEVICE), 3 * torch.randn(shape, device=DEVICE)

    partial, lse = splits()
    mass = torch.softmax(lse[..., :used].double() * torch.log(torch.tensor(2.0)), -1)
    exact = torch.einsum("nhs,nhsd->nhd", mass, partial[..., :used, :].double()) * V_SCALE
    expect("merge", run(partial, lse), exact.flatten(1), 5e-3)
    num_bytes = num_seqs * H * (used * (D + 1) * 4 + D * 2)
    inputs = [(partial, lse), *(splits() for _ in range(sets(num_bytes) - 1))]
    calls: list[Callable[[], object]] = [lambda i=i: run(*i) for i in inputs]
    report.memory(f"merge {num_seqs} x {num_splits} splits", "", graph_us(calls), num_bytes)


def main() -> None:
    """Check and time each at every size."""
    args = parse_args(__doc__ or "")
    report = Report("moves", args.json)
    table = torch.empty(ROWS, HIDDEN, dtype=BF16, pin_memory=True).normal_()
    bus = copied_bytes_per_s(torch.empty_like(table, device=DEVICE), table)
    print(f"from the host: {bus / 1e9:.0f} GB/s", flush=True)
    for tokens in TOKENS:
        bench_embedding(report, table, tokens, bus)
    for name, (num_outputs, depth) in WEIGHTS.items():
        bench_decode(report, name, num_outputs, depth)
    for num_seqs in SEQUENCES:
        num_splits = pick_num_splits(num_seqs, K, CONTEXT, num_sms(DEVICE), DecodeTile())
        bench_merge(report, num_seqs, num_splits, CONTEXT)
    report.write()


if __name__ == "__main__":
    end_with(main)
