"""What crosses between the front end and the engine process: length-prefixed msgpack frames, nothing else.

A frame is a 4-byte little-endian length and that many bytes of msgpack; the types are the whole vocabulary.
Never pickle, never a TCP port: the pair of Unix sockets is made by the front end and inherited by the engine.
"""

from __future__ import annotations

import socket
import struct
from typing import TypeVar

import msgspec

from outrider.types import EngineInfo, EngineStats, Request, TokenEvent

MAX_FRAME_BYTES = 1 << 30
_HEADER = struct.Struct("<I")

T = TypeVar("T")


class Add(msgspec.Struct, tag="add"):
    """Front end: run this request."""

    request: Request


class Abort(msgspec.Struct, tag="abort"):
    """Front end: stop these requests."""

    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, tag="reset"):
    """Front end: forget cached prompt beginnings."""


class Stop(msgspec.Struct, tag="stop"):
    """Front end: end the process."""


class Progress(msgspec.Struct, tag="progress"):
    """Engine: a stage of the start-up, and how much of it is done."""

    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, tag="ready"):
    """Engine: requests are welcome."""

    info: EngineInfo


class Refused(msgspec.Struct, tag="refused"):
    """Engine: it cannot start; ``is_config`` tells that the operator can mend it."""

    message: str
    is_config: bool


class Events(msgspec.Struct, tag="events"):
    """Engine: the news of a step (or, with no events, a sign of life)."""

    events: list[TokenEvent]
    stats: EngineStats
    has_work: bool


ToEngine = Add | Abort | ResetPrefixCache | Stop
FromEngine = Progress | Ready | Refused | Events

_ENCODER = msgspec.msgpack.Encoder()


def encode_frame(message: object) -> bytes:
    """A message as one frame."""
    body = _ENCODER.encode(message)
    return _HEADER.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages of one type; ``feed`` takes any piece of it."""

    def __init__(self, message_type: object) -> None:
        self._decoder = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[object]:
        """The messages that ``data`` completes. Raises ``ValueError`` on a frame over the size limit."""
        self._buffer += data
        messages: list[object] = []
        at = 0
        while len(self._buffer) - at >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer, at)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes is over the limit")
            end = at + _HEADER.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[at + _HEADER.size : end]))
            at = end
        if at:
            del self._buffer[:at]
        return messages


def send_frame(sock: socket.socket, message: object) -> None:
    """Write one frame to a blocking socket."""
    sock.sendall(encode_frame(message))
