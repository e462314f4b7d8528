"""Encodes text with ``tiktoken``, three to four times as fast as ``tokenizers``, where both give the same ids.

``RankedEncoder`` is built by ``Tokenizer.use_fastest_encoder`` and refuses, by ``Unequal``, what it cannot vouch for.
Why the ids are the same: both cut a text by the same regular expression, take a piece that is an entry as it is, and
else join the pair of least rank, leftmost first. The rank of a pair is its place among the merges there, the id of
what it makes here; ``_check_merges`` sees to it that these have one order. Pairs that make the same entry have
several places there but meet only as one: an entry's own bytes are joined in one order, so every place that holds
its last two parts holds the same two.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import tokenizers

MAX_CHARS = 500_000
"""Longer texts are not for it: a million blanks in a row overflow the stack of tiktoken's regular expressions."""

LLAMA4_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = (LLAMA4_PATTERN, LLAMA3_PATTERN)
"""Two libraries read them: each leaves no character out, and the tests compare their classes on all of Unicode."""

_MODEL = {
    "type": ("BPE",),
    "dropout": (None,),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (False,),
    "byte_fallback": (False,),
    "ignore_merges": (True,),
}
_SAMPLES = (
    "",
    " ",
    "It's 1234 o'clock,\r\n\n  they'LL say: ÉTÉ été 漢字 🙂\u200d🙂 \t",
    "ſ's<|eot|>a\u0301 ١٢٣  x",
)


class Unequal(Exception):
    """Why a tokenizer is not for this module, as the end of a sentence."""


class RankedEncoder:
    """The ids of ordinary text, with what the tokenizer puts around a text. Immutable."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Read and verify ``backend``, which must take control tokens for text; 2 s of CPU for 200,000 entries.

        ``Unequal`` where anything is not known to give the ids that ``backend`` gives.
        """
        try:
            # Here, since only a server encodes by it. Before 0.13 a long piece took time squared: not declared.
            import tiktoken
        except ImportError as error:
            raise Unequal(f"tiktoken cannot be imported ({error})") from error
        spec = json.loads(backend.to_str())
        pattern = _check_parts(spec, backend)
        self._prefix, self._suffix = _around(spec["post_processor"])
        ranks = _ranks(spec["model"]["vocab"])
        if len(ranks) != backend.get_vocab_size(with_added_tokens=False):
            raise Unequal("its vocabulary has one id for two entries")  # and what was read lacks one of them
        _check_merges(spec["model"]["vocab"], spec["model"]["merges"])
        self._encoding = tiktoken.Encoding(
            "ranked", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        for sample in _SAMPLES:
            for add in (False, True):
                if (
                    self.encode(sample, add_special_tokens=add)
                    != backend.encode(sample, add_special_tokens=add).ids
                ):
                    raise Unequal(f"tiktoken encodes {sample!r} differently")

    def takes(self, text: str) -> bool:
        """Whether ``text`` may be given to ``encode``: not too long, and without halves of surrogate pairs."""
        if len(text) > MAX_CHARS:
            return False
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                return False
        return True

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """As ``Tokenizer.encode``, for a text that it ``takes``."""
        ids = self._encoding.encode_ordinary(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids


def _check_parts(spec: dict[str, Any], backend: tokenizers.Tokenizer) -> str:
    """All but the vocabulary; returns the pattern that cuts a text into pieces."""
    for name in ("normalizer", "truncation", "padding"):
        if spec[name] is not None:
            raise Unequal(f"it has a {name} step")
    for field, allowed in _MODEL.items():
        if spec["model"].get(field) not in allowed:
            raise Unequal(f"its model has {field} {spec['model'].get(field)!r}")
    if not backend.encode_special_tokens or not all(token["special"] for token in spec["added_tokens"]):
        raise Unequal("it has added tokens that it finds in ordinary text")
    steps = (spec["pre_tokenizer"] or {}).get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        raise Unequal("its pre-tokenizer is not a pattern followed by bytes")
    split, byte_level = steps
    if split["behavior"] != "Isolated" or split["invert"]:
        raise Unequal("its pattern does not cut out what it matches")
    if byte_level["add_prefix_space"] or byte_level["use_regex"]:
        raise Unequal("its bytes step changes the pieces")
    pattern = split["pattern"].get("Regex")
    if pattern not in PATTERNS:
        raise Unequal("its pattern is not a known one")
    return str(pattern)


def _around(post_processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """The ids before and after a text."""
    steps = [post_processor] if post_processor else []
    if post_processor and post_processor["type"] == "Sequence":
        steps = post_processor["processors"]
    steps = [step for step in steps if step["type"] != "ByteLevel"]  # it only moves offsets
    if not steps:
        return [], []
    if len(steps) > 1 or steps[0]["type"] != "TemplateProcessing":
        raise Unequal("its post-processor is not one template")
    parts: tuple[list[int], list[int]] = ([], [])
    num_texts = 0
    for piece in steps[0]["single"]:
        if "Sequence" in piece:
            num_texts += 1
        else:
            parts[min(num_texts, 1)].extend(steps[0]["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    if num_texts != 1:
        raise Unequal("its post-processor does not hold the text once")
    return parts


def _ranks(vocabulary: dict[str, int]) -> dict[bytes, int]:
    """The ids of the entries' bytes."""
    table = str.maketrans({char: chr(byte) for char, byte in BYTE_OF_CHAR.items()})
    if "" in vocabulary or not set().union(*vocabulary) <= BYTE_OF_CHAR.keys():
        raise Unequal("its vocabulary has entries that are not spelled in bytes")
    ranks = {entry.translate(table).encode("latin-1"): rank for entry, rank in vocabulary.items()}
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise Unequal("its vocabulary lacks a byte")
    return ranks


def _check_merges(vocabulary: dict[str, int], merges: list[list[str]]) -> None:
    """They come in the order of the ids that they make, and no pair whose join is an entry is missing."""
    made = [vocabulary[left + right] for left, right in merges]
    if any(before > after for before, after in pairwise(made)):
        raise Unequal("its merges are not in the order of the ids")
    # The library keeps a merge once and only one that makes an entry, hence the count tells.
    pairs = sum(
        entry[:cut] in vocabulary and entry[cut:] in vocabulary
        for entry in vocabulary
        for cut in range(1, len(entry))
    )
    if pairs != len(merges):
        raise Unequal("its merges do not hold every pair that makes an entry")


def _byte_of_char() -> dict[str, int]:
    """The GPT-2 byte alphabet, inverted: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


BYTE_OF_CHAR = _byte_of_char()
