"""Reads many event streams at once from one thread, as cheaply as Python can: raw sockets and epoll.

    python -m benchmarks.host_client PORT PATH STREAMS MAX_TOKENS WINDOW_S

Prints a JSON line when every stream runs, one when the window ends, and one with the gaps between a stream's reads.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

WORDS = "Write a long story about a lighthouse keeper who counts ships, and do not stop early. Story number"


def request(path: str, index: int, max_tokens: int) -> bytes:
    """One HTTP request for a stream of exactly ``max_tokens`` tokens."""
    body: dict[str, object] = {"stream": True, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    text = f"{WORDS} {index}."
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def main(port: int, path: str, num_streams: int, max_tokens: int, window_s: float) -> None:
    """Open all streams, then count chunks for ``window_s`` seconds."""
    poller = select.epoll()
    socks: dict[int, socket.socket] = {}
    for index in range(num_streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(request(path, index, max_tokens))
        sock.setblocking(False)
        socks[sock.fileno()] = sock
        poller.register(sock, select.EPOLLIN)
    chunks = dict.fromkeys(socks, 0)
    last: dict[int, float] = {}
    gaps: list[float] = []
    waiting = set(socks)
    start = total_at_start = 0.0
    while True:
        for fd, _ in poller.poll(1.0):
            data = socks[fd].recv(1 << 16)
            if not data:
                raise SystemExit(f"a stream ended early, after {chunks[fd]} chunks")
            if not chunks[fd] and b" 200 " not in data[:20] and fd not in last:
                raise SystemExit(f"refused: {data[:400]!r}")
            chunks[fd] += data.count(b"data: ")
            now = time.monotonic()
            if start:
                gaps.append(now - last[fd])
            last[fd] = now
            if waiting and chunks[fd] > 2:
                waiting.discard(fd)
        now = time.monotonic()
        if not start and not waiting:
            start, total_at_start = now, sum(chunks.values())
            print(json.dumps({"event": "start", "t": now}), flush=True)
        elif start and now - start > window_s:
            break
    count = sum(chunks.values()) - total_at_start
    print(json.dumps({"event": "end", "t": now, "chunks": count, "reads": len(gaps)}), flush=True)
    gaps.sort()
    shares = {f"p{p}": round(gaps[min(len(gaps) - 1, len(gaps) * p // 100)] * 1e3, 2) for p in (50, 99)}
    print(json.dumps({"event": "gaps_ms", **shares, "cpu_s": round(time.process_time(), 2)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
