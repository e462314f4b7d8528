"""``outrider chat``: talk to a running server in the terminal, streamed; also the stream reader of ``complete``.

Called by the command line. It keeps the conversation on its side and works against any OpenAI server.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from outrider.errors import OutriderError
from outrider.tools.http_api import bearer, first_model


@dataclass
class Answer:
    """One streamed answer: its text, and the times and counts behind ``--stats``."""

    text: str = ""
    ttft_s: float = 0.0
    total_s: float = 0.0
    num_tokens: int = 0

    @property
    def stats(self) -> str:
        """``TTFT 0.05 s, 42 tokens, 120.3 tokens/s`` (rate of the tokens after the first)."""
        rate = (self.num_tokens - 1) / (self.total_s - self.ttft_s) if self.total_s > self.ttft_s else 0.0
        return f"[TTFT {self.ttft_s:.3f} s, {self.num_tokens} tokens, {rate:.1f} tokens/s]"


class Server:
    """A server's ``/v1`` URL, key and model name; ``stream`` prints an answer while it arrives."""

    def __init__(self, args: argparse.Namespace) -> None:
        server = args.url.rstrip("/").removesuffix("/v1")
        self._url = f"{server}/v1"
        headers = bearer(args.api_key)
        self.model = args.model_name or first_model(server, headers)
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(None, connect=10.0))

    def stream(self, path: str, body: dict[str, Any]) -> Answer:
        """POST ``body`` to ``path``, write the text to stdout, return the whole of it. Raises OutriderError."""
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **body}
        answer, start = Answer(), time.perf_counter()
        try:
            with self._client.stream("POST", f"{self._url}{path}", json=body) as response:
                if response.status_code != 200:
                    raise OutriderError(_message(response.read(), response.status_code))
                for piece in _pieces(response.iter_lines(), answer):
                    answer.ttft_s = answer.ttft_s or time.perf_counter() - start
                    answer.text += piece
                    print(piece, end="", flush=True)
        except httpx.HTTPError as error:
            raise OutriderError(f"The connection to {self._url} failed: {error}.") from error
        answer.total_s = time.perf_counter() - start
        print()
        return answer


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that chat and complete share."""
    parser.add_argument(
        "--url", default="http://localhost:8000/v1", help="the server's /v1 (added if left out)"
    )
    parser.add_argument("--model-name", help="model (default: the first of /v1/models)")
    parser.add_argument("--api-key", help="key (default: OPENAI_API_KEY)")
    parser.add_argument("-q", "--quick", metavar="MESSAGE", help="send one message, print the answer, leave")
    parser.add_argument("--stats", action="store_true", help="print time to first token and tokens a second")
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``chat``."""
    add_common_arguments(parser)
    parser.add_argument("--system-prompt", help="first message, with role system")


def run(args: argparse.Namespace) -> int:
    """Chat until end of input; a failed answer is reported and forgotten, the conversation goes on."""
    server = Server(args)
    print(f"Using model: {server.model}", file=sys.stderr)
    messages: list[dict[str, str]] = []
    if args.system_prompt:
        messages.append({"role": "system", "content": args.system_prompt})
    for line in prompts(args.quick):
        turn = [*messages, {"role": "user", "content": line}]
        try:
            answer = server.stream("/chat/completions", {"messages": turn, **sampling(args)})
        except OutriderError as error:
            if args.quick is not None:
                raise
            print(error, file=sys.stderr)
            continue
        messages = [*turn, {"role": "assistant", "content": answer.text}]
        if args.stats:
            print(answer.stats, file=sys.stderr)
    return 0


def prompts(quick: str | None) -> Iterator[str]:
    """The one message of ``--quick``, or lines typed after ``> `` until end of input; empty ones are skipped."""
    if quick is not None:
        yield quick
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line.strip():
            yield line


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields that were given."""
    fields = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    return {name: value for name, value in fields.items() if value is not None}


def _pieces(lines: Iterator[str], answer: Answer) -> Iterator[str]:
    """Text pieces of an SSE body; counts tokens by the usage chunk, else by pieces."""
    for line in lines:
        if not line.startswith("data:") or line[5:].strip() == "[DONE]":
            continue
        try:
            chunk = json.loads(line[5:])
        except ValueError as error:
            raise OutriderError(f"The server sent what is no JSON: {line[:200]!r}.") from error
        if "error" in chunk:
            raise OutriderError(_message(json.dumps(chunk).encode(), 500))
        for choice in chunk.get("choices", []):
            piece = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            if piece:
                answer.num_tokens += 1
                yield piece
        if usage := chunk.get("usage"):
            answer.num_tokens = usage["completion_tokens"]


def _message(body: bytes, status: int) -> str:
    """The sentence inside an OpenAI error, or the start of whatever was sent."""
    try:
        value = json.loads(body)
        error = value.get("error", value)
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, AttributeError):
        text = body[:300].decode("utf-8", "replace")
    return f"The server refuses ({status}): {text}"
