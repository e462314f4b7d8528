"""Bytes of streamed chunks: everything that is the same in each event of a stream is encoded once.

The hot path of the server: one call per token per stream. A frame is joined bytes, never a re-encoded object.
"""

from __future__ import annotations

import msgspec

_encode = msgspec.json.encode


class ChunkWriter:
    """Writes the chunks of one stream: ``{id, object, created, model, choices: [{index, ...}]}``."""

    def __init__(self, *, id: str, object: str, created: int, model: str) -> None:
        common = {"id": id, "object": object, "created": created, "model": model}
        self._open = b"data: " + _encode(common)[:-1] + b',"choices":['

    def choice(self, index: int, body: bytes, *, usage: bytes = b"") -> bytes:
        """A chunk with one choice, whose members after ``index`` are ``body``."""
        return b'%b{"index":%d,%b}]%b}\n\n' % (self._open, index, body, usage)

    def last(self, usage: bytes) -> bytes:
        """The chunk that ``include_usage`` adds: no choices, the token counts."""
        return b"%b]%b}\n\n" % (self._open, usage)


def ending(finish_reason: str | None, stop_reason: int | str | None) -> bytes:
    """``,"finish_reason":...,"stop_reason":...`` of a completion chunk."""
    if finish_reason is None:
        return b',"finish_reason":null,"stop_reason":null'
    return b',"finish_reason":%b,"stop_reason":%b' % (_encode(finish_reason), _encode(stop_reason))
