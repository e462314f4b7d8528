"""The embedded model on this machine: outrider over HTTP against `transformers` `generate`, same weights.

    python -m benchmarks.embedded [--clients 64] [--tokens 64] [--json FILE]

Starts a real server process, measures one stream and then many at once, stops it, and lets `transformers`
(float32, weights dequantised from the same GGUF file) generate the same prompts one at a time. Prints both and
the ratios; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.record import about, end_with, write

PROMPTS = (
    "The history of the harbour begins with",
    "def quicksort(items):",
    "Water boils at a lower temperature in the mountains because",
    "Dear Ms Okafor, thank you for",
    "The three largest moons of Jupiter are",
    "Once the train had left the station,",
    "To bake bread at home you need",
    "In 1969 the first message was sent between",
)
READY = "Application startup complete."


def start_server(port: int) -> subprocess.Popen[str]:
    """A server of the embedded model on ``port``, ready to answer."""
    command = [sys.executable, "-m", "outrider", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-num-seqs", "64", "--max-model-len", "2048", "--no-enable-prefix-caching"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if READY in line:
            return process
    raise SystemExit("the server did not start")


async def stream(client: httpx.AsyncClient, prompt: str, num_tokens: int) -> tuple[int, float, float]:
    """``(tokens, time to first token, whole time)`` of one streamed completion, in seconds."""
    body = {
        "model": "",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first, tokens = 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - start
            usage = json.loads(line[6:]).get("usage")
            tokens = usage["completion_tokens"] if usage else tokens
    return tokens, first, time.perf_counter() - start


async def measure_server(port: int, clients: int, num_tokens: int) -> dict[str, float]:
    """Tokens a second of one stream (median of three) and of ``clients`` at once."""
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:
        await stream(client, PROMPTS[0], 8)
        singles = []
        for prompt in PROMPTS[:3]:
            tokens, first, whole = await stream(client, prompt, num_tokens)
            singles.append((tokens - 1) / (whole - first))
        start = time.perf_counter()
        jobs = [stream(client, PROMPTS[i % len(PROMPTS)], num_tokens) for i in range(clients)]
        results = await asyncio.gather(*jobs)
        elapsed = time.perf_counter() - start
    if any(tokens != num_tokens for tokens, _, _ in results):
        raise SystemExit("a stream came back short")
    return {
        "single_tok_s": statistics.median(singles),
        "concurrent_tok_s": clients * num_tokens / elapsed,
        "mean_ttft_s": statistics.mean(first for _, first, _ in results),
    }


def measure_transformers(num_tokens: int) -> float:
    """Tokens a second of `generate`, one request at a time (median of three, after one to warm up)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from outrider.models.gguf import embedded_model_path

    path = embedded_model_path()
    load: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **load)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **load).eval()
    rates = []
    for prompt in (PROMPTS[0], *PROMPTS[:3]):
        inputs = tokenizer(prompt, return_tensors="pt")
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
            )
        elapsed = time.perf_counter() - start
        rates.append((out.shape[1] - inputs["input_ids"].shape[1]) / elapsed)
    return statistics.median(rates[1:])


def main() -> None:
    """Measure both and print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    server = start_server(args.port)
    try:
        ours = asyncio.run(measure_server(args.port, args.clients, args.tokens))
    finally:
        server.terminate()
        server.wait(timeout=60)
    theirs = measure_transformers(args.tokens)
    result = {
        **about("benchmarks.embedded"),
        **{key: round(value, 2) for key, value in ours.items()},
        "transformers_tok_s": round(theirs, 2),
        "single_ratio": round(ours["single_tok_s"] / theirs, 2),
        "concurrent_ratio": round(ours["concurrent_tok_s"] / theirs, 2),
        "clients": args.clients,
        "tokens": args.tokens,
    }
    rows = (
        ("transformers generate, one at a time", theirs, 1.0),
        ("outrider, one stream", ours["single_tok_s"], result["single_ratio"]),
        (f"outrider, {args.clients} streams at once", ours["concurrent_tok_s"], result["concurrent_ratio"]),
    )
    for label, rate, ratio in rows:
        print(f"{label:<40} {rate:8.1f} tok/s  x{ratio}")
    write(args.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    end_with(main)
