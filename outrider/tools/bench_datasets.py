"""The prompts of a benchmark: random token runs, ShareGPT conversations, or the user's own JSONL.

``bench_serve`` and the offline benches call ``load_dataset``; given the same seed, tokenizer and flags it
returns the same prompts. All but ``custom`` need a ``TextCodec`` (bench_tokenizer). Sends nothing.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from outrider.errors import ConfigError

DATASETS = ("random", "sharegpt", "custom")
_MAX_REENCODES = 10


class TextCodec(Protocol):
    """What the datasets need of a tokenizer; ids are Python ints, text is Unicode."""

    @property
    def source(self) -> str:
        """File or URL it comes from."""

    @property
    def vocab_size(self) -> int:
        """Number of base entries; random offsets and top-up ids are drawn below it."""

    @property
    def allowed_ids(self) -> list[int]:
        """Ids that random prompts may hold, ascending: the base vocabulary without special tokens."""

    @property
    def num_special_tokens(self) -> int:
        """Tokens that the server adds to a plain prompt (1 for Llama 4: BOS)."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without any added special token."""

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``."""


@dataclass(frozen=True)
class Prompt:
    """One request to send: ``num_tokens`` counts ``text`` without special tokens (0: not known)."""

    text: str
    num_tokens: int
    output_len: int


@dataclass(frozen=True)
class DatasetOptions:
    """The dataset flags; lengths in tokens, ``range_ratio`` as (input, output), each in [0, 1)."""

    name: str = "random"
    path: str | None = None
    num_prompts: int = 1000
    seed: int = 0
    input_len: int = 1024
    output_len: int | None = None
    range_ratio: tuple[float, float] = (0.0, 0.0)
    prefix_len: int = 0
    shuffle: bool = True
    oversample: bool = True


def load_dataset(options: DatasetOptions, codec: TextCodec | None) -> list[Prompt]:
    """Build ``options.num_prompts`` prompts (fewer only with ``oversample`` off). Raises ConfigError."""
    if options.num_prompts < 1:
        raise ConfigError(f"--num-prompts is {options.num_prompts}; it must be at least 1.")
    if options.name == "custom":
        return _custom(options, codec)
    if codec is None:
        raise ConfigError(f"--dataset-name {options.name} needs a tokenizer; give --tokenizer FOLDER.")
    return _random(options, codec) if options.name == "random" else _sharegpt(options, codec)


def parse_range_ratio(text: str) -> tuple[float, float]:
    """``0.2`` or ``{"input": 0.2, "output": 0.1}`` as (input, output), each in [0, 1)."""
    try:
        value: Any = json.loads(text)
        ratio = (
            (float(value["input"]), float(value["output"]))
            if isinstance(value, dict)
            else (float(value),) * 2
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--random-range-ratio {text!r} must be a number or {{'input': a, 'output': b}}."
        ) from error
    if not all(0.0 <= part < 1.0 for part in ratio):
        raise ConfigError(f"--random-range-ratio {text!r} must lie in [0, 1).")
    return ratio


def _random(options: DatasetOptions, codec: TextCodec) -> list[Prompt]:
    """Consecutive runs of allowed ids from drawn offsets, re-encoded until the text has the drawn length."""
    rng = np.random.default_rng(options.seed)
    count = options.num_prompts
    mean_output = 128 if options.output_len is None else options.output_len
    input_lens = _draw_lengths(
        rng, options.input_len - codec.num_special_tokens, options.range_ratio[0], count, 0
    )
    output_lens = _draw_lengths(rng, mean_output, options.range_ratio[1], count, 1)
    offsets = rng.integers(0, codec.vocab_size, size=count)
    allowed = np.asarray(codec.allowed_ids)
    prefix = _random_prefix(rng, codec, allowed, options.prefix_len)
    prompts = []
    for index in range(count):
        start = int(offsets[index]) + index
        run = allowed[(start + np.arange(input_lens[index])) % len(allowed)].tolist()
        text, num_tokens = _fit_to_length(rng, codec, prefix + run, len(prefix) + int(input_lens[index]))
        prompts.append(Prompt(text, num_tokens, int(output_lens[index])))
    return prompts


def _draw_lengths(rng: np.random.Generator, mean: int, ratio: float, count: int, least: int) -> np.ndarray:
    low, high = max(math.floor(mean * (1 - ratio)), least), math.ceil(mean * (1 + ratio))
    if high < max(low, 1):
        raise ConfigError("--random-input-len and --random-output-len must each leave at least one token.")
    return rng.integers(low, high + 1, size=count)


def _random_prefix(rng: np.random.Generator, codec: TextCodec, allowed: np.ndarray, length: int) -> list[int]:
    if length == 0:
        return []
    ids = allowed[rng.integers(0, len(allowed), size=length)].tolist()
    return codec.encode(_fit_to_length(rng, codec, ids, length)[0])


def _fit_to_length(
    rng: np.random.Generator, codec: TextCodec, ids: list[int], target: int
) -> tuple[str, int]:
    """A text of ``target`` tokens near ``ids``: decode, encode, cut or top up, at most ten times.

    Byte-level BPE merges across the borders of arbitrary ids, so a run of ids rarely encodes to itself.
    Returns the text and the number of tokens it really encodes to.
    """
    text, num_tokens = "", 0
    for _ in range(_MAX_REENCODES):
        text = codec.decode(ids)
        ids = codec.encode(text)
        num_tokens = len(ids)
        if num_tokens == target:
            break
        if num_tokens > target:
            ids = ids[:target]
        else:
            ids = ids + rng.integers(0, codec.vocab_size, size=target - num_tokens).tolist()
    return text, num_tokens


def _sharegpt(options: DatasetOptions, codec: TextCodec) -> list[Prompt]:
    """First turn as prompt, length of the second as output; very short and very long pairs dropped."""
    conversations = [
        entry["conversations"] for entry in _read_json(options.path) if len(entry["conversations"]) >= 2
    ]
    rng = random.Random(options.seed)
    if options.shuffle:
        rng.shuffle(conversations)
    prompts: list[Prompt] = []
    for turns in conversations:
        if len(prompts) == options.num_prompts:
            break
        num_tokens = len(codec.encode(turns[0]["value"]))
        output_len = options.output_len or len(codec.encode(turns[1]["value"]))
        usable = num_tokens >= 4 and (options.output_len is not None or output_len >= 4)
        if usable and num_tokens <= 1024 and num_tokens + output_len <= 2048:
            prompts.append(Prompt(turns[0]["value"], num_tokens, output_len))
    return _oversampled(prompts, options, rng)


def _custom(options: DatasetOptions, codec: TextCodec | None) -> list[Prompt]:
    """One JSON object a line: ``prompt`` and, with ``--custom-output-len -1``, its own ``output_tokens``."""
    rng = random.Random(options.seed)
    entries = _read_jsonl(options.path)
    if options.shuffle:
        rng.shuffle(entries)
    prompts = []
    for entry in entries[: options.num_prompts]:
        output_len = options.output_len if options.output_len is not None else 256
        if output_len == -1 and not isinstance(entry.get("output_tokens"), int):
            raise ConfigError(
                "--custom-output-len -1 needs an integer 'output_tokens' in every line of the file."
            )
        length = entry["output_tokens"] if output_len == -1 else output_len
        prompts.append(Prompt(entry["prompt"], len(codec.encode(entry["prompt"])) if codec else 0, length))
    return _oversampled(prompts, options, rng)


def _oversampled(prompts: list[Prompt], options: DatasetOptions, rng: random.Random) -> list[Prompt]:
    if not prompts:
        raise ConfigError(f"{options.path} holds no usable prompt for --dataset-name {options.name}.")
    missing = options.num_prompts - len(prompts)
    if missing > 0 and options.oversample:
        return prompts + rng.choices(prompts, k=missing)
    return prompts


def _read_json(path: str | None) -> list[dict[str, Any]]:
    text = _read_text(path)
    try:
        entries = json.loads(text)
        if not all(isinstance(entry["conversations"], list) for entry in entries):
            raise ValueError("'conversations' is not a list")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a ShareGPT file (a JSON list with 'conversations'): {error}."
        ) from error
    return list(entries)


def _read_jsonl(path: str | None) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path} line {number} is not JSON: {error}.") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ConfigError(f"{path} line {number} must be an object with a string 'prompt'.")
        entries.append(entry)
    return entries


def _read_text(path: str | None) -> str:
    if path is None:
        raise ConfigError("--dataset-path FILE is needed for this --dataset-name.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read --dataset-path {path}: {error}.") from error
