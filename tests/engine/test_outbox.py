"""The engine's way out: frames arrive whole and in order, and no reader, however slow, holds up a step."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from outrider.engine.messages import FrameReader, FromEngine, Progress, encode_frame
from outrider.engine.process import Outbox


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield ours, theirs


def messages(rng: random.Random, count: int) -> list[Progress]:
    """Frames of a few bytes and, one in ten, of several times the socket's buffer."""
    lengths = [rng.choice((3, 300, 3000)) if rng.random() < 0.9 else 40_000 for _ in range(count)]
    return [Progress("x" * length, number, count) for number, length in enumerate(lengths)]


def read_all(sock: socket.socket, count: int, pause_s: float = 0.0) -> list[object]:
    """``count`` messages, with a pause before each piece."""
    reader = FrameReader(FromEngine)
    received: list[object] = []
    while len(received) < count:
        time.sleep(pause_s)
        received += reader.feed(sock.recv(5000))
    return received


def test_written_when_send_returns(pair: tuple[socket.socket, socket.socket]) -> None:
    """Guards the first token's way: nothing waits for a thread's turn while the reader keeps up."""
    ours, theirs = pair
    outbox = Outbox(ours)
    for message in messages(random.Random(), 200):
        if len(message.stage) > 3000:
            continue
        outbox.send(message)
        frame = theirs.recv(1 << 16, socket.MSG_DONTWAIT)  # BlockingIOError if it is not there yet
        assert frame == encode_frame(message)
    outbox.close()


def test_slow_reader_gets_all_in_order_and_holds_nobody_up(pair: tuple[socket.socket, socket.socket]) -> None:
    """Guards the hand-over to the thread, which comes in the middle of a frame; `send` waits for no byte of it."""
    ours, theirs = pair
    outbox = Outbox(ours)
    sent = messages(random.Random(), 300)
    for message in sent:  # nobody reads: a `send` that waited would wait for ever
        outbox.send(message)
    assert read_all(theirs, len(sent), 0.0005) == sent
    outbox.close()


def test_changing_pace_keeps_order(pair: tuple[socket.socket, socket.socket]) -> None:
    """Guards the hand-over back from the thread: a frame written at once must not overtake a queued one."""
    ours, theirs = pair
    outbox = Outbox(ours)
    rng = random.Random()
    sent = messages(rng, 600)
    received: list[object] = []
    reader = threading.Thread(target=lambda: received.extend(read_all(theirs, len(sent), 0.0002)))
    reader.start()
    for message in sent:
        outbox.send(message)
        time.sleep(rng.choice((0.0, 0.0, 0.0002, 0.002)))
    reader.join(timeout=60)
    assert received == sent
    outbox.close()


def test_close_writes_what_is_queued(pair: tuple[socket.socket, socket.socket]) -> None:
    """Guards the last events of a shutdown."""
    ours, theirs = pair
    outbox = Outbox(ours)
    sent = messages(random.Random(), 50)
    for message in sent:
        outbox.send(message)
    received: list[object] = []
    reader = threading.Thread(target=lambda: received.extend(read_all(theirs, len(sent))))
    reader.start()
    outbox.close()
    reader.join(timeout=60)
    assert received == sent


FRONT_END_GONE = """
import socket, sys, time
from outrider.engine.messages import Progress
from outrider.engine.process import Outbox
ours, theirs = socket.socketpair()
outbox = Outbox(ours)
if sys.argv[1] == "queued":
    outbox.send(Progress("x" * 10_000_000, 0, 1))
    theirs.close()
    time.sleep(60)
theirs.close()
outbox.send(Progress("", 0, 1))
sys.exit(3)
"""


@pytest.mark.parametrize("way", ["at once", "queued"])
def test_ends_with_the_front_end(way: str) -> None:
    """Guards against an engine that goes on with nobody to talk to."""
    assert subprocess.run([sys.executable, "-c", FRONT_END_GONE, way], timeout=60).returncode == 1
