"""Log probabilities in the three shapes of the API: completions, chat, and prompt positions.

Values are raw log-softmax from the engine; minus infinity, which JSON lacks, is written as -9999.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outrider.server.protocol import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from outrider.text.tokenizer import Tokenizer
from outrider.types import TokenLogprobs

LOWEST = -9999.0


class CompletionLogprobWriter:
    """Collects entries of one choice; offsets run on over the chunks of a stream."""

    def __init__(self, tokenizer: Tokenizer, *, as_token_ids: bool) -> None:
        """``as_token_ids`` writes ``token_id:N`` in place of token texts."""
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids
        self._offset = 0

    def write(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """The lists for these tokens; an entry of None is a token without a value (the first of a prompt)."""
        result = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for token_id, entry in zip(token_ids, entries, strict=True):
            token = self._name(token_id)
            result.text_offset.append(self._offset)
            result.tokens.append(token)
            self._offset += len(token)
            if entry is None:
                result.token_logprobs.append(None)
                result.top_logprobs.append(None)
                continue
            value = max(entry.logprob, LOWEST)
            top = {token: value}
            for top_id, top_value in zip(entry.top_ids, entry.top_logprobs, strict=True):
                name = self._name(top_id)
                # Different ids can share a text (parts of characters): the strongest one is shown.
                top[name] = max(top_value, top.get(name, LOWEST))
            result.token_logprobs.append(value)
            result.top_logprobs.append(top)
        return result

    def _name(self, token_id: int) -> str:
        return token_name(self._tokenizer, token_id, self._as_token_ids)


def token_name(tokenizer: Tokenizer, token_id: int, as_token_ids: bool) -> str:
    """How a token is written in log probabilities."""
    return f"token_id:{token_id}" if as_token_ids else tokenizer.token_str(token_id)


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], num_top: int, *, as_token_ids: bool
) -> ChatLogprobs:
    """``{"content": [...]}``: every list of rivals has the sampled token first and ``num_top`` entries in all."""
    content = []
    for entry in entries:
        rivals = [(entry.token_id, entry.logprob)]
        rivals += [
            pair for pair in zip(entry.top_ids, entry.top_logprobs, strict=True) if pair[0] != entry.token_id
        ]
        top = [
            TopLogprob(
                token=token_name(tokenizer, token_id, as_token_ids),
                logprob=max(value, LOWEST),
                bytes=list(tokenizer.token_bytes(token_id)),
            )
            for token_id, value in rivals[:num_top]
        ]
        content.append(
            ChatTokenLogprob(
                token=token_name(tokenizer, entry.token_id, as_token_ids),
                logprob=max(entry.logprob, LOWEST),
                bytes=list(tokenizer.token_bytes(entry.token_id)),
                top_logprobs=top,
            )
        )
    return ChatLogprobs(content=content)


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """One ``{id: {logprob, rank, decoded_token}}`` per prompt position, the actual token first."""
    result: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            result.append(None)
            continue
        ranked = [(entry.token_id, entry.logprob, entry.rank)]
        tops = zip(entry.top_ids, entry.top_logprobs, strict=True)
        ranked += [(i, value, rank) for rank, (i, value) in enumerate(tops, 1) if i != entry.token_id]
        result.append(
            {
                str(token_id): {
                    "logprob": max(value, LOWEST),
                    "rank": rank,
                    "decoded_token": tokenizer.token_str(token_id),
                }
                for token_id, value, rank in ranked
            }
        )
    return result
