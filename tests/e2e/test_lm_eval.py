"""``lm_eval`` as its users run it, against the embedded model: generation and scoring, data without a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outrider.tools.eval_gsm8k import write_local_task
from tests.e2e.oracle import Oracle, comparable
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_greedy import MODEL

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra: eval)")

SCORING_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    ("The capital of France is", ["Paris", "London", "bananas and"], 0),
    ("Two plus two equals", ["seven thousand", "four"], 1),
    ("The sun rises in the", ["east", "kitchen sink"], 0),
    ("She poured the tea into a", ["carburettor", "cup"], 1),
]


def run_lm_eval(url: str, folder: Path, *words: str, model: str, args: str) -> dict[str, object]:
    """Run the program inside ``folder``; returns the results that it wrote."""
    program = Path(sys.executable).with_name("lm_eval")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    base = f"base_url={url},model={MODEL},num_concurrent=8,timeout=120,max_retries=1,{args}"
    command = [str(program), "--model", model, "--model_args", base, "--include_path", str(folder)]
    command += ["--output_path", str(folder / "out"), "--log_samples", *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "out").rglob("results_*.json")
    return dict(json.loads(path.read_text()))


def samples(folder: Path) -> list[dict[str, object]]:
    """What lm_eval logged of each question, in order; one entry per question."""
    (path,) = (folder / "out").rglob("samples_*.jsonl")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted({entry["doc_id"]: entry for entry in entries}.values(), key=lambda entry: entry["doc_id"])


@pytest.mark.parametrize(
    "limit", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["3 questions", "20 questions"]
)
def test_gsm8k(embedded: ServerProcess, oracle: Oracle, shared: Path, tmp_path: Path, limit: int) -> None:
    """Guards the recipe's evaluation: it ends, and answers are those of `transformers` up to the stop string."""
    write_local_task(shared / "data" / "gsm8k", tmp_path)
    words = ("--tasks", "gsm8k", "--num_fewshot", "5", "--limit", str(limit))
    args = "tokenized_requests=False,tokenizer_backend=None"
    url = f"{embedded.url}/v1/completions"
    results = run_lm_eval(url, tmp_path, *words, model="local-completions", args=args)
    assert results["n-samples"]["gsm8k"]["effective"] == limit  # type: ignore[index]
    for entry in samples(tmp_path)[:3]:
        prompt = entry["arguments"]["gen_args_0"]["arg_0"]  # type: ignore[index]
        answer = str(entry["resps"][0][0])  # type: ignore[index]
        assert prompt.count("Question:") == 6
        theirs, margins = oracle.greedy(oracle.tokenizer(prompt)["input_ids"], 48)
        text = oracle.tokenizer.decode(theirs[: comparable(margins)], skip_special_tokens=True)
        text = text.split("Question:")[0]
        assert len(text) > 20 and "Question:" not in answer
        # The comparison may end inside a stop string, of which the answer holds nothing.
        assert answer.startswith(text) or (
            text.startswith(answer) and "Question:".startswith(text[len(answer) :])
        )


@pytest.mark.slow
def test_gsm8k_by_chat(embedded: ServerProcess, shared: Path, tmp_path: Path) -> None:
    """Guards ``local-chat-completions``: messages in, content out, the task's stop strings honoured."""
    write_local_task(shared / "data" / "gsm8k", tmp_path)
    words = ("--tasks", "gsm8k", "--num_fewshot", "1", "--limit", "3", "--apply_chat_template")
    url = f"{embedded.url}/v1/chat/completions"
    run_lm_eval(url, tmp_path, *words, model="local-chat-completions", args="tokenized_requests=False")
    assert len(samples(tmp_path)) == 3


def test_scoring_task(embedded: ServerProcess, oracle: Oracle, tmp_path: Path) -> None:
    """Guards loglikelihood with the server's own tokenizer: lm_eval's sums are those of `transformers`."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_choice.yaml").write_text(SCORING_TASK.format(data=data))
    args = "tokenizer_backend=remote"
    url = f"{embedded.url}/v1/completions"
    results = run_lm_eval(url, tmp_path, "--tasks", "tiny_choice", model="local-completions", args=args)
    assert results["results"]["tiny_choice"]["acc,none"] == 1.0  # type: ignore[index]
    for (question, choices, _), entry in zip(QUESTIONS, samples(tmp_path), strict=True):
        for choice, response in zip(choices, entry["resps"], strict=True):  # type: ignore[call-overload]
            context = oracle.tokenizer(question)["input_ids"]
            ids = oracle.tokenizer(f"{question} {choice}")["input_ids"]
            assert ids[: len(context)] == context
            table = oracle.logprobs(ids)
            want = sum(float(table[i - 1, ids[i]]) for i in range(len(context), len(ids)))
            assert abs(float(response[0][0]) - want) < 1e-3
