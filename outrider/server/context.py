"""What the request handlers share: the engine, the tokenizer, the model's facts. Built once by ``create_app``.

Holds values and small look-ups; never parses a request and never talks to the network.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from outrider.config import EngineConfig, ServerConfig
from outrider.engine.protocol import EngineClient
from outrider.errors import ConfigError, NotFoundError, RequestError
from outrider.models.config import ModelConfig
from outrider.models.config_hf import generation_values
from outrider.server.media import MediaLoader
from outrider.server.metrics import Metrics
from outrider.text.chat_template import ChatTemplate
from outrider.text.tokenizer import Tokenizer

logger = logging.getLogger("outrider.server")

THREAD_THRESHOLD_CHARS = 16_384
"""Shorter usual texts hold the event loop for 1.5 ms (5 ms by the slower encoder); a thread takes 0.3 ms longer."""


@dataclass(frozen=True)
class ServerContext:
    """Everything a handler needs beside its request."""

    engine: EngineClient
    tokenizer: Tokenizer
    template: ChatTemplate | None
    model_config: ModelConfig
    engine_config: EngineConfig
    server_config: ServerConfig
    metrics: Metrics
    media: MediaLoader | None
    started_s: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def seeds(self) -> random.Random:
        """Source of seeds for requests that bring none; reproducible from ``--seed``."""
        return random.Random(self.engine_config.seed)

    @cached_property
    def model_names(self) -> tuple[str, ...]:
        """The names the model answers to; responses carry the first."""
        return tuple(self.server_config.served_model_name) or (self.engine.info.model,)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's end token first (it ends a sequence with stop_reason null), then the model's others."""
        ids = (self.tokenizer.eos_token_id, *self.model_config.eos_token_ids)
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self.engine.info.max_model_len

    @property
    def vocab_size(self) -> int:
        """Ids a client may send are below this."""
        return self.model_config.vocab_size

    @cached_property
    def generation_defaults(self) -> dict[str, Any]:
        """Sampling values for fields that a request leaves out: the checkpoint's, as ``--generation-config`` says."""
        source = self.server_config.generation_config
        if source == "auto":
            values: dict[str, Any] = dict(self.model_config.generation)
        elif source == "vllm":
            values = {}
        else:
            values = _read_generation_config(Path(source))
        return values | self.server_config.override_generation_config

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the chat template tells the model of the tools; when it does not, the log says so once."""
        shows = self.template is not None and "tools" in self.template.source
        if not shows:
            logger.warning(
                "A request brings tools, but this model's chat template does not show them to it; "
                "give one that does by --chat-template."
            )
        return shows

    def writes_token_ids(self, requested: bool | None) -> bool:
        """Whether log probabilities name tokens as ``token_id:N``."""
        return self.server_config.return_tokens_as_token_ids if requested is None else requested

    def check_model(self, name: str | None) -> None:
        """``NotFoundError`` unless ``name`` is empty or one of ours."""
        if name and name not in self.model_names:
            raise NotFoundError(f"The model `{name}` does not exist.", param="model")

    async def encode(self, text: str, *, add_special_tokens: bool, num_chars: int = 0) -> list[int]:
        """Token ids of user text, off the event loop when it is long; refuses what cannot fit the context.

        ``num_chars`` is the length of all texts of the request, where it has several.
        """
        if len(text) > self.tokenizer.max_chars(self.max_model_len):
            raise RequestError(
                f"This model's maximum context length is {self.max_model_len} tokens and your text of "
                f"{len(text)} characters cannot fit; shorten it.",
                param="input_text",
            )
        if max(len(text), num_chars) < THREAD_THRESHOLD_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)


def _read_generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--generation-config: {file} cannot be read as JSON") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--generation-config: {file} must hold a JSON object")
    return generation_values(values)
