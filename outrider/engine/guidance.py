"""Constrained generation by ``llguidance``: grammars built off the engine's loop, masks computed beside the device.

``build_compiler`` is called once by the engine process (``runner/setup.py``); the engine and the scheduler see only
the protocols of ``engine/grammar.py``. A grammar is first built in a child process (``grammar_check``), then here;
equal texts share one build. Knows no HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from outrider.engine.grammar import Grammar
from outrider.engine.grammar_check import (
    GrammarChecker,
    Verdict,
    Vocabulary,
    build_matcher,
    make_tokenizer,
    refusal,
)
from outrider.errors import ConfigError
from outrider.text.tokenizer import Tokenizer
from outrider.types import GrammarSpec, Request

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

P = ParamSpec("P")
T = TypeVar("T")

MAX_GRAMMAR_CHARS = 64 << 10
CACHE_BYTES = 64 << 20
NUM_BUILDERS = 2
NUM_MASK_THREADS = 4
PATIENCE_S = 0.002
"""How long a step waits for the mask of a sequence whose last mask was on time; a late one costs this once."""

_BUILD_STACK_BYTES = 32 << 20  # eight times what the checker had
_BYTES_PER_CHAR, _BYTES_PER_GRAMMAR = (
    256,
    48 << 10,
)  # measured: 12 MB for the worst 43 KB schema, 25 KB for small ones

TOO_LONG = f"The grammar is longer than {MAX_GRAMMAR_CHARS:,} characters; shorten it."
FAILED = "The grammar could not be built; try again, or simplify it."
UNAVAILABLE = "This model's tokenizer cannot be constrained; drop the structured-output fields."

logger = logging.getLogger("outrider.engine")


class GuidanceGrammar:
    """One sequence's place in its grammar. Used by the scheduler's thread; masks are computed by a pool."""

    def __init__(self, matcher: LLMatcher, first_mask: bytes, pool: ThreadPoolExecutor, kind: str) -> None:
        """``matcher`` stands at the start of the text and belongs to this object alone."""
        self._matcher = matcher
        self._pool = pool
        self._kind = kind
        self._mask = first_mask
        self._next: Future[bytes] | None = None
        self._was_late = False
        self._finished = False
        self.error: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return self._finished

    @property
    def is_ready(self) -> bool:
        """Whether the mask is there; waits ``PATIENCE_S`` for one whose predecessor was on time."""
        if self._next is None:
            return True
        if not self._next.done():
            if self._was_late:
                return False
            try:
                self._next.result(PATIENCE_S)
            except FutureTimeoutError:
                self._was_late = True
                return False
        else:
            self._was_late = False
        return True

    def mask(self) -> bytes:
        """The tokens allowed now; after an error only the ends of the text, so that the sequence can be ended."""
        if self._next is not None:
            self._mask = self._next.result()
            self._next = None
            self._note_error()
        return self._mask

    def advance(self, token_id: int) -> None:
        """Take in the sampled token, and begin to compute the mask that follows it."""
        if self._finished or self.error is not None:
            return
        self.mask()
        self._matcher.consume_token(token_id)
        self._note_error()
        if self.error is None:
            self._finished = self._matcher.is_stopped()
        if self.error is None and not self._finished:
            self._next = self._pool.submit(self._matcher.compute_bitmask)

    def _note_error(self) -> None:
        if self._matcher.is_error() and self.error is None:
            self.error = refusal(self._kind, self._matcher.get_error())


class GuidanceCompiler:
    """Builds grammars for requests, two at a time, and remembers them. Used by the engine's thread."""

    def __init__(
        self, load_tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        """``load_tokenizer`` runs in the background; ``vocab_size`` is the number of logits."""
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._pending: set[str] = set()
        self._done: queue.SimpleQueue[tuple[Request, Grammar | None, str | None]] = queue.SimpleQueue()
        self._cache = _GrammarCache(CACHE_BYTES)
        self._local = threading.local()
        self._checkers: list[GrammarChecker] = []
        self._mask_pool = ThreadPoolExecutor(NUM_MASK_THREADS, "mask")
        self._builders = ThreadPoolExecutor(NUM_BUILDERS, "grammar")
        self._vocabulary: Future[tuple[LLTokenizer, Vocabulary]] = self._in_background(self._prepare)

    @property
    def num_pending(self) -> int:
        """Requests whose grammar is not collected yet."""
        return len(self._pending)

    def start(self, request: Request) -> None:
        """Begin to build the grammar of a request; equal grammars are built once."""
        self._pending.add(request.request_id)
        self._in_background(self._build, request)

    def cancel(self, request_id: str) -> None:
        """Forget a request that is still compiling."""
        self._pending.discard(request_id)

    def collect(self) -> list[tuple[Request, Grammar | None, str | None]]:
        """What was finished since the last call, without the cancelled ones."""
        built = []
        while not self._done.empty():
            item = self._done.get()
            request_id = item[0].request_id
            if request_id in self._pending:
                self._pending.remove(request_id)
                built.append(item)
        return built

    def close(self) -> None:
        """End the threads and the child processes; running builds are cut short."""
        self._builders.shutdown(wait=False, cancel_futures=True)
        self._mask_pool.shutdown(wait=False, cancel_futures=True)
        for checker in self._checkers:
            checker.close()

    def _in_background(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit to the builders; the pool starts its threads on demand, in this call, with room for recursion."""
        threading.stack_size(_BUILD_STACK_BYTES)
        try:
            return self._builders.submit(work, *args, **kwargs)
        finally:
            threading.stack_size(0)

    def _prepare(self) -> tuple[LLTokenizer, Vocabulary]:
        tokenizer = self._load_tokenizer()
        count = min(self._vocab_size, tokenizer.vocab_size)
        pieces = [tokenizer.token_bytes(i) for i in range(count)]
        special = sorted(i for i in tokenizer.special_ids if i < count)
        ends = dict.fromkeys((tokenizer.eos_token_id, *self._eos_token_ids))
        vocabulary = Vocabulary(pieces, special, [i for i in ends if i is not None and i < count])
        if not vocabulary.eos_token_ids:
            raise ConfigError("The tokenizer names no end token, so constrained text could not end.")
        return make_tokenizer(
            vocabulary, lambda text: tokenizer.encode(text, add_special_tokens=False)
        ), vocabulary

    def _build(self, request: Request) -> None:
        """Runs in a builder thread; whatever happens, the request gets an answer."""
        spec = request.sampling.grammar
        assert spec is not None, "only constrained requests are compiled"
        grammar: Grammar | None = None
        error: str | None = FAILED
        try:
            if request.request_id in self._pending:
                grammar, error = self._grammar(spec)
        except ConfigError as config_error:
            logger.error("Constrained generation is not available: %s", config_error)
            error = UNAVAILABLE
        except Exception:
            logger.exception("A grammar could not be built.")
        finally:
            self._done.put((request, grammar, error))

    def _grammar(self, spec: GrammarSpec) -> tuple[Grammar | None, str | None]:
        if len(spec.text) > MAX_GRAMMAR_CHARS:
            return None, TOO_LONG
        entry = self._cache.get(spec)
        if entry is None:
            entry = self._first_build(spec)
            self._cache.put(spec, entry)
        if isinstance(entry, str):
            return None, entry
        matcher, first_mask = entry
        return GuidanceGrammar(matcher.deep_copy(), first_mask, self._mask_pool, spec.kind), None

    def _first_build(self, spec: GrammarSpec) -> tuple[LLMatcher, bytes] | str:
        tokenizer, vocabulary = self._vocabulary.result()
        verdict = self._check(vocabulary, spec)
        if verdict.error is not None:
            return verdict.error
        matcher = build_matcher(tokenizer, verdict.grammar)
        first_mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            return refusal(spec.kind, matcher.get_error())
        return matcher, first_mask

    def _check(self, vocabulary: Vocabulary, spec: GrammarSpec) -> Verdict:
        """Ask the child of this builder thread."""
        if not hasattr(self._local, "checker"):
            self._local.checker = GrammarChecker(vocabulary)
            self._checkers.append(self._local.checker)
        checker: GrammarChecker = self._local.checker
        return checker.check(spec)


class _GrammarCache:
    """Least recently used builds (a refusal counts too), within a number of bytes; shared by the builder threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[GrammarSpec, tuple[LLMatcher, bytes] | str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, spec: GrammarSpec) -> tuple[LLMatcher, bytes] | str | None:
        """The build or the refusal of an equal grammar, if it is remembered."""
        with self._lock:
            if spec in self._entries:
                self._entries.move_to_end(spec)
            return self._entries.get(spec)

    def put(self, spec: GrammarSpec, entry: tuple[LLMatcher, bytes] | str) -> None:
        """Remember a build; the oldest ones make room."""
        with self._lock:
            if spec in self._entries:
                return
            self._entries[spec] = entry
            self._num_bytes += _size(spec)
            while self._num_bytes > self._max_bytes:
                oldest, _ = self._entries.popitem(last=False)
                self._num_bytes -= _size(oldest)


def _size(spec: GrammarSpec) -> int:
    return _BYTES_PER_GRAMMAR + _BYTES_PER_CHAR * len(spec.text)


def build_compiler(
    model_path: str, tokenizer_path: str | None, vocab_size: int, eos_token_ids: Sequence[int]
) -> GuidanceCompiler:
    """The compiler for a model; its tokenizer is read in the background, from ``tokenizer_path`` if it has its own.

    ``eos_token_ids`` are the model's; the tokenizer's own end token is added. Texts end with any of them.
    """
    return GuidanceCompiler(lambda: Tokenizer.load(tokenizer_path or model_path), vocab_size, eos_token_ids)
