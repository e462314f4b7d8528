"""Token ids to text, one token at a time, for one choice of one response; called by the server per event.

Bytes of an unfinished character are held back, and so are the last characters that may begin a stop string. The
work per token does not depend on the length of the text. It knows no HTTP and no engine.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from outrider.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental text of one sequence, cut at the first stop string.

    ``num_tokens`` counts the tokens consumed, the one that completes a stop string included; ``stop_match`` is
    the stop string that was found. The result does not depend on how the tokens are grouped into calls.
    """

    __slots__ = (
        "_hold",
        "_in_character",
        "_include_stop",
        "_min_tokens",
        "_pending",
        "_skip",
        "_stop",
        "_token_bytes",
        "_utf8",
        "_whole_text",
        "num_tokens",
        "stop_match",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """``stop`` strings are looked for after ``min_tokens`` tokens; ``include_stop`` keeps the match in the text."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._in_character = False
        self._token_bytes, self._whole_text = tokenizer.token_bytes, tokenizer.whole_text
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stop = tuple(stop)
        self._hold = max(map(len, stop), default=1) - 1
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._pending = ""
        self.num_tokens = 0
        self.stop_match: str | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        """Consume ids and return the text that is final now; ids after a stop string are not consumed."""
        released: list[str] = []
        for token_id in token_ids:
            if self.stop_match is not None:
                break
            self.num_tokens += 1
            if token_id in self._skip:
                continue
            piece = None if self._in_character else self._whole_text(token_id)
            if piece is None:
                piece = self._utf8.decode(self._token_bytes(token_id))
                self._in_character = self._utf8.getstate()[0] != b""
            released.append(self._append(piece) if self._stop else piece)
        return released[0] if len(released) == 1 else "".join(released)

    def finish(self) -> str:
        """The text still held back; call once, after the last token."""
        if self.stop_match is not None:
            return ""
        rest = self._utf8.decode(b"", True)
        return self._pending + rest

    def skip(self, num_tokens: int) -> None:
        """Count tokens that add no text (the token that ended the sequence)."""
        self.num_tokens += num_tokens

    def _append(self, piece: str) -> str:
        """Add text behind the pending characters, look for a stop string that ends in it, release what is safe."""
        old_len = len(self._pending)
        text = self._pending + piece
        if piece and self.num_tokens > self._min_tokens:
            found = [
                (start + len(stop), start, stop)
                for stop in self._stop
                if (start := text.find(stop, max(0, old_len - len(stop) + 1))) >= 0
            ]
            if found:
                end, start, self.stop_match = min(found)
                self._pending = ""
                return text[: end if self._include_stop else start]
        cut = max(0, len(text) - self._hold)
        self._pending = text[cut:]
        return text[:cut]
