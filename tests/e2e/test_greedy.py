"""The embedded model through HTTP against `transformers`: ids, texts, log probabilities."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import openai
import pytest

from tests.e2e.oracle import Oracle, comparable
from tests.e2e.server_process import ServerProcess

MODEL = "SmolLM2-135M-Instruct"
PROMPTS = (
    "Water boils at a lower temperature in the mountains because",
    "Le petit chat est monté sur la table et",
    "1, 1, 2, 3, 5, 8,",
    "Dear Ms Okafor,\n\nthank you for",
    "x",
)


def test_recorded_ids(embedded: ServerProcess, shared: Path) -> None:
    """Guards weights, rope permutation and pre-tokenizer: ids that another machine recorded."""
    recorded = json.loads((shared / "fixtures" / "smollm2_greedy.json").read_text())["prompts"]
    for entry in recorded:
        ids, count = entry["greedy_ids"], comparable(entry["greedy_margins"])
        assert count >= 8
        # Text of a completion never becomes a special token, so the rendered chat goes in as ids.
        prompts = [entry["prompt_ids"]] + ([entry["text"]] if entry["kind"] == "completion" else [])
        for prompt in prompts:
            choice = embedded.complete(prompt=prompt, max_tokens=len(ids), temperature=0, ignore_eos=True)
            assert choice["prompt_token_ids"] == entry["prompt_ids"]
            assert choice["token_ids"][:count] == ids[:count]


def test_chat_template_and_end(client: openai.OpenAI, shared: Path) -> None:
    """Guards the template's default system turn, and that the end token ends the answer and stays out of it."""
    entry = json.loads((shared / "fixtures" / "smollm2_greedy.json").read_text())["prompts"][2]
    question = entry["text"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], temperature=0
    )
    choice = answer.choices[0]
    assert choice.message.content == entry["greedy_text"].removesuffix("<|im_end|>")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(entry["prompt_ids"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_texts_of_transformers(embedded: ServerProcess, oracle: Oracle, prompt: str) -> None:
    """Guards the whole way from text to text: encoding, arithmetic, detokenizing, end of generation."""
    theirs, margins = oracle.greedy(oracle.tokenizer(prompt)["input_ids"], 40)
    choice = embedded.complete(prompt=prompt, max_tokens=40, temperature=0)
    count = comparable(margins)
    assert choice["token_ids"][:count] == theirs[:count]
    text = oracle.tokenizer.decode(theirs[:count], skip_special_tokens=True)
    assert choice["text"].startswith(text.rstrip("\ufffd"))
    if count == len(theirs):
        assert choice["text"] == text


def test_streams_say_the_same(client: openai.OpenAI, embedded: ServerProcess) -> None:
    """Guards against deltas that lose or repeat text, and against usage that differs from the whole answer's."""
    body = dict(model=MODEL, prompt=PROMPTS[1], max_tokens=30, temperature=0)
    whole = client.completions.create(**body)  # type: ignore[call-overload]
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == 30
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


@pytest.mark.parametrize("prompt", [PROMPTS[0], "ö" * 40, "The end."])
def test_loglikelihood(client: openai.OpenAI, oracle: Oracle, prompt: str) -> None:
    """Guards scoring (echo, logprobs, max_tokens 1): the value of each prompt token, off by one or by softmax."""
    ids = oracle.tokenizer(prompt)["input_ids"]
    theirs = oracle.logprobs(ids)
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    values = logprobs.token_logprobs
    assert len(values) == len(ids) + 1 and values[0] is None
    for position, token in enumerate(ids[1:]):
        ours = values[position + 1]
        assert ours is not None and abs(ours - float(theirs[position, token])) < 1e-3
        top = logprobs.top_logprobs[position + 1]
        assert abs(max(top.values()) - float(theirs[position].max())) < 1e-3
    assert abs((values[-1] or math.nan) - float(theirs[-1].max())) < 1e-3


def test_long_prompts_score_the_same(client: openai.OpenAI, oracle: Oracle) -> None:
    """Guards prompt log probabilities across prefill chunks: 700 random ids are more than one step's budget."""
    rng = random.Random(7)
    ids = [rng.randrange(1000, 40000) for _ in range(700)]
    theirs = oracle.logprobs(ids)
    answer = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=1, temperature=0, echo=True, logprobs=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    worst = max(
        abs((value or math.nan) - float(theirs[i, ids[i + 1]]))
        for i, value in enumerate(logprobs.token_logprobs[1:-1])
    )
    assert worst < 1e-3
