"""The tokenizer behind the benchmark's prompts: a local ``tokenizer.json``, else the server's own.

``open_codec`` looks at local files, the hub cache, the server's ``/tokenize`` and ``/detokenize``, then the hub,
in that order; the caller prints which it took. Never imports ``transformers``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer

from outrider.errors import ConfigError
from outrider.text.gguf_tokenizer import read_gguf_tokenizer
from outrider.tools.bench_datasets import TextCodec


class LocalCodec:
    """A ``tokenizer.json`` or the tokenizer inside a ``.gguf``, through the ``tokenizers`` library."""

    def __init__(self, file: Path) -> None:
        self.source = str(file)
        try:
            is_gguf = file.suffix == ".gguf"
            self._tokenizer = read_gguf_tokenizer(file)[0] if is_gguf else Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception for a malformed file
            raise ConfigError(f"Cannot read the tokenizer {file}: {error}") from error

    @cached_property
    def vocab_size(self) -> int:
        """Base entries: tokens added after training (Llama 4's specials) lie above them."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    @cached_property
    def allowed_ids(self) -> list[int]:
        """Every base id that is not special."""
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        return [token_id for token_id in range(self.vocab_size) if token_id not in special]

    @cached_property
    def num_special_tokens(self) -> int:
        """What the post-processor adds to one text."""
        return int(self._tokenizer.num_special_tokens_to_add(False))

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text, special tokens kept."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class ServerCodec:
    """The tokenizer of the server under test, through ``POST /tokenize`` and ``POST /detokenize``.

    The two routes tell no vocabulary size: random prompts are drawn from the ids of a fixed sample of words.
    """

    def __init__(self, base_url: str, headers: dict[str, str], model: str, *, insecure: bool = False) -> None:
        self.source = f"{base_url}/tokenize"
        self._model = model
        self._client = httpx.Client(base_url=base_url, headers=headers, timeout=60.0, verify=not insecure)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id seen, so that a drawn top-up id always exists."""
        return self.allowed_ids[-1] + 1

    @cached_property
    def allowed_ids(self) -> list[int]:
        """The distinct ids of 4,000 made-up words: a few thousand for a vocabulary of 200,000."""
        rng = random.Random(0)
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
        words = ["".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(4000)]
        pieces = [" ".join(words[start : start + 25]) for start in range(0, len(words), 25)]
        # In small pieces: a server refuses a text that is longer than its context.
        return sorted({token_id for piece in pieces for token_id in self.encode(piece)})

    @cached_property
    def num_special_tokens(self) -> int:
        """Length of an encoded word with special tokens less its length without them."""
        return len(self._tokenize("a", add_special_tokens=True)) - len(self.encode("a"))

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens."""
        return self._tokenize(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``."""
        return str(self._post("/detokenize", {"model": self._model, "tokens": ids})["prompt"])

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": add_special_tokens}
        return list(self._post("/tokenize", body)["tokens"])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._client.post(path, json=body)
            if answer.status_code == 200:
                return dict(answer.json())
            reason = f"{answer.status_code}: {answer.text[:300]}"
        except (httpx.HTTPError, ValueError) as error:
            reason = str(error)
        raise ConfigError(f"The server's {path} failed ({reason}); give --tokenizer FOLDER instead.")


def open_codec(names: Sequence[str], server: ServerCodec | None = None) -> TextCodec:
    """The first tokenizer found among ``names`` (folders, files or hub ids), or the server's.

    Files on disk come before the server, the server before a download. Raises ConfigError if there is none.
    """
    for file in map(_local_file, names):
        if file is not None:
            return LocalCodec(file)
    hub_ids = [name for name in names if not Path(name).exists() and 1 <= name.count("/") <= 1]
    for name in hub_ids:
        if cached := _hub_file(name, local_only=True):
            return LocalCodec(cached)
    if server is not None and _answers(server):
        return server
    for name in hub_ids:
        if downloaded := _hub_file(name, local_only=False):
            return LocalCodec(downloaded)
    also = " and the server has no /tokenize" if server is not None else ""
    tried = " or ".join(map(repr, names))
    raise ConfigError(
        f"No tokenizer: {tried} is no folder with tokenizer.json, no .gguf file and not on the hub{also}; "
        "give --tokenizer FOLDER."
    )


def _local_file(name: str) -> Path | None:
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    return file if file.is_file() and file.suffix in (".json", ".gguf") else None


def _answers(server: ServerCodec) -> bool:
    try:
        return bool(server.encode("a"))
    except (ConfigError, KeyError):
        return False


def _hub_file(repo: str, *, local_only: bool) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, "tokenizer.json", local_files_only=local_only))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None
