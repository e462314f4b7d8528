"""A process in which a client's grammar is built for the first time, so that only this process can suffer.

``llguidance`` bounds its own work, but a build cannot be interrupted and deep recursion overflows the stack, which
ends the process it happens in. ``GrammarChecker`` is the engine's handle: one child, one job at a time, a wall
clock, a memory cap; a child that dies or is late is replaced. ``python -m outrider.engine.grammar_check FD PID``
is the child. Called by ``engine/guidance.py`` only.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from outrider.engine.messages import FrameReader, encode_frame, send_frame
from outrider.types import GrammarSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

BUILD_TIMEOUT_S = 2.0
START_TIMEOUT_S = 30.0
MAX_MEMORY_BYTES = 2 << 30
BUILD_STACK_BYTES = 4 << 20
"""Stack of the thread that builds in the child; the engine builds with more, so what passes here passes there."""

# Spaces and line ends between JSON tokens, bounded: a model left free to indent may never stop.
JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,48}"
MAX_REASON_CHARS = 200

logger = logging.getLogger("outrider.engine")


class Vocabulary(msgspec.Struct, frozen=True):
    """What the child needs of the tokenizer: the bytes of every id, the control tokens, the ends of a text."""

    pieces: list[bytes]
    special_ids: list[int]
    eos_token_ids: list[int]


class Verdict(msgspec.Struct, frozen=True):
    """``grammar`` is the source to build in the engine, or ``error`` says in one sentence why it is refused."""

    grammar: str = ""
    error: str | None = None


class GrammarChecker:
    """A child process and the right to use it; for one thread."""

    def __init__(self, vocabulary: Vocabulary, timeout_s: float = BUILD_TIMEOUT_S) -> None:
        self._vocabulary = vocabulary
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    def check(self, spec: GrammarSpec) -> Verdict:
        """Build ``spec`` in the child; never raises for what the grammar does to it."""
        if self._sock is None:
            self._start()
        assert self._sock is not None
        try:
            send_frame(self._sock, spec)
            verdict = self._receive(self._timeout_s)
        except TimeoutError:
            self.close()
            return Verdict(
                error=f"The grammar takes longer than {self._timeout_s:g} s to build; simplify it."
            )
        except OSError:
            code = self._process.wait() if self._process is not None else None
            logger.warning(
                "A grammar ended the process that checks grammars (status %s); it is refused.", code
            )
            self.close()
            return Verdict(error="The grammar is too deeply nested or too large to build; simplify it.")
        return verdict

    def close(self) -> None:
        """End the child; the next check starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._sock is not None:
            self._sock.close()
        self._process = self._sock = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [
            sys.executable, "-m", "outrider.engine.grammar_check", str(theirs.fileno()), str(os.getpid())
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        theirs.close()
        self._sock = ours
        send_frame(ours, self._vocabulary)
        self._receive(START_TIMEOUT_S)

    def _receive(self, timeout_s: float) -> Verdict:
        assert self._sock is not None
        reader = FrameReader(Verdict)
        self._sock.settimeout(timeout_s)
        while True:
            data = self._sock.recv(1 << 20)
            if not data:
                raise ConnectionResetError
            for message in reader.feed(data):
                assert isinstance(message, Verdict)
                return message


# -- what both processes do alike ---------------------------------------------------------------------


@dataclass
class TokenTable:
    """The form in which ``llguidance`` takes a tokenizer; called to cut text that the grammar forces into tokens."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    encode: Callable[[str], list[int]]
    bos_token_id: int | None = None
    is_tokenizer_wrapper: bool = True

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids of ``text``; control tokens are never read out of it."""
        return self.encode(text if isinstance(text, str) else text.decode())


def make_tokenizer(vocabulary: Vocabulary, encode: Callable[[str], list[int]] | None = None) -> LLTokenizer:
    """The token trie that masks are computed on; without ``encode`` forced text is cut greedily."""
    from llguidance import LLTokenizer

    tokenizer: LLTokenizer

    def greedy(text: str) -> list[int]:
        return tokenizer.greedy_tokenize(text)

    ends = vocabulary.eos_token_ids
    table = TokenTable(vocabulary.pieces, vocabulary.special_ids, ends[0], encode or greedy)
    tokenizer = LLTokenizer(table, n_vocab=len(table.tokens), eos_token=ends)  # type: ignore[arg-type]
    return tokenizer


def parser_limits() -> LLParserLimits:
    """Bounds of a build (~1 s) and of one mask (~10 ms in a thread, ~50 MB of lexer states)."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=25_000,
        verbose_errors=False,
    )


def build_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the start of the text; ask ``is_error`` before use."""
    from llguidance import LLMatcher

    return LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())


def to_guidance(spec: GrammarSpec) -> str:
    """The constraint in llguidance's notation. Raises ``ValueError`` when it cannot be read at all."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    match spec.kind:
        case "json_schema" | "json_object":
            schema = spec.text if spec.kind == "json_schema" else '{"type": "object"}'
            schema = "{}" if schema == "true" else schema  # the two spellings of "anything"
            if (
                '"x-guidance"' in schema
            ):  # a default pattern would win over the request's own white space option
                return LLMatcher.grammar_from_json_schema(schema, defaults={"coerce_one_of": True})
            return LLMatcher.grammar_from_json_schema(
                schema, defaults={"coerce_one_of": True, "whitespace_pattern": JSON_WHITESPACE}
            )
        case "regex":  # \d, \w and \s are ASCII, as in the other servers of this API
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(spec.text, 'dws')}/")
        case "choice":  # one lexeme, however many choices: parser rows stay small
            choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(spec.text))
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
        case "grammar":
            return grammar_from("grammar", spec.text)
    raise ValueError(f"unknown kind {spec.kind}")


def refusal(kind: str, reason: str) -> str:
    """One sentence for the client out of a builder's message: its ``error:`` line, else its first one."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()] or ["it cannot be built"]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    if line.startswith("at ") and ": " in line:
        line = line.split(": ", 1)[1]
    if line.startswith("NoExtension"):
        line = "no text can match it"
    name = {"json_schema": "JSON schema", "json_object": "JSON schema"}.get(kind, kind)
    return f"The {name} cannot be used: {line[:MAX_REASON_CHARS].rstrip('. ')}."


# -- the child ----------------------------------------------------------------------------------------


def _vet(tokenizer: LLTokenizer, spec: GrammarSpec) -> Verdict:
    try:
        grammar = to_guidance(spec)
    except (ValueError, RecursionError) as error:
        return Verdict(error=refusal(spec.kind, str(error)))
    matcher = build_matcher(tokenizer, grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return Verdict(error=refusal(spec.kind, matcher.get_error()))
    return Verdict(grammar)


def _serve(sock: socket.socket) -> None:
    tokenizer: LLTokenizer | None = None
    reader = FrameReader(Vocabulary)
    while data := sock.recv(1 << 20):
        for message in reader.feed(data):
            if isinstance(message, Vocabulary):
                tokenizer = make_tokenizer(message)
                reader = FrameReader(GrammarSpec)
                answer = Verdict()
            else:
                assert isinstance(message, GrammarSpec) and tokenizer is not None
                answer = _vet(tokenizer, message)
            sock.sendall(encode_frame(answer))


def main(fd: int, parent_pid: int) -> None:
    """Check grammars until the socket closes."""
    from outrider.engine.process import die_with_parent

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks the engine, whose session this is, for its stacks
    die_with_parent(parent_pid)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(BUILD_STACK_BYTES)
    thread = threading.Thread(target=_serve, args=[socket.socket(fileno=fd)])
    thread.start()
    thread.join()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
