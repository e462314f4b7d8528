"""The terminal clients against a fake server: the conversation kept, errors told, statistics true."""

import argparse
import io
import re

import pytest

from outrider.errors import ConfigError, OutriderError
from outrider.tools import chat, complete


def parse(module, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(list(words))


def test_a_conversation_keeps_its_turns(fake, monkeypatch, capsys):
    """Guards: history or system prompt lost between turns; an empty line sent; text not on stdout."""
    server = fake(ttft_s=0.01, itl_s=0.0)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand again\n"))
    words = (
        "--url",
        f"{server.url}/v1",
        "--system-prompt",
        "Be brief.",
        "--max-tokens",
        "3",
        "--temperature",
        "0",
    )
    assert chat.run(parse(chat, *words)) == 0
    first, second = (served.body for served in server.served)
    assert [m["role"] for m in first["messages"]] == ["system", "user"]
    assert [m["content"] for m in second["messages"]] == ["Be brief.", "hello", " w0 w1 w2", "and again"]
    assert first["model"] == "fake" and first["max_tokens"] == 3 and first["temperature"] == 0
    out, err = capsys.readouterr()
    assert out.count(" w0 w1 w2\n") == 2 and "Using model: fake" in err


def test_quick_complete_with_stats_and_key(fake, capsys):
    """Guards: a template put around a raw prompt, the key not sent, a rate that counts the wait."""
    server = fake(ttft_s=0.2, itl_s=0.02)
    words = (
        "--url",
        f"{server.url}/v1/",
        "-q",
        "Once",
        "--stats",
        "--max-tokens",
        "11",
        "--api-key",
        "secret",
    )
    assert complete.run(parse(complete, *words)) == 0
    served = server.served[0]
    assert served.body["prompt"] == "Once" and served.headers["authorization"] == "Bearer secret"
    ttft, count, rate = re.search(
        r"TTFT ([\d.]+) s, (\d+) tokens, ([\d.]+)", capsys.readouterr().err
    ).groups()
    assert 0.2 <= float(ttft) < 0.3 and count == "11"
    assert float(rate) == pytest.approx(10 / (served.sent[-1] - served.sent[0]), rel=0.1)


def test_refusals_and_errors_in_the_stream_are_sentences(fake, monkeypatch, capsys):
    """Guards: a traceback, or an answer cut short that looks whole."""
    refusing = fake(fail_every=1)
    with pytest.raises(OutriderError, match=r"503.*queue is full"):
        chat.run(parse(chat, "--url", f"{refusing.url}/v1", "-q", "hi"))
    breaking = fake(ttft_s=0.0, itl_s=0.0, error_event="The engine is gone.")
    with pytest.raises(OutriderError, match=r"engine is gone"):
        complete.run(parse(complete, "--url", f"{breaking.url}/v1", "-q", "hi"))
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    assert chat.run(parse(chat, "--url", f"{refusing.url}/v1")) == 0
    assert capsys.readouterr().err.count("queue is full") == 2
    assert all(len(served.body["messages"]) == 1 for served in refusing.served), "failed turns must not stay"


def test_no_server_is_one_sentence():
    """Guards: an httpx traceback for a wrong port."""
    with pytest.raises(ConfigError, match="No server answers"):
        chat.run(parse(chat, "--url", "http://127.0.0.1:1/v1", "-q", "hi"))
