"""A fake OpenAI server with known delays, in its own thread; it notes when it wrote every chunk.

Its clock is ``time.perf_counter``, the same as the client's, so its notes are an independent count of every
latency. It writes raw HTTP by hand on purpose: nothing between ``sleep`` and the socket.
"""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Served:
    """One answered generation: the request's JSON, its headers, and the times of arrival and of each
    chunk.
    """

    body: dict
    headers: dict
    received: float
    sent: list[float] = field(default_factory=list)


@dataclass
class FakeOpenAI:
    """Options first; ``start`` gives ``url``. Text is ``w0 w1 ...``; ids are UTF-8 bytes + 3, BOS is 1."""

    ttft_s: float = 0.05
    itl_s: float = 0.01
    tokens_per_chunk: int = 1
    usage: bool = True
    fail_every: int = 0
    cut_every: int = 0
    close_idle: bool = False
    reply: Callable[[str], str] = field(default=lambda prompt: " w0 w1")
    error_event: str = ""
    uneven: bool = False
    served: list[Served] = field(default_factory=list)

    def start(self) -> "FakeOpenAI":
        self._loop = asyncio.new_event_loop()
        sys.setswitchinterval(0.0005)  # the client shares the interpreter: do not make it wait 5 ms
        ready = threading.Event()
        threading.Thread(target=self._serve, args=(ready,), daemon=True).start()
        assert ready.wait(10)
        return self

    def stop(self) -> None:
        def end() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_later(0.01, self._loop.stop)

        self._loop.call_soon_threadsafe(end)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        )
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                received = time.perf_counter()
                lines = head.decode().split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = {
                    k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                keep = await self._route(method, path, headers, json.loads(body or b"{}"), received, writer)
                if not keep or (self.close_idle and path.endswith("completions")):
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _route(self, method, path, headers, body, received, writer) -> bool:
        if path == "/v1/models":
            return self._json(writer, 200, {"data": [{"id": "fake"}]})
        if path == "/tokenize":
            ids = [byte + 3 for byte in body["prompt"].encode()]
            return self._json(
                writer, 200, {"tokens": [1] * body["add_special_tokens"] + ids, "count": len(ids)}
            )
        if path == "/detokenize":
            text = bytes(max(i - 3, 0) for i in body["tokens"]).decode("utf-8", "replace")
            return self._json(writer, 200, {"prompt": text})
        if not path.endswith("completions"):
            return self._json(writer, 404, {"error": {"message": f"no {path}"}})
        served = Served(body, headers, received)
        self.served.append(served)
        if self.fail_every and len(self.served) % self.fail_every == 0:
            return self._json(writer, 503, {"error": {"message": "The queue is full."}})
        if not body.get("stream"):
            prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
            choices = [{"index": i, "text": self.reply(prompt)} for i, prompt in enumerate(prompts)]
            return self._json(writer, 200, {"choices": choices})
        return await self._stream(writer, served, "chat" in path)

    async def _stream(self, writer: asyncio.StreamWriter, served: Served, chat: bool) -> bool:
        body = served.body
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        start, order = time.perf_counter(), len(self.served)
        for index in range(0, limit, self.tokens_per_chunk):
            due = start + self.ttft_s + self.itl_s * len(served.sent)
            if (
                self.uneven
            ):  # the first tokens of three in a row come 1, 2, 3 times as late; gaps are 1, 2, 3 long
                steps = sum(1 + i % 3 for i in range(len(served.sent)))
                due = start + self.ttft_s * (1 + order % 3) + self.itl_s * steps * (1 + order % 2) / 2
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            text = "".join(f" w{i}" for i in range(index, min(index + self.tokens_per_chunk, limit)))
            choice = {"index": 0, "delta": {"content": text}} if chat else {"index": 0, "text": text}
            served.sent.append(time.perf_counter())
            self._event(writer, json.dumps({"choices": [choice], "usage": None}))
            if self.cut_every and len(self.served) % self.cut_every == 0:
                return False
        if self.error_event:
            self._event(writer, json.dumps({"error": {"message": self.error_event, "code": 500}}))
        if self.usage and (body.get("stream_options") or {}).get("include_usage"):
            count = {"prompt_tokens": 7, "completion_tokens": limit, "total_tokens": 7 + limit}
            self._event(writer, json.dumps({"choices": [], "usage": count}))
        self._event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def _event(self, writer: asyncio.StreamWriter, data: str) -> None:
        payload = f"data: {data}\n\n".encode()
        writer.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")

    def _json(self, writer: asyncio.StreamWriter, status: int, value: dict) -> bool:
        payload = json.dumps(value).encode()
        head = (
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        writer.write(head.encode() + payload)
        return True
