"""``outrider eval gsm8k`` and the recipe's own lm_eval command, against a server that knows some of the answers."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from local_gsm8k import place

from outrider.errors import ConfigError, OutriderError
from outrider.tools import eval_gsm8k
from outrider.tools.recipe_figures import GSM8K


def half_right(data):
    """A reply function that answers every second test question rightly."""
    lines = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    answers = {entry["question"]: (i, entry["answer"]) for i, entry in enumerate(lines)}

    def reply(prompt):
        question = prompt.rsplit("Question: ", 1)[1].removesuffix("\nAnswer:")
        index, answer = answers[question]
        return " " + answer if index % 2 == 0 else " I think it is 123456789."

    return reply


def parse(*words):
    parser = argparse.ArgumentParser()
    eval_gsm8k.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.mark.slow
def test_scores_and_tables_from_local_data(fake, shared, offline, tmp_path, capsys):
    """Guards: a task that scores otherwise than lm_eval's gsm8k, other request arguments, a hub needed."""
    data = shared / "data" / "gsm8k"
    server = fake(reply=half_right(data))
    output = tmp_path / "out.json"
    words = ("--base-url", server.url, "--data", str(data), "--limit", "11", "--output", str(output))
    assert eval_gsm8k.run(parse(*words)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\|gsm8k\|\s+3\|flexible-extract\|\s+5\|exact_match\|↑\s+\|0\.5455\|±", printed), (
        printed
    )
    assert "|0.9219|0.0074|   0.9071|" in printed and "no verdict" in printed and "FAIL" not in printed
    assert json.loads(output.read_text())["results"]["gsm8k"]["exact_match,strict-match"] == pytest.approx(
        6 / 11
    )
    body = server.served[0].body
    assert body["prompt"].count("Question: ") == 6 and body["temperature"] == 0 and body["seed"] == 1234
    assert body["stop"] == ["Question:", "</s>", "<|im_end|>"] and "stream" not in body


@pytest.mark.slow
def test_the_recipes_command_word_for_word(fake, shared, tmp_path):
    """Guards: the folder trick that lets the verbatim command run without a hub stops working."""
    recipe = (shared / "recipe" / "llama4-scout-on-vllm.md").read_text()
    command = re.search(r"^lm_eval \\\n.*?^num_concurrent[^\n]*$", recipe, re.S | re.M).group(0)
    data = shared / "data" / "gsm8k"
    place(data, tmp_path)
    server = fake(reply=half_right(data))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HOST": "127.0.0.1", "PORT": str(server.port), "HF_HUB_OFFLINE": "1"}
    env |= {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        ["bash", "-c", f"{command} --limit 8"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert re.search(
        r"\|gsm8k\|\s+3\|flexible-extract\|\s+5\|exact_match\|↑\s+\|\s*0\.5\d*\|±", done.stdout
    ), done
    assert re.search(r"\|strict-match\s+\|\s+5\|exact_match\|↑\s+\|\s*0\.5\d*\|±", done.stdout)


def test_pass_mark_and_exit_code(monkeypatch, capsys):
    """Guards: a full run below the mark that exits 0, the FP8 mark applied to FP4, a mark above the recipe."""
    for choice, flexible, code in (
        ("fp8", 0.9070, 1),
        ("fp8", 0.9072, 0),
        ("fp4", 0.9070, 0),
        ("none", 0.1, 0),
    ):
        scores = {"exact_match,flexible-extract": flexible, "exact_match,strict-match": 0.95}
        monkeypatch.setattr(eval_gsm8k, "_evaluate", lambda *a, s=scores: {"results": {"gsm8k": s}})
        monkeypatch.setattr(eval_gsm8k, "_lm_eval_table", lambda results: "")
        assert eval_gsm8k.run(parse("--model", "m", "--recipe", choice)) == code, choice
        assert ("FAIL" in capsys.readouterr().out) == bool(code)
    assert eval_gsm8k._recipe_scores("auto", "nvidia/Llama-4-Scout-17B-16E-Instruct-FP4") == GSM8K["fp4"]


def test_missing_data_is_named(tmp_path):
    """Guards: a stack of tracebacks from lm_eval for a wrong --data."""
    with pytest.raises(ConfigError, match=r"train\.jsonl"):
        eval_gsm8k.write_local_task(tmp_path, tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": 3}\n')
    with pytest.raises(ConfigError, match=r"train\.jsonl:2 is not a JSON object"):
        eval_gsm8k.write_local_task(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "words", ["--limit 0", "--limit -3", "--num-concurrent 0", "--timeout 0", "--max-retries 0"]
)
def test_numbers_are_checked_before_anything_starts(words):
    """Guards: the first minus three questions, or an evaluation that sends nothing."""
    with pytest.raises(ConfigError, match=f"{words.split()[0]} .* out of range"):
        eval_gsm8k.run(parse("--model", "m", *words.split()))


@pytest.mark.slow
def test_what_ends_lm_eval_is_one_sentence(shared, offline):
    """Guards: a traceback of three libraries when the hub or the server is away."""
    words = ("--model", "m", "--base-url", "http://127.0.0.1:9", "--limit", "1", "--max-retries", "1")
    with pytest.raises(OutriderError, match=r"could not be fetched .*--data DIR\.$"):
        eval_gsm8k.run(parse(*words))
    with pytest.raises(OutriderError, match=r"gave up .*Connect call failed"):
        eval_gsm8k.run(parse(*words, "--data", str(shared / "data" / "gsm8k")))
