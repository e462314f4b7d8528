"""POST /v1/completions over a real socket: the recipe's keys, streams, stop strings, log probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from outrider.text.tokenizer import Tokenizer
from tests.server.conftest import SHARED, Server
from tests.server.fake_engine import token_logprobs

MakeServer = Callable[..., Server]
EMOJI = "Hi 👩‍💻 漢字 ünïcödé 🙂!"


def recipe_answer() -> dict[str, Any]:
    """The first JSON answer printed in the recipe."""
    text = (SHARED / "recipe" / "llama4-scout-on-vllm.md").read_text()
    start = text.index('{\n  "id": "cmpl-')
    return dict(json.JSONDecoder().raw_decode(text[start:])[0])


def events(response: Any) -> list[dict[str, Any]]:
    """The data of an event stream; checks framing and the end mark."""
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: ") for frame in frames[:-1])
    return [json.loads(frame[6:]) for frame in frames[:-2]]


def key_tree(value: Any) -> Any:
    """Keys in order, recursively, without values."""
    if isinstance(value, dict):
        return [(key, key_tree(item)) for key, item in value.items()]
    return [key_tree(item) for item in value] if isinstance(value, list) else None


def test_keys_and_order_of_the_recipe(server: Server) -> None:
    """Guards the wire format: same keys, same order, same nulls as the recipe prints."""
    response = server.post(
        "/v1/completions", model="tiny", prompt="San Francisco is a", max_tokens=7, temperature=0
    )
    answer = response.json()
    assert key_tree(answer) == key_tree(recipe_answer())
    assert answer["id"].startswith("cmpl-") and len(answer["id"]) == 37
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["usage"]["prompt_tokens"] == len(server.engine.submitted[0].prompt_token_ids)
    request = server.engine.submitted[0]
    assert request.sampling.temperature == 0 and request.sampling.top_p == 1
    assert request.prompt_token_ids[0] == 992
    assert request.request_id == f"{answer['id']}-0-0"


def test_prompt_forms(server: Server, tokenizer: Tokenizer) -> None:
    """Guards the four forms of `prompt`, the order of choices and that ids are taken verbatim."""
    forms: list[tuple[Any, list[list[int]]]] = [
        ("a b", [tokenizer.encode("a b")]),
        (["a b", "c"], [tokenizer.encode("a b"), tokenizer.encode("c")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ]
    for prompt, ids in forms:
        server.engine.submitted.clear()
        answer = server.post("/v1/completions", prompt=prompt, max_tokens=2).json()
        assert [request.prompt_token_ids for request in server.engine.submitted] == ids
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(ids)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_n_choices_have_their_own_seeds(make_server: MakeServer) -> None:
    """Guards n > 1: ids `<id>-<prompt>-<n>`, different seeds, each prompt counted once."""
    server = make_server(lambda request: [request.sampling.seed % 900, 33])
    body = dict(prompt=["a", "b"], n=3, seed=7, temperature=1, max_tokens=2, add_special_tokens=False)
    answer = server.post("/v1/completions", **body).json()
    requests = server.engine.submitted
    assert [request.request_id.rsplit("-", 2)[1:] for request in requests] == [
        [p, k] for p in "01" for k in "012"
    ]
    seeds = [request.sampling.seed for request in requests]
    assert seeds[0] == 7 and len(set(seeds)) == 6
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "total_tokens": 14,
        "completion_tokens": 12,
        "prompt_tokens_details": None,
    }


@pytest.mark.parametrize("group", [1, 3])
def test_stream_joins_to_the_whole_answer(make_server: MakeServer, group: int) -> None:
    """Guards streams: valid UTF-8 pieces, one finish reason, the chunk keys, no usage unless asked for."""
    server = make_server(EMOJI)
    server.engine.group = group
    whole = server.post("/v1/completions", prompt="x", max_tokens=100).json()
    assert whole["choices"][0]["text"] == EMOJI
    chunks = events(server.post("/v1/completions", prompt="x", max_tokens=100, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == EMOJI
    assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in chunks)
    assert len(chunks) == -(-whole["usage"]["completion_tokens"] // group)
    for chunk in chunks:
        assert list(chunk) == ["id", "object", "created", "model", "choices"]
        assert list(chunk["choices"][0]) == ["index", "text", "logprobs", "finish_reason", "stop_reason"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "length"
    ]


def test_usage_in_streams(server: Server) -> None:
    """Guards include_usage (a last chunk with an empty list of choices) and continuous_usage_stats."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(
        server.post("/v1/completions", prompt=[1, 2], max_tokens=3, stream=True, stream_options=options)
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 2, "total_tokens": 5, "completion_tokens": 3}
    refused = server.post("/v1/completions", prompt="x", stream_options=options)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "stream_options"


def test_batch_streams_interleave_by_index(server: Server) -> None:
    """Guards merged streams: every choice arrives whole under its own index."""
    chunks = events(server.post("/v1/completions", prompt=["a", "b"], n=2, max_tokens=50, stream=True))
    for index in range(4):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == "Hello world, this is a reply."
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("group", [1, 4])
def test_stop_strings_across_tokens(
    make_server: MakeServer, tokenizer: Tokenizer, stream: bool, group: int
) -> None:
    """Guards lm_eval's `until`: the cut, stop_reason, counted tokens, and that the engine is told to stop."""
    server = make_server("The answer is 42. Question: what? Question: again")
    server.engine.group = group
    body = dict(prompt="x", max_tokens=100, stop=["never", "Question:"], stream=stream)
    response = server.post("/v1/completions", **body)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response)]
        text, last = "".join(choice["text"] for choice in choices), choices[-1]
    else:
        last = response.json()["choices"][0]
        text = last["text"]
        used = response.json()["usage"]["completion_tokens"]
        reply = tokenizer.encode("The answer is 42. Question: what?", add_special_tokens=False)
        assert tokenizer.decode(reply[:used]).count("Question:") == 1
        assert tokenizer.decode(reply[: used - 1]).count("Question:") == 0
    assert text == "The answer is 42. "
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "Question:")
    assert server.engine.aborted == [server.engine.submitted[0].request_id]


def test_end_tokens(make_server: MakeServer, tokenizer: Tokenizer) -> None:
    """Guards stop_reason: null for the primary end token, the id for others; its text is left out but counted."""
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    for end, reason in ((1000, None), (993, 993), (33, 33)):
        server = make_server([*hello, end, 50, 51])
        answer = server.post(
            "/v1/completions", prompt="x", stop_token_ids=[33], skip_special_tokens=False
        ).json()
        choice = answer["choices"][0]
        assert choice["text"] == "Hello"
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)
        assert answer["usage"]["completion_tokens"] == len(hello) + 1
        body = dict(prompt="x", ignore_eos=True, max_tokens=8)
        assert server.post("/v1/completions", **body).json()["choices"][0]["finish_reason"] == "length"


def test_loglikelihood_as_lm_eval_asks(make_server: MakeServer, tokenizer: Tokenizer) -> None:
    """Guards echo + logprobs: prompt_len + 1 aligned entries, and equal floats in both lists when greedy."""
    server = make_server([40])
    ids = [992, 5, 6, 7, 200]
    body = dict(prompt=[ids, ids[:3]], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234)
    answer = server.post("/v1/completions", **body).json()
    for choice, prompt in zip(answer["choices"], (ids, ids[:3]), strict=True):
        logprobs = choice["logprobs"]
        tokens = [*prompt, 40]
        assert list(logprobs) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
        assert {len(entries) for entries in logprobs.values()} == {len(tokens)}
        assert logprobs["tokens"] == [tokenizer.token_str(i) for i in tokens]
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        offset = 0
        for position in range(1, len(tokens)):
            offset += len(logprobs["tokens"][position - 1])
            assert logprobs["text_offset"][position] == offset
            expected = token_logprobs(position, tokens[position], 1, 1024)
            value, top = logprobs["token_logprobs"][position], logprobs["top_logprobs"][position]
            assert value == expected.logprob
            assert (value == max(top.values())) == (expected.rank == 1)
            assert next(iter(top)) == logprobs["tokens"][position]
        assert choice["text"] == tokenizer.decode(tokens)


def test_echo_without_output(server: Server) -> None:
    """Guards max_tokens 0: scoring only, the token the engine must make is hidden."""
    body = dict(prompt=[5, 6, 7], max_tokens=0, echo=True, logprobs=0)
    answer = server.post("/v1/completions", **body).json()
    assert server.engine.submitted[0].sampling.max_tokens == 1
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert server.post("/v1/completions", prompt="x", max_tokens=0).status_code == 400


def test_streamed_logprobs_run_on(server: Server, tokenizer: Tokenizer) -> None:
    """Guards streamed log probabilities: together they equal the whole answer's, offsets included."""
    body = dict(prompt="a b", max_tokens=6, logprobs=2, echo=True, temperature=0)
    whole = server.post("/v1/completions", **body).json()["choices"][0]["logprobs"]
    chunks = events(server.post("/v1/completions", stream=True, **body))
    for key, entries in whole.items():
        assert [x for chunk in chunks for x in chunk["choices"][0]["logprobs"][key]] == entries


def test_prompt_logprobs_format(server: Server, tokenizer: Tokenizer) -> None:
    """Guards `prompt_logprobs`: null first, then id -> value, rank and text with the actual token first."""
    body = dict(prompt=[5, 6, 7], max_tokens=1, prompt_logprobs=2)
    entries = server.post("/v1/completions", **body).json()["choices"][0]["prompt_logprobs"]
    assert entries[0] is None and len(entries) == 3
    for position, token in ((1, 6), (2, 7)):
        expected = token_logprobs(position, token, 2, 1024)
        first_id, first = next(iter(entries[position].items()))
        assert int(first_id) == token
        assert first == {
            "logprob": expected.logprob,
            "rank": expected.rank,
            "decoded_token": tokenizer.token_str(token),
        }
        assert {int(i) for i in entries[position]} == {token, *expected.top_ids}


def test_generation_config_fills_what_is_left_out(make_server: MakeServer) -> None:
    """Guards the checkpoint's own sampling defaults, and that a request overrides each."""
    generation = {"temperature": 0.6, "top_p": 0.9, "do_sample": True}
    server = make_server(model={"generation": generation})
    server.post("/v1/completions", prompt="x")
    server.post("/v1/completions", prompt="x", temperature=0.001, top_p=1)
    first, second = (request.sampling for request in server.engine.submitted)
    assert (first.temperature, first.top_p, first.max_tokens) == (0.6, 0.9, 16)
    assert (second.temperature, second.top_p) == (0.01, 1.0)
    assert first.eos_token_ids == (1000, 993, 999)
    neutral = make_server(model={"generation": generation}, server={"generation_config": "vllm"})
    neutral.post("/v1/completions", prompt="x")
    assert neutral.engine.submitted[0].sampling.temperature == 1.0


def test_return_token_ids(server: Server, tokenizer: Tokenizer) -> None:
    """Guards return_token_ids and `token_id:N` names, which only appear when asked for."""
    body = dict(
        prompt=[5, 6], max_tokens=2, return_token_ids=True, logprobs=0, return_tokens_as_token_ids=True
    )
    choice = server.post("/v1/completions", **body).json()["choices"][0]
    reply = tokenizer.encode("Hello world", add_special_tokens=False)[:2]
    assert choice["token_ids"] == reply and choice["prompt_token_ids"] == [5, 6]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in reply]


def test_streamed_prompt_token_ids_come_once(server: Server) -> None:
    """Guards against a stream that repeats a long prompt's ids in every chunk."""
    body = dict(prompt=[5, 6], max_tokens=4, return_token_ids=True)
    choices = [c["choices"][0] for c in events(server.post("/v1/completions", stream=True, **body))]
    assert [c["prompt_token_ids"] for c in choices] == [[5, 6]] + [None] * (len(choices) - 1)
    assert len(choices) > 1 and all(c["token_ids"] for c in choices)


def test_truncation(server: Server) -> None:
    """Guards truncate_prompt_tokens: the left is dropped unless the right is asked for."""
    for side, kept in ((None, [3, 4]), ("left", [3, 4]), ("right", [1, 2])):
        server.post("/v1/completions", prompt=[1, 2, 3, 4], truncate_prompt_tokens=2, truncation_side=side)
        assert server.engine.submitted[-1].prompt_token_ids == kept
    assert server.post("/v1/completions", prompt=[1], truncate_prompt_tokens=0).status_code == 400
    assert server.post("/v1/completions", prompt="x", truncation_side="up").status_code == 400


def test_openai_client(server: Server) -> None:
    """Guards that the official client understands whole and streamed answers and errors."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=50, logprobs=1)
    assert answer.choices[0].text == "Hello world, this is a reply."
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello world, this is a reply."
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    assert [model.id for model in client.models.list()] == ["tiny"]
