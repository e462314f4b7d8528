"""Sampling on a GPU: ``python -m benchmarks.kernels.sampling --json OUT``.

Logits ``[N, 202048]`` in bf16 as Llama 4's head gives them. Greedy is memory-bound: one read of the logits.
Stochastic rows read their logits once more for every bisection step, mostly from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels.common import Report, graph_us, parse_args
from benchmarks.record import end_with
from outrider.kernels.sampling import SamplingRows, sample, sample_reference, top_logprobs

VOCAB = 202_048
CASES = {
    "greedy": (0.0, 1.0, 0, 0.0),
    "temperature": (1.0, 1.0, 0, 0.0),
    "top_p 0.9": (0.8, 0.9, 0, 0.0),
    "top_k 50": (0.8, 1.0, 50, 0.0),
    "top_k 50, top_p 0.9": (0.8, 0.9, 50, 0.0),
    "min_p 0.05": (1.0, 1.0, 0, 0.05),
}


def parameters(num_rows: int, case: str) -> SamplingRows:
    """All rows alike but for their uniform numbers."""
    temperature, top_p, top_k, min_p = CASES[case]

    def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((num_rows,), value, device="cuda", dtype=dtype)

    uniform = torch.rand(num_rows, device="cuda").clamp_(1e-6, 1 - 1e-6)
    return SamplingRows(full(temperature), full(top_p), full(top_k, torch.int32), full(min_p), uniform)


def check() -> None:
    """Kernel and reference may differ only where a rounded sum meets a uniform number."""
    logits = (torch.randn(64, VOCAB, device="cuda") * 3).bfloat16()
    for case in CASES:
        rows = parameters(64, case)
        same = int((sample(logits, rows) == sample_reference(logits, rows)).sum())
        print(f"check {case:<24} {same}/64 equal to the reference", flush=True)
        if same < (64 if case == "greedy" else 60):
            raise SystemExit(f"{case}: the kernel disagrees with the reference")


def main() -> None:
    """Check, then time every case at every size."""
    args = parse_args(__doc__ or "")
    report = Report("sampling", args.json)
    check()
    for num_rows in (1, 64, 512):
        count = 4 if num_rows < 512 else 2
        inputs = [(torch.randn(num_rows, VOCAB, device="cuda") * 3).bfloat16() for _ in range(count)]
        num_bytes = num_rows * VOCAB * 2
        for case in CASES:
            rows = parameters(num_rows, case)
            calls: list[Callable[[], object]] = [
                lambda x=x, rows=rows, case=case: sample(x, rows, case == "greedy") for x in inputs
            ]
            report.memory(f"sample N={num_rows}", case, graph_us(calls), num_bytes)
        ids = torch.randint(0, VOCAB, (num_rows,), device="cuda")
        top = [lambda x=x, ids=ids: top_logprobs(x, ids, 20) for x in inputs]
        report.memory(f"top_logprobs N={num_rows}", "k=20", graph_us(top, 5), num_bytes)
    report.write()


if __name__ == "__main__":
    end_with(main)
