"""Incremental detokenisation against decoding everything at once, and stop strings against str.find."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from outrider.text.detokenizer import Detokenizer
from outrider.text.tokenizer import Tokenizer

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[3] / "shared"))
TINY = SHARED / "fixtures" / "llama4-tiny-a" / "bf16"
pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason="the shared fixtures are not here")

TEXT = "Hello 🙂👩‍💻! Ünïcödé 漢字. Question: what is <stop> here? </s> end ENDEND"


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.load(TINY)


def run(detokenizer: Detokenizer, ids: list[int], rng: random.Random) -> list[str]:
    """Push ``ids`` in groups of random size, as steps and merged events bring them."""
    pieces, start = [], 0
    while start < len(ids):
        size = rng.randrange(1, 5)
        pieces.append(detokenizer.push(ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.finish()]


def test_joins_to_the_whole_text(tiny: Tokenizer) -> None:
    """Guards against lost or doubled characters at token borders, for valid and for random bytes."""
    rng = random.Random()
    for _ in range(60):
        ids = [rng.randrange(992) for _ in range(30)] if rng.random() < 0.5 else tiny.encode(TEXT)
        skip = rng.random() < 0.5
        detokenizer = Detokenizer(tiny, skip_special_tokens=skip)
        assert "".join(run(detokenizer, ids, rng)) == tiny.decode(ids, skip_special_tokens=skip)
        assert detokenizer.num_tokens == len(ids)


def test_no_replacement_characters_on_the_way(tiny: Tokenizer) -> None:
    """Guards against sending half an emoji: pieces of valid text never hold U+FFFD."""
    ids = tiny.encode("a🙂b👩‍💻漢", add_special_tokens=False)
    assert any("\ufffd" in tiny.token_str(i) for i in ids), (
        "the text must split characters for this test to bite"
    )
    detokenizer = Detokenizer(tiny)
    assert not any("\ufffd" in detokenizer.push([i]) for i in ids)


def test_stop_strings_cut_where_find_says(tiny: Tokenizer) -> None:
    """Guards stop strings across token borders: the earliest completed one wins, whatever the grouping."""
    rng = random.Random()
    ids = tiny.encode(TEXT, add_special_tokens=False)
    for _ in range(200):
        places = [rng.randrange(len(TEXT) - 1) for _ in range(rng.randrange(1, 4))]
        stops = [TEXT[p : p + rng.randrange(1, 9)] for p in places]
        stops.append("never in the text")
        end, start, stop = min((TEXT.find(s) + len(s), TEXT.find(s), s) for s in stops[:-1])
        for include in (False, True):
            detokenizer = Detokenizer(tiny, stop=stops, include_stop=include)
            assert "".join(run(detokenizer, ids, rng)) == TEXT[: end if include else start]
            assert detokenizer.stop_match == stop
            prefix = tiny.decode(ids[: detokenizer.num_tokens])
            shorter = tiny.decode(ids[: detokenizer.num_tokens - 1]).rstrip("\ufffd")
            assert len(shorter) < end <= len(prefix), (
                "the counted tokens must end with the one that completes it"
            )


def test_nothing_of_a_stop_string_leaks(tiny: Tokenizer) -> None:
    """Guards against streaming the first characters of a stop string before it is complete."""
    ids = tiny.encode("one two Question: three", add_special_tokens=False)
    detokenizer = Detokenizer(tiny, stop=["Question:"])
    sent = ""
    for token_id in ids:
        sent += detokenizer.push([token_id])
        assert "one two ".startswith(sent)
    assert sent + detokenizer.finish() == "one two "


def test_held_text_is_sent_at_the_end(tiny: Tokenizer) -> None:
    """Guards against losing the text held back for a stop string that never came."""
    detokenizer = Detokenizer(tiny, stop=["Questions and answers"])
    ids = tiny.encode("a Question", add_special_tokens=False)
    assert detokenizer.push(ids) == ""
    assert detokenizer.finish() == "a Question"


def test_min_tokens_defers_stop_strings(tiny: Tokenizer) -> None:
    """Guards min_tokens: a match that ends within the first tokens does not count, a later one does."""
    ids = tiny.encode("x.x.x.", add_special_tokens=False)
    assert len(ids) == 6
    detokenizer = Detokenizer(tiny, stop=["."], min_tokens=3)
    assert detokenizer.push(ids) + detokenizer.finish() == "x.x"
    assert detokenizer.num_tokens == 4


def test_work_is_linear(tiny: Tokenizer) -> None:
    """Guards against quadratic work: ten times the tokens take about ten times as long, stop strings included."""

    def seconds(count: int) -> float:
        detokenizer = Detokenizer(tiny, stop=["Question:", "</s>", "<|im_end|>"])
        ids = [64 + i % 20 for i in range(count)]
        start = time.process_time()
        for token_id in ids:
            detokenizer.push([token_id])
        return time.process_time() - start

    seconds(1000)
    short = min(seconds(2_000) for _ in range(5))
    assert min(seconds(20_000) for _ in range(3)) < 30 * short
