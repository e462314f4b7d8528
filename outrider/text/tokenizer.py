"""Text to token ids and back, for one checkpoint; called by the server, in threads when the text is long.

One class over the ``tokenizers`` library, built from a Hugging Face folder or from a GGUF file's metadata. The
wrapped tokenizer never turns text into a special token: control tokens come only from the post-processor (BOS)
and from a chat template's own literals (see ``chat_template.py``). Never imports torch or ``transformers``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from outrider.errors import ConfigError
from outrider.text.gguf_tokenizer import read_gguf_tokenizer
from outrider.text.ranked_bpe import BYTE_OF_CHAR, RankedEncoder, Unequal

MAX_TOKENIZER_FILE_BYTES = 256 << 20
# A text at a time: no pool of threads, no hop to one.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

logger = logging.getLogger("outrider.server")


class Tokenizer:
    """A checkpoint's tokenizer. Its answers never change, hence it is safe to share between threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any], chat_template: str | None
    ) -> None:
        """Wrap ``backend``; ``config`` is what ``tokenizer_config.json`` holds (special token names)."""
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._ranked: RankedEncoder | None = None
        self.config = config
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.special_ids = frozenset(self.special_tokens.values())
        self.named_tokens = {
            name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name))) is not None
        }
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self._longest = max((len(token) for token in backend.get_vocab()), default=1)
        self._byte_level = (
            "ByteLevel" in backend.decoder.__getstate__().decode() if backend.decoder else False
        )
        self._pieces: list[bytes | None] = [None] * self.vocab_size
        self._texts: list[str | None] = [""] * self.vocab_size  # like _pieces: "" until it is asked for

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder or a ``.gguf`` file; ``ConfigError`` when there is none."""
        path = Path(path)
        if path.suffix == ".gguf":
            return cls(*read_gguf_tokenizer(path))
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{path} has no tokenizer.json; give --tokenizer a folder that has one")
        if file.stat().st_size > MAX_TOKENIZER_FILE_BYTES:
            raise ConfigError(
                f"{file} is larger than {MAX_TOKENIZER_FILE_BYTES >> 20} MiB; it is not a tokenizer"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{file} cannot be read as a tokenizer: {error}") from error
        config = _read_json(path / "tokenizer_config.json")
        return cls(backend, config, _find_chat_template(path, config))

    def use_fastest_encoder(self) -> None:
        """From now on encode with ``tiktoken`` if that is known to give the same ids; 2 s of work for Llama 4."""
        try:
            self._ranked = RankedEncoder(self._backend)
        except Unequal as reason:
            logger.info("Texts are encoded by tokenizers, not tiktoken: %s.", reason)
        except Exception:
            logger.exception("Texts are encoded by tokenizers: the encoder of tiktoken could not be built.")
        else:
            logger.info("Texts are encoded by tiktoken.")

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special: bool = False) -> list[int]:
        """Token ids of ``text``; with ``add_special_tokens`` what the checkpoint puts around a text (BOS).

        ``allow_special`` reads control tokens such as ``<|eot|>`` out of the text: for trusted text only.
        """
        if allow_special:
            parts = self.split_special(text)
            prefix = self._encode("", True) if add_special_tokens else []
            return [*prefix, *self.encode_segments(parts)]
        return self._encode(text, add_special_tokens)

    def encode_segments(self, segments: Iterable[str | int]) -> list[int]:
        """Ids of alternating plain text and ready-made control token ids."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, int):
                ids.append(segment)
            elif segment:
                ids.extend(self._encode(segment, False))
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """Cut trusted ``text`` at the control tokens that it spells out."""
        if not self.special_tokens:
            return [text]
        parts = re.split(f"({special_pattern(self.special_tokens)})", text)
        return [self.special_tokens[part] if i % 2 else part for i, part in enumerate(parts) if part]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The whole text of ``ids``; incomplete UTF-8 becomes U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text that already has a beginning; empty for ids without a token."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        piece = self._pieces[token_id]
        if piece is None:
            piece = self._pieces[token_id] = self._make_piece(token_id)
        return piece

    def whole_text(self, token_id: int) -> str | None:
        """``token_bytes`` as text where they are whole characters by themselves, else None; cached."""
        if not 0 <= token_id < self.vocab_size:
            return ""
        text = self._texts[token_id]
        if text == "":
            try:
                text = self.token_bytes(token_id).decode()
            except UnicodeDecodeError:
                text = None
            self._texts[token_id] = text
        return text

    def token_str(self, token_id: int) -> str:
        """The token alone as text, for logprobs; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_name(self, token_id: int) -> str:
        """The token as the vocabulary spells it (``Ġcity``), empty for ids without a token."""
        return self._backend.id_to_token(token_id) or ""

    def max_chars(self, num_tokens: int) -> int:
        """An upper bound on the characters that ``num_tokens`` tokens can hold."""
        return num_tokens * self._longest

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ranked = self._ranked
        if ranked is not None and ranked.takes(text):
            return ranked.encode(text, add_special_tokens=add_special_tokens)
        # A batch of one: without offsets, a fifth faster than `encode`, and without the GIL.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _make_piece(self, token_id: int) -> bytes:
        name = self._backend.id_to_token(token_id)
        if name is None:
            return b""
        if self._byte_level:
            try:
                return bytes([BYTE_OF_CHAR[char] for char in name])
            except KeyError:  # an added token spelled in plain text
                return str(name).encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        return str(name).replace("▁", " ").encode()

    def _named_id(self, name: str) -> int | None:
        text = self.named_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


def special_pattern(special_tokens: Iterable[str]) -> str:
    """A regular expression (plain alternatives, longest first) for the spellings of control tokens."""
    return "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True))


def _token_text(value: object) -> str | None:
    """Old tokenizer_config.json files write a token as ``{"content": ...}``; half a surrogate pair is no text."""
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str) or value != value.encode("utf-8", "ignore").decode():
        return None
    return value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return data


def _find_chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, which wins over the older chat_template.json."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8 text.") from error
    template = config.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named templates
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None
