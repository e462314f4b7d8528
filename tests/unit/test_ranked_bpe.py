"""The encoder by tiktoken against the checkpoint's own tokenizer, and everything that it must refuse."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers

from outrider.models.gguf import embedded_model_path
from outrider.text import ranked_bpe
from outrider.text.chat_template import ChatTemplate
from outrider.text.ranked_bpe import BYTE_OF_CHAR, LLAMA4_PATTERN, MAX_CHARS, PATTERNS, RankedEncoder, Unequal
from outrider.text.tokenizer import Tokenizer

Spec = dict[str, Any]
ROOT = Path(__file__).parents[2]
FIRST_SPECIAL = 1000
CONTEXTS = ("a{0}b", " {0}{0} ", "1{0}2", "B{0}'S", "\n{0} ", "'{0}x", "{0}\n", "  {0}", "({0}/")


def characters() -> Iterator[str]:
    """All of Unicode but the surrogates."""
    yield from map(chr, range(0xD800))
    yield from map(chr, range(0xE000, 0x110000))


def random_unicode(rng: random.Random) -> str:
    """Words, blanks, digits, marks and rare characters, a few of them often repeated."""
    pieces = [
        "the",
        " cat",
        "'S",
        "'ll",
        "\r\n",
        "\n",
        " ",
        "   ",
        "\t",
        "12345",
        "é",
        "e\u0301",
        "漢字",
        "🙂",
        "/",
        "<|eot|>",
        "ſ",
    ]
    pieces += [chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(8)]
    return "".join(rng.choice(pieces) * rng.choice((1, 1, 1, 2, 3, 40)) for _ in range(rng.randrange(1, 60)))


def small_spec(pattern: str = LLAMA4_PATTERN) -> Spec:
    """A vocabulary of some 700 entries with every pair that makes one; two control tokens around a text."""
    entries: dict[bytes, int] = {bytes([byte]): byte for byte in range(256)}
    rng = random.Random(1)
    while len(entries) < 700:  # few letters, so that entries overlap themselves and one another
        left, right = (
            rng.choice([e for e in entries if set(e) <= set(b"ab '\n\xc3\xa9")] * 2),
            rng.choice([b"a", b"b", b" ", b"\xc3", b"\xa9", b"aa", b"ab", b"'", b"\n"]),
        )
        joined = left + right
        if right in entries and len(joined) < 9:
            entries.setdefault(joined, len(entries))
    char_of = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    spell: Callable[[bytes], str] = lambda entry: "".join(char_of[byte] for byte in entry)  # noqa: E731
    merges = [
        [spell(entry[:cut]), spell(entry[cut:])]
        for entry in entries
        for cut in range(1, len(entry))
        if entry[:cut] in entries and entry[cut:] in entries
    ]
    special = {"<|begin|>": FIRST_SPECIAL, "<|eot|>": FIRST_SPECIAL + 1}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
    name = lambda token: {"SpecialToken": {"id": token, "type_id": 0}}  # noqa: E731
    template = dict(
        type="TemplateProcessing",
        single=[name("<|begin|>"), {"Sequence": {"id": "A", "type_id": 0}}, name("<|eot|>")],
        pair=[{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        special_tokens={token: dict(id=token, ids=[i], tokens=[token]) for token, i in special.items()},
    )
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[dict(id=i, content=token, **flags) for token, i in special.items()],
        normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
        post_processor=dict(type="Sequence", processors=[byte_level, template]),
        decoder=byte_level,
        model=dict(
            type="BPE",
            dropout=None,
            unk_token=None,
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=True,
            vocab={spell(entry): rank for entry, rank in entries.items()},
            merges=merges,
        ),
    )


def backend_of(spec: Spec) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    return backend


def check_equal(ranked: RankedEncoder, backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    for text in texts:
        assert ranked.takes(text)
        for add in (False, True):
            ids = ranked.encode(text, add_special_tokens=add)
            assert ids == backend.encode(text, add_special_tokens=add).ids, repr(text)


@pytest.fixture(scope="module")
def llama4(llama4_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(llama4_folder)
    tokenizer.use_fastest_encoder()
    return tokenizer


def test_real_llama4_gives_the_same_ids(llama4: Tokenizer, llama4_folder: Path) -> None:
    """Guards the prompt's ids: documents, program text, control tokens spelled out, random Unicode, long runs."""
    ranked = llama4._ranked
    assert ranked is not None
    oracle = backend_of(json.loads((llama4_folder / "tokenizer.json").read_text()))
    rng = random.Random()
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "outrider").rglob("*.py")]
    check_equal(ranked, oracle, [file.read_text() for file in rng.sample(files, 40)])
    check_equal(ranked, oracle, ["", *llama4.special_tokens, "".join(llama4.special_tokens)])
    check_equal(ranked, oracle, (random_unicode(rng) for _ in range(1500)))
    check_equal(
        ranked,
        oracle,
        (
            unit * (20_000 // len(unit))
            for unit in ("a", " ", "\n", "-", "🙂", "ab ", " \n", "aA", "é", "\u0301")
        ),
    )
    context = rng.choice(CONTEXTS)
    check_equal(ranked, oracle, (context.format(char) for char in rng.sample(list(characters()), 20_000)))
    assert llama4.encode("San Francisco is a") == [200000, 33300, 20748, 373, 262]


@pytest.mark.slow
def test_real_llama4_on_all_of_unicode(llama4: Tokenizer) -> None:
    """Guards against two libraries that know different versions of Unicode."""
    ranked = llama4._ranked
    assert ranked is not None
    for char in characters():
        text = "".join(context.format(char) for context in CONTEXTS)
        assert (
            ranked.encode(text, add_special_tokens=False)
            == llama4._backend.encode(text, add_special_tokens=False).ids
        ), hex(ord(char))


def test_real_llama4_segments(llama4: Tokenizer, llama4_folder: Path) -> None:
    """Guards chat prompts, and trusted text with control tokens, against the slow path."""
    slow = Tokenizer.load(llama4_folder)
    template = ChatTemplate(llama4.chat_template or "", llama4.special_tokens, llama4.named_tokens)
    rng = random.Random()
    for _ in range(50):
        messages = [
            {"role": "system", "content": "Be brief. <|eot|>"},
            {"role": "user", "content": random_unicode(rng)},
        ]
        segments = list(template.render(messages))
        assert llama4.encode_segments(segments) == slow.encode_segments(segments)
        text = random_unicode(rng)
        assert llama4.encode(text, allow_special=True) == slow.encode(text, allow_special=True)


@pytest.mark.parametrize("pattern", PATTERNS, ids=["llama 4", "llama 3"])
def test_entries_that_overlap(pattern: str) -> None:
    """Guards the order of merges: few letters, so that many pairs make one entry and ends are beginnings too."""
    backend = backend_of(small_spec(pattern))
    ranked = RankedEncoder(backend)
    rng = random.Random()
    check_equal(
        ranked, backend, ("".join(rng.choices("aab é'\n", k=rng.randrange(1, 80))) for _ in range(4000))
    )
    check_equal(ranked, backend, ("".join(rng.choices("ab", k=rng.randrange(400, 3000))) for _ in range(20)))
    check_equal(ranked, backend, (random_unicode(rng) for _ in range(200)))


@pytest.mark.slow
def test_both_libraries_read_the_classes_alike() -> None:
    """Guards the patterns' reading on every code point, class by class and by their contractions."""
    everything = "".join(characters())
    single = {bytes([byte]): byte for byte in range(256)}
    for name in ("L", "N", "Lu", "Lt", "Lm", "Lo", "M", "Ll"):
        compare_reading(rf"\p{{{name}}}", everything, single)
    for pattern in (r"\s", r"\S", r"[^\s\p{L}\p{N}]", r"[^\r\n\p{L}\p{N}]"):
        compare_reading(pattern, everything, single)
    letters = [
        char for char in everything if (char.isalpha() and ord(char) < 0x2F00) or 0xFB00 <= ord(char) < 0xFB10
    ]
    spelled = "".join(f"'{char}{other}x'{other}{char}x" for char in letters for other in "stdmrevlSTDMREVL")
    compare_reading("(?i:'s|'t|'re|'ve|'m|'ll|'d)", spelled, single)


def compare_reading(pattern: str, text: str, single: dict[bytes, int]) -> None:
    """What tiktoken finds by ``pattern`` is what tokenizers leaves out when it replaces it."""
    found = bytes(
        tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=single, special_tokens={}).encode_ordinary(
            text
        )
    ).decode()
    kept = tokenizers.normalizers.Replace(tokenizers.Regex(pattern), "").normalize_str(text)
    assert Counter(found + kept) == Counter(text), pattern


def change(path: str, value: Any) -> Callable[[Spec], None]:
    """Set the value at a dotted path."""

    def apply(spec: Spec) -> None:
        *way, last = path.split(".")
        place: Any = spec
        for step in way:
            place = place[int(step)] if isinstance(place, list) else place[step]
        place[int(last) if isinstance(place, list) else last] = value

    return apply


def drop_merge(spec: Spec) -> None:
    del spec["model"]["merges"][300]


def swap_merges(spec: Spec) -> None:
    merges = spec["model"]["merges"]
    merges[3], merges[-1] = merges[-1], merges[3]


def drop_byte(spec: Spec) -> None:
    vocabulary = spec["model"]["vocab"]
    del vocabulary["z"]


def share_id(spec: Spec) -> None:
    longer = next(entry for entry in spec["model"]["vocab"] if len(entry) > 1)
    spec["model"]["vocab"]["zz"] = spec["model"]["vocab"][longer]  # which of the two is written is chance


def spell_plainly(spec: Spec) -> None:
    spec["model"]["vocab"]["漢"] = 900


def add_second_template(spec: Spec) -> None:
    spec["post_processor"]["processors"].append(spec["post_processor"]["processors"][1])


def leave_text_out(spec: Spec) -> None:
    del spec["post_processor"]["processors"][1]["single"][1]


REFUSED: list[tuple[Callable[[Spec], None], str]] = [
    (change("normalizer", {"type": "NFC"}), "a normalizer step"),
    (
        change("truncation", dict(direction="Right", max_length=9, strategy="LongestFirst", stride=0)),
        "truncation",
    ),
    (
        change(
            "padding",
            dict(
                strategy={"Fixed": 9},
                direction="Right",
                pad_to_multiple_of=None,
                pad_id=0,
                pad_type_id=0,
                pad_token="a",
            ),
        ),
        "padding",
    ),
    (change("model", dict(type="WordLevel", vocab={"a": 0, "b": 1}, unk_token="a")), "type 'WordLevel'"),
    (change("model.dropout", 0.5), "dropout"),
    (change("model.unk_token", "a"), "unk_token"),
    (change("model.end_of_word_suffix", "z"), "end_of_word_suffix"),
    (change("model.fuse_unk", True), "fuse_unk"),
    (change("model.byte_fallback", True), "byte_fallback"),
    (change("model.ignore_merges", False), "ignore_merges"),
    (change("added_tokens.1.special", False), "added tokens"),
    (change("pre_tokenizer", None), "pre-tokenizer is not"),
    (
        change("pre_tokenizer.pretokenizers.0", {"type": "Digits", "individual_digits": True}),
        "pre-tokenizer is not",
    ),
    (change("pre_tokenizer.pretokenizers.0.behavior", "Removed"), "cut out"),
    (change("pre_tokenizer.pretokenizers.0.invert", True), "cut out"),
    (change("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\s+|\S+"}), "not a known one"),
    (change("pre_tokenizer.pretokenizers.0.pattern", {"String": LLAMA4_PATTERN}), "not a known one"),
    (change("pre_tokenizer.pretokenizers.1.add_prefix_space", True), "changes the pieces"),
    (change("pre_tokenizer.pretokenizers.1.use_regex", True), "changes the pieces"),
    (
        change("post_processor", dict(type="BertProcessing", sep=["<|eot|>", 1001], cls=["<|begin|>", 1000])),
        "not one template",
    ),
    (add_second_template, "not one template"),
    (leave_text_out, "hold the text once"),
    (drop_byte, "lacks a byte"),
    (share_id, "one id for two"),
    (spell_plainly, "not spelled in bytes"),
    (swap_merges, "order of the ids"),
    (drop_merge, "every pair"),
]


@pytest.mark.parametrize(("spoil", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refuses_what_it_cannot_vouch_for(spoil: Callable[[Spec], None], reason: str) -> None:
    """Guards against an encoder that is nearly the checkpoint's."""
    spec = small_spec()
    RankedEncoder(backend_of(spec))
    spoil(spec)
    with pytest.raises(Unequal, match=reason):
        RankedEncoder(backend_of(spec))


def test_refuses_a_tokenizer_that_reads_control_tokens() -> None:
    """Guards the rule that text never becomes a control token, which the wrapped tokenizer must already keep."""
    with pytest.raises(Unequal, match="added tokens"):
        RankedEncoder(tokenizers.Tokenizer.from_str(json.dumps(small_spec())))


@pytest.mark.parametrize(
    "post_processor",
    [None, dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)],
)
def test_nothing_around_a_text(post_processor: Spec | None) -> None:
    """Guards checkpoints without a begin token."""
    backend = backend_of(small_spec() | {"post_processor": post_processor})
    check_equal(RankedEncoder(backend), backend, ["", "ab ab"])


def test_the_embedded_model_keeps_its_encoder(caplog: pytest.LogCaptureFixture) -> None:
    """Guards a model whose merges matter even where a piece is an entry."""
    tokenizer = Tokenizer.load(embedded_model_path())
    caplog.set_level(logging.INFO, logger="outrider.server")
    tokenizer.use_fastest_encoder()
    assert tokenizer._ranked is None
    assert "by tokenizers, not tiktoken: its model has ignore_merges False." in caplog.text
    assert tokenizer.encode("   123") == [333, 33, 34, 35]


def test_long_texts_and_half_characters_keep_their_way() -> None:
    """Guards against tiktoken's panic on a million blanks, and against its own answer to half a surrogate pair."""
    tokenizer = Tokenizer(backend_of(small_spec()), {}, None)
    tokenizer.use_fastest_encoder()
    ranked = tokenizer._ranked
    assert ranked is not None
    assert ranked.takes("é" * MAX_CHARS) and not ranked.takes(" " * (MAX_CHARS + 1))
    assert not ranked.takes("a\ud800") and not ranked.takes("\udc00")
    blanks = " " * MAX_CHARS
    assert tokenizer.decode(tokenizer.encode(blanks * 3)) == blanks * 3
    with pytest.raises(TypeError):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("name", ["missing", "broken"])
def test_goes_on_without_tiktoken(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards the start of a server whose installation lacks the library, or whose build of the encoder fails."""
    tokenizer = Tokenizer(backend_of(small_spec()), {}, None)
    if name == "missing":
        monkeypatch.setitem(sys.modules, "tiktoken", None)
    else:
        monkeypatch.setattr(ranked_bpe, "_ranks", lambda _: 1 / 0)
    caplog.set_level(logging.INFO, logger="outrider.server")
    tokenizer.use_fastest_encoder()
    expected = "tiktoken cannot be imported" if name == "missing" else "could not be built"
    assert expected in caplog.text
    assert tokenizer.encode("ab")[0] == FIRST_SPECIAL
