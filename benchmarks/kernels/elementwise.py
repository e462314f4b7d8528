"""Norm, activation and rope on a GPU: ``python -m benchmarks.kernels.elementwise --json OUT``.

Shapes of Llama 4 Scout on one GPU. All are memory-bound: the floor is each input read once, each output written
once; at few tokens it is the launch itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels.common import Report, graph_us, parse_args, relative_error
from benchmarks.record import end_with
from outrider.kernels.activation import silu_mul, silu_mul_reference
from outrider.kernels.norm import LazySum, rms_norm, rms_norm_operand, rms_norm_reference
from outrider.kernels.quantize import Fp8Form, Fp8Rows, Operand
from outrider.kernels.rope import RopeSpec, qkv_rope_store, qkv_rope_store_reference

M, INTER, H, K, D, BLOCK = 5120, 8192, 40, 8, 128, 64
TOKENS = (1, 64, 400, 1315, 8192)
BF16 = torch.bfloat16


def random(*shape: int) -> torch.Tensor:
    """Random bf16 on the device."""
    return torch.randn(*shape, device="cuda", dtype=BF16)


def sets(num_bytes: int) -> int:
    """Input sets to rotate among, so that they exceed the L2 cache where that is cheap."""
    return max(2, min(16, (100 << 20) // num_bytes))


def expect(name: str, out: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    """Stop when an op is wrong: its time would mean nothing."""
    error = relative_error(out, exact)
    if not error < bound:
        raise SystemExit(f"{name}: relative error {error:.2e} exceeds {bound:.0e}")


def as_wide(rows: Operand) -> torch.Tensor:
    """The values that an operand stands for, float32."""
    return rows.codes.float() * rows.scale.reshape(-1, 1) if isinstance(rows, Fp8Rows) else rows.float()


def bench_norm(report: Report, tokens: int, name: str, form: Fp8Form) -> None:
    """Residual addition and norm: FP8 output beside the plain one, and alone, also of a sum not yet made."""
    weight, x, h = random(M), random(tokens, M), random(tokens, M)
    expected = rms_norm_reference(x.double(), weight.double(), 1e-5, h.double()).y
    out = rms_norm(x, weight, 1e-5, h.clone(), form)
    expect("rms_norm", out.y, expected, 1e-2)
    expect(f"rms_norm {name}", as_wide(out.operand), expected, 5e-2)
    num_bytes = tokens * M * (2 + 2 + 2 + 2 + 1)
    inputs = [(random(tokens, M), random(tokens, M), random(tokens, M)) for _ in range(sets(num_bytes))]

    def beside(x: torch.Tensor, residual: torch.Tensor, _: torch.Tensor) -> object:
        return rms_norm(x, weight, 1e-5, residual, form)

    def alone(x: torch.Tensor, residual: torch.Tensor, _: torch.Tensor) -> object:
        return rms_norm_operand(x, weight, 1e-5, residual, form)

    def of_a_sum(x: torch.Tensor, residual: torch.Tensor, second: torch.Tensor) -> object:
        return rms_norm_operand(LazySum(x, second), weight, 1e-5, residual, form)

    for case, op, moved in (
        ("residual+rms_norm+fp8", beside, num_bytes),
        ("residual+rms_norm, fp8 alone", alone, num_bytes - 2 * tokens * M),
        ("sum+residual+rms_norm, fp8 alone", of_a_sum, num_bytes),
    ):
        calls: list[Callable[[], object]] = [lambda i=i, op=op: op(*i) for i in inputs]
        report.memory(f"{case} T={tokens}", name, graph_us(calls), moved)


def bench_silu(report: Report, tokens: int, name: str, form: Fp8Form) -> None:
    """silu * up with FP8 output."""
    x = random(tokens, 2 * INTER)
    gate, up = x.double().chunk(2, -1)
    expect("silu_mul", as_wide(silu_mul(x)), torch.nn.functional.silu(gate) * up, 1e-2)
    expect(f"silu_mul {name}", as_wide(silu_mul(x, form)), as_wide(silu_mul_reference(x, form)), 1e-2)
    num_bytes = tokens * INTER * (4 + 1)
    inputs = [random(tokens, 2 * INTER) for _ in range(sets(num_bytes))]
    calls: list[Callable[[], object]] = [lambda x=x: silu_mul(x, form) for x in inputs]
    report.memory(f"silu_mul+fp8 T={tokens}", name, graph_us(calls), num_bytes)


def bench_rope(report: Report, tokens: int, interleaved: bool) -> None:
    """Rotation, q/k norm and the store into an FP8 cache."""
    inv_freq = 500000 ** (-torch.arange(0, D, 2, device="cuda") / D)
    spec = RopeSpec(H, K, D, inv_freq.float(), interleaved, 1e-5)
    cpu_spec = RopeSpec(H, K, D, inv_freq.float().cpu(), interleaved, 1e-5)
    num_blocks = tokens // BLOCK + 2
    cache = torch.zeros(num_blocks, 4, 2, K, BLOCK, D, device="cuda").to(torch.float8_e4m3fn)
    positions = torch.randint(0, 100_000, (tokens,), device="cuda")
    slots = torch.randperm((num_blocks - 1) * BLOCK, device="cuda")[:tokens] + BLOCK

    def run(qkv: torch.Tensor, layer: int) -> torch.Tensor:
        k, v = cache[:, layer, 0], cache[:, layer, 1]
        return qkv_rope_store(qkv, positions, spec, k, v, slots, 0.02, 0.03)

    qkv = random(tokens, (H + 2 * K) * D)
    q = run(qkv, 1)
    copy = torch.zeros(cache.shape).to(torch.float8_e4m3fn)
    k, v = copy[:, 1, 0], copy[:, 1, 1]
    expected = qkv_rope_store_reference(
        qkv.cpu().float(), positions.cpu(), cpu_spec, k, v, slots.cpu(), 0.02, 0.03
    )
    expect("rope q", q.cpu(), expected, 1e-2)
    expect("rope cache", cache.cpu().float(), copy.float(), 4e-2)
    num_bytes = tokens * D * ((H + 2 * K) * 2 + H * 2 + 2 * K)
    inputs = [random(tokens, (H + 2 * K) * D) for _ in range(sets(num_bytes))]
    calls: list[Callable[[], object]] = [lambda x=x, i=i: run(x, i % 4) for i, x in enumerate(inputs)]
    variant = "interleaved" if interleaved else "half-split"
    report.memory(f"qkv_rope_store fp8 T={tokens}", variant, graph_us(calls), num_bytes)


def main() -> None:
    """Check and time every op at every size."""
    args = parse_args(__doc__ or "")
    report = Report("elementwise", args.json)
    forms = {"a scale": Fp8Form(torch.tensor(0.02, device="cuda")), "a scale a row": Fp8Form()}
    for tokens in TOKENS:
        for name, form in forms.items():
            bench_norm(report, tokens, name, form)
            bench_silu(report, tokens, name, form)
        bench_rope(report, tokens, True)
        bench_rope(report, tokens, False)
    report.write()


if __name__ == "__main__":
    end_with(main)
