"""Every way to steer or end a generation, on the real engine. The arithmetic of expectations is the test's own."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import openai
import pytest

from tests.e2e.oracle import Oracle, comparable
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_greedy import MODEL, PROMPTS

FRANCE = "The capital of France is"
EOS = 2


def whole(embedded: ServerProcess, prompt: str, **body: Any) -> dict[str, Any]:
    """A greedy choice."""
    return embedded.complete(**{"prompt": prompt, "max_tokens": 32, "temperature": 0, **body})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("include", [False, True], ids=["cut", "included"])
def test_stop_strings_across_tokens(
    client: openai.OpenAI, embedded: ServerProcess, stream: bool, include: bool
) -> None:
    """Guards against stop strings that are seen only inside one token, or of which a beginning leaks out."""
    full = whole(embedded, PROMPTS[0], logprobs=0)
    text, tokens = full["text"], full["logprobs"]["tokens"]
    # From the middle of one token to the middle of the next but one; its first place in the text decides.
    borders = list(itertools.accumulate(len(token) for token in tokens))
    starts = [i for i in range(3, len(tokens) - 4) if len(tokens[i]) > 2 and len(tokens[i + 2]) > 2]
    begin, end = borders[starts[0] - 1] + 1, borders[starts[0] + 1] + 2
    stop = text[begin:end]
    want = text[: text.index(stop)] + (stop if include else "")
    body = dict(model=MODEL, prompt=PROMPTS[0], max_tokens=32, temperature=0, stop=["@@never", stop])
    extra = {"include_stop_str_in_output": include}
    answer = client.completions.create(**body, stream=stream, extra_body=extra)  # type: ignore[call-overload]
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == want
    assert choices[-1].finish_reason == "stop" and choices[-1].stop_reason == stop


def test_stop_token_ids_and_eos(embedded: ServerProcess) -> None:
    """Guards the end by id: the reason, what is kept, and that ``ignore_eos`` goes on behind the end token."""
    ids = whole(embedded, FRANCE)["token_ids"]
    assert ids[-1] == EOS and len(ids) == 30
    ended = whole(embedded, FRANCE, stop_token_ids=[ids[5]])
    assert ended["token_ids"] == ids[: ids.index(ids[5]) + 1]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", ids[5])
    further = whole(embedded, FRANCE, ignore_eos=True, max_tokens=34)
    assert further["token_ids"][:30] == ids and len(further["token_ids"]) == 34
    assert further["finish_reason"] == "length"


def test_min_tokens_forbids_the_end(embedded: ServerProcess) -> None:
    """Guards ``min_tokens``: no end token before, the same ids up to where it would have come."""
    ids = whole(embedded, FRANCE)["token_ids"]
    longer = whole(embedded, FRANCE, min_tokens=40, max_tokens=48)["token_ids"]
    assert longer[:29] == ids[:29] and EOS not in longer[:40]


def test_logit_bias_adds_to_logits(embedded: ServerProcess) -> None:
    """Guards sign and place of the bias: the winner is banned, then another id is forced."""
    first = whole(embedded, FRANCE, max_tokens=1)["token_ids"][0]
    banned = whole(embedded, FRANCE, max_tokens=1, logit_bias={str(first): -100})["token_ids"][0]
    tops = whole(embedded, FRANCE, max_tokens=1, logprobs=5, return_tokens_as_token_ids=True)["logprobs"]
    ranked = sorted(tops["top_logprobs"][0].items(), key=lambda item: -item[1])
    assert ranked[0][0] == f"token_id:{first}" and ranked[1][0] == f"token_id:{banned}"
    # One more than the gap is just enough, a little less is not.
    gap = ranked[0][1] - ranked[3][1]
    fourth = int(ranked[3][0].removeprefix("token_id:"))
    for bias, want in ((gap + 0.01, fourth), (gap - 0.01, first)):
        got = whole(embedded, FRANCE, max_tokens=1, logit_bias={str(fourth): bias})["token_ids"]
        assert got == [want]


def test_repetition_penalty_of_transformers(embedded: ServerProcess, oracle: Oracle) -> None:
    """Guards the penalty that divides positive and multiplies negative logits, over prompt and output."""
    ids = oracle.tokenizer(PROMPTS[2])["input_ids"]
    theirs, margins = oracle.greedy(ids, 24, repetition_penalty=1.3)
    ours = embedded.complete(prompt=ids, max_tokens=24, temperature=0, repetition_penalty=1.3)["token_ids"]
    count = comparable(margins)
    assert count >= 4 and ours[:count] == theirs[:count]


@pytest.mark.parametrize(("frequency", "presence"), [(0.8, 0.0), (0.0, 1.5), (-0.5, 0.3)])
def test_frequency_and_presence_penalties(embedded: ServerProcess, frequency: float, presence: float) -> None:
    """Guards both penalties: at each step the id is the best of raw value minus what its own count costs."""
    choice = embedded.complete(
        prompt="1, 1, 1, 1,",
        max_tokens=24,
        temperature=0,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logprobs=20,
        return_tokens_as_token_ids=True,
        ignore_eos=True,
    )
    seen: Counter[int] = Counter()
    for token, tops in zip(choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True):
        adjusted = {
            (i := int(name.removeprefix("token_id:"))): value - frequency * seen[i] - presence * (i in seen)
            for name, value in tops.items()
        }
        best = max(adjusted.values())
        assert adjusted[token] > best - 1e-3
        seen[token] += 1
    assert len(seen) > 1 or frequency < 0


def test_seeds_reproduce_and_differ(embedded: ServerProcess) -> None:
    """Guards seeded sampling: equal alone and in company, different between seeds and between choices of ``n``."""
    body = dict(prompt=FRANCE, max_tokens=12, temperature=1.0, ignore_eos=True)
    alone = embedded.complete(**body, seed=11)["token_ids"]
    answer = embedded.post("/v1/completions", **body, seed=11, n=4, return_token_ids=True).json()
    several = [choice["token_ids"] for choice in answer["choices"]]
    assert several[0] == alone and len({tuple(ids) for ids in several}) == 4
    assert answer["usage"]["completion_tokens"] == 48
    assert embedded.complete(**body, seed=12)["token_ids"] != alone


def test_sampling_follows_the_probabilities(embedded: ServerProcess) -> None:
    """Guards temperature, top_k and top_p: 256 first tokens against the truncated softmax of the reported values."""
    tops = whole(embedded, FRANCE, max_tokens=1, logprobs=4, return_tokens_as_token_ids=True)["logprobs"]
    values = {int(k.removeprefix("token_id:")): v for k, v in tops["top_logprobs"][0].items()}
    temperature, num = 1.5, 256
    body = dict(prompt=FRANCE, max_tokens=1, temperature=temperature, top_k=4, return_token_ids=True)
    counts: Counter[int] = Counter()
    for seed in (1, 2):
        answer = embedded.post("/v1/completions", **body, n=num // 2, seed=seed).json()
        counts.update(choice["token_ids"][0] for choice in answer["choices"])
    weights = {i: math.exp(value / temperature) for i, value in values.items()}
    total = sum(weights.values())
    assert set(counts) <= set(weights)
    for i, weight in weights.items():
        p = weight / total
        # Five standard deviations: fails by chance less than once in a million runs.
        assert abs(counts[i] / num - p) < 5 * math.sqrt(p * (1 - p) / num)


@pytest.mark.parametrize("text", ["Füße 漢字 🙂👩‍💻 ünïcödé", "日本語のテキスト"])
def test_utf8_in_and_out(client: openai.OpenAI, embedded: ServerProcess, text: str) -> None:
    """Guards characters that several tokens share: never half of one in a chunk, nothing lost in echo."""
    forced = embedded.post("/tokenize", prompt=text).json()["tokens"]
    echoed = whole(embedded, text, echo=True, max_tokens=1, return_token_ids=False)["text"]
    assert echoed.startswith(text)
    # Each step allows all ids of the text and the last one ends it, so any mixture of pieces can come.
    chunks = client.completions.create(
        model=MODEL,
        prompt=text,
        max_tokens=24,
        temperature=1.0,
        seed=3,
        stream=True,
        extra_body={"allowed_token_ids": sorted(set(forced)), "return_token_ids": True, "ignore_eos": True},
    )
    pieces, ids = [], []
    for chunk in chunks:
        pieces.append(chunk.choices[0].text)
        ids += chunk.choices[0].model_extra["token_ids"]  # type: ignore[index]
    decoded = embedded.post("/detokenize", tokens=ids).json()["prompt"]
    assert "".join(pieces) == decoded
    for piece in pieces:
        piece.encode()  # a lone surrogate would not encode


def test_prefix_cache_is_seen_and_changes_nothing(embedded: ServerProcess) -> None:
    """Guards the cache over HTTP: the second equal prompt hits it and gives the same ids."""
    prompt = " ".join(f"item {i * 7919 % 1000}," for i in range(60))
    before = embedded.metric("prefix_cache_hits_total")
    first = whole(embedded, prompt, max_tokens=8)["token_ids"]
    middle = embedded.metric("prefix_cache_hits_total")
    second = whole(embedded, prompt, max_tokens=8)["token_ids"]
    assert second == first
    assert embedded.metric("prefix_cache_hits_total") - middle > 100 > middle - before
