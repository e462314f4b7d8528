"""``--deterministic``: every prompt's bits alone and in every kind of company, and what the mode costs.

    python -m benchmarks.determinism [--model FOLDER] [--prompts 1000] [--layers N] [--out FILE] [--device cpu]

Each prompt runs alone, then all of them run in company at random times and in random order, cut into small chunks,
with a prefix cache, with a cache so small that requests are preempted, and in the plain loop. Token ids and
log-probabilities (three alternatives) are compared bit by bit; half of the prompts are sampled. The same is done
without the flag, which shows what the comparison can see and what the mode costs. Exits 1 when a bit differs.

``--layers`` makes a shallow copy of the model's config with dummy weights: no weights are read. On a GPU prompts and
answers are eight times as long, images are left out, and CUDA graphs are used as in a server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import about, end_with, need_cuda, write
from outrider.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.models.gguf import embedded_model_path
from outrider.runner.setup import build_engine
from outrider.types import Request, SamplingParams

Bits = dict[str, list[Any]]
LONGER_ON_GPU = 8


def requests(count: int, vocab_size: int, scale: int) -> list[Request]:
    """Prompts of 1 to 40 tokens, times ``scale``, many with common beginnings; every other one is sampled."""
    rng = random.Random(11)
    stems = [[rng.randrange(vocab_size) for _ in range(24 * scale)] for _ in range(6)]
    made = []
    for i in range(count):
        stem = rng.choice(stems)[: scale * rng.choice((0, 0, 9, 17, 24))]
        ids = stem + [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 16 * scale))]
        sampling = SamplingParams(
            max_tokens=6 * scale, temperature=float(i % 2), seed=i, logprobs=3, ignore_eos=True
        )
        made.append(Request(request_id=f"r{i}", prompt_token_ids=ids, sampling=sampling))
    return made


def build(args: argparse.Namespace, **changes: Any) -> Engine:
    """An engine; ``changes`` are what a variant is about."""
    scale = args.scale
    settings: dict[str, Any] = {
        "max_model_len": 64 * scale,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 128 * scale,
        "num_gpu_blocks_override": 1200,
        "block_size": 4 * scale,
        "device": args.device,
        "load_format": "dummy" if args.layers else "auto",
        "language_model_only": scale > 1,
        "enable_prefix_caching": False,
        "deterministic": args.worker == "yes",
        **changes,
    }
    return build_engine(EngineConfig(model=args.model, **settings), lambda *_: None)[0]


def run(engine: Engine, work: list[Request], arrivals: random.Random | None) -> Bits:
    """Ids and log-probabilities of every request; with ``arrivals`` they come in at random times and order."""
    out: Bits = {request.request_id: [] for request in work}
    waiting = list(work)
    if arrivals is not None:
        arrivals.shuffle(waiting)
    while waiting or engine.has_work:
        if waiting and (arrivals is None or not engine.has_work or arrivals.random() < 0.5):
            for _ in range(1 if arrivals is None else arrivals.randrange(1, 24)):
                if waiting:
                    assert not engine.add(waiting.pop(0))
        if arrivals is None:
            while engine.has_work:
                take(engine, out)
        else:
            take(engine, out)
    engine.scheduler.check_integrity()
    return out


def start_too_many(engine: Engine) -> None:
    """Let admission believe that answers take no room, so that running requests have to be preempted."""
    estimator: Any = engine.scheduler.starts.estimator
    estimator.expected_total = lambda seq: seq.prompt_len
    estimator.is_regular = lambda seq: False


def take(engine: Engine, out: Bits) -> None:
    """One step."""
    for event in engine.step():
        assert event.finish_reason != "error", event.error
        for token, entry in zip(event.token_ids, event.logprobs or [], strict=True):
            out[event.request_id].append([token, entry.logprob, entry.top_ids, entry.top_logprobs])


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """How many prompts differ from their run alone, per variant, and the seconds of a run alone and in company."""
    count, scale = args.prompts, args.scale
    engine = build(args)
    work = requests(count, 900, scale)
    clock = time.process_time if scale == 1 else time.perf_counter  # a CPU may be shared
    run(engine, work[: min(count, 32)], random.Random(0))  # what is compiled on first use
    start = clock()
    alone = run(engine, work, None)
    middle = clock()
    variants = {"in company": run(engine, work, random.Random(1))}
    end = clock()
    engine.shutdown()
    small = 7 * scale
    for name, changes in {
        "in chunks of 7" if scale == 1 else f"in chunks of {small}": {
            "max_num_batched_tokens": small,
            "max_num_seqs": 7,
        },
        "prefix hits": {"enable_prefix_caching": True},
        "preempted": {"num_gpu_blocks_override": 60},
        "plain loop": {"async_scheduling": False},
        **({"without graphs": {"enforce_eager": True}} if scale > 1 else {}),
    }.items():
        engine = build(args, **changes)
        if name == "preempted":
            start_too_many(engine)
        variants[name] = run(engine, work, random.Random(2))
        stats = engine.stats()
        assert name != "preempted" or count < 50 or stats.preemptions > count // 50, stats
        assert name != "prefix hits" or count < 50 or stats.cached_prompt_tokens > count, stats
        engine.shutdown()
        del engine
    differing = {name: sum(bits[r] != alone[r] for r in alone) for name, bits in variants.items()}
    return {
        "differing": differing,
        "alone_s": round(middle - start, 3),
        "in_company_s": round(end - middle, 3),
    }


def shallow_copy(model: str, num_layers: int, folder: Path) -> str:
    """The model's JSON files in ``folder``, its decoder cut to the first ``num_layers`` layers."""
    for file in Path(model).glob("*.json"):
        if not file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    for name, value in text.items():
        if isinstance(value, list) and len(value) == text["num_hidden_layers"]:
            text[name] = value[:num_layers]
    if isinstance(text.get("moe_layers"), list):
        text["moe_layers"] = [i for i in text["moe_layers"] if i < num_layers]
    text["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def measured(args: argparse.Namespace, deterministic: str) -> dict[str, Any]:
    """``compare`` in a process of its own: the mode is decided once for a process. Where that fails, this one ends."""
    command = [sys.executable, "-m", "benchmarks.determinism", "--worker", deterministic]
    command += ["--model", args.model, "--prompts", str(args.prompts), "--device", args.device]
    command += ["--layers", str(args.layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(argv: list[str]) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=0, help="so many layers, with dummy weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--worker", choices=("yes", "no"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.model = args.model or str(embedded_model_path())
    if args.device == "cuda":
        need_cuda("--device cuda")
    args.scale = LONGER_ON_GPU if args.device == "cuda" else 1
    if args.worker:
        if args.device == "cpu":  # small products on busy cores wait for each other
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        with tempfile.TemporaryDirectory() as folder:
            if args.layers:
                args.model = shallow_copy(args.model, args.layers, Path(folder))
            print(json.dumps(compare(args)))
        return 0
    result: dict[str, Any] = {
        **about("benchmarks.determinism", argv, device="CPU, one core" if args.device == "cpu" else None),
        "model": "/".join(Path(args.model).parts[-2:]),
        "layers": args.layers or "all",
        "prompts": args.prompts,
        "deterministic": measured(args, "yes"),
        "ordinary": measured(args, "no"),
    }
    for name in ("alone_s", "in_company_s"):
        ratio = result["deterministic"][name] / result["ordinary"][name]
        result[f"cost_{name.removesuffix('_s')}"] = round(ratio, 2)
    print(json.dumps(result))
    write(args.out, result)
    return int(any(result["deterministic"]["differing"].values()))


if __name__ == "__main__":
    end_with(lambda: main(sys.argv[1:]))
