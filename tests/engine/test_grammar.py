"""Constrained text: what the masks allow is what an independent parser accepts, and no grammar harms its neighbours.

Oracles: ``json``, ``re`` and ``jsonschema``-free arithmetic on the decoded text, never our own masks.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from outrider.engine.engine import Engine
from outrider.engine.guidance import GuidanceCompiler, GuidanceGrammar
from outrider.engine.kv_manager import KVManager
from outrider.engine.scheduler import Limits, Scheduler
from outrider.kv_layout import plan_layout
from outrider.models.gguf import embedded_model_path
from outrider.text.tokenizer import Tokenizer
from outrider.types import FINISH_ERROR, FINISH_STOP, GrammarSpec, Request, SamplingParams, TokenEvent

DEEP = "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(4000)) + '\na4000: "x"'
OBJECT = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "tag": {"enum": ["x", "y"]}},
    "required": ["n", "tag"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(embedded_model_path())


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GuidanceCompiler]:
    built = GuidanceCompiler(lambda: tokenizer, tokenizer.vocab_size, [0])
    yield built
    built.close()


def constrained(kind: str, text: str, name: str = "r", **sampling: int) -> Request:
    params = SamplingParams(
        max_tokens=sampling.get("max_tokens", 64), eos_token_ids=(2, 0), grammar=GrammarSpec(kind, text)
    )
    return Request(request_id=name, prompt_token_ids=[1], sampling=params)


def build(compiler: GuidanceCompiler, kind: str, text: str) -> GuidanceGrammar | str:
    """The grammar, or the sentence that refuses it."""
    compiler.start(constrained(kind, text, f"{random.random()}"))
    while not (done := compiler.collect()):
        time.sleep(0.001)
    [(_, grammar, error)] = done
    assert (grammar is None) != (error is None)
    return error if error is not None else grammar  # type: ignore[return-value]


def allowed(grammar: GuidanceGrammar) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(np.frombuffer(grammar.mask(), np.uint8), bitorder="little"))


def walk(
    grammar: GuidanceGrammar, tokenizer: Tokenizer, rng: random.Random, max_tokens: int = 300
) -> str | None:
    """Sample uniformly under the masks; the text, or None if it did not end in time."""
    ids: list[int] = []
    while not grammar.is_finished and len(ids) < max_tokens:
        token = int(rng.choice(allowed(grammar).tolist()))
        grammar.advance(token)
        assert grammar.error is None
        if token in (2, 0):
            assert grammar.is_finished, "the end token must end the text"
            break
        ids.append(token)
    return tokenizer.decode(ids) if grammar.is_finished else None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "pattern", ["[a-z]{3}", "(yes|no), [0-9]{1,3}%", r"\d{4}-\d{2}-\d{2}", "é+/x", "a{2,3}|(b|cc)d?"]
)
def test_random_walks_match_the_pattern(
    compiler: GuidanceCompiler, tokenizer: Tokenizer, pattern: str, seed: int
) -> None:
    """Guards against a shifted or truncated bitmask: Python's own ``re`` accepts what comes out."""
    grammar = build(compiler, "regex", pattern)
    assert isinstance(grammar, GuidanceGrammar)
    text = walk(grammar, tokenizer, random.Random(seed))
    if text is not None:
        assert re.fullmatch(pattern, text, re.ASCII)


@pytest.mark.parametrize("seed", range(6))
def test_random_walks_are_valid_json(compiler: GuidanceCompiler, tokenizer: Tokenizer, seed: int) -> None:
    """Guards against masks that let a schema slip, and against endless whitespace between JSON tokens."""
    grammar = build(compiler, "json_schema", json.dumps(OBJECT))
    assert isinstance(grammar, GuidanceGrammar)
    text = walk(grammar, tokenizer, random.Random(seed), 2000)
    assert text is not None
    value = json.loads(text)
    assert set(value) == {"n", "tag"} and isinstance(value["n"], int) and value["tag"] in ("x", "y")
    assert len(re.findall(r"\s", text)) <= 48 * 9


@pytest.mark.parametrize(
    "choices", [["yes", "no"], ['é"\\\n', "日本😀"], ["", "a"], [f"v{i:04}" for i in range(3000)]]
)
def test_choices_survive_quoting_and_number(
    compiler: GuidanceCompiler, tokenizer: Tokenizer, choices: list[str]
) -> None:
    """Guards against choices that break the grammar's own string syntax, or its row limit."""
    grammar = build(compiler, "choice", json.dumps(choices))
    assert isinstance(grammar, GuidanceGrammar)
    assert walk(grammar, tokenizer, random.Random(1)) in choices


def test_every_end_token_of_the_model_may_end_the_text(compiler: GuidanceCompiler) -> None:
    """Llama 4 has three; a mask with one of them would fight the sampler's own preference."""
    grammar = build(compiler, "regex", "a*")
    assert isinstance(grammar, GuidanceGrammar)
    assert {0, 2} <= set(allowed(grammar).tolist())


@pytest.mark.parametrize(
    ("kind", "text", "word"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "(?=a)b", "look"),
        ("json_schema", '{"type": "banana"}', "banana"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", "nonsense", "schema"),
        ("json_schema", '{"$ref": "file:///etc/passwd"}', "not present"),
        ("grammar", "start: foo", "foo"),
        ("grammar", "root ::= (((((", "Expected"),
        ("regex", "x" * (1 << 17), "longer"),
    ],
)
def test_bad_grammars_are_refused_in_one_sentence(
    compiler: GuidanceCompiler, kind: str, text: str, word: str
) -> None:
    """The client is told what is wrong, in one line without excerpts of internals."""
    error = build(compiler, kind, text)
    assert isinstance(error, str) and word in error and "\n" not in error and error.endswith(".")
    assert len(error) < 300


HOSTILE = {
    "deep rules": ("grammar", DEEP),
    "deep terminals": ("grammar", DEEP.replace("start", "START").replace("a", "A").replace("STArt", "start")),
    "exponential terminals": (
        "grammar",
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "x"',
    ),
    "ambiguous": ("grammar", 'start: x{1000}\nx: y{1000}\ny: z{1000}\nz: "a"'),
    "slow regex": ("regex", "(.*a.*b)*" * 3000),
    "huge repetition": ("regex", "(" * 40 + "a" + "){1,9}" * 40),
    "deep schema": ("json_schema", '{"anyOf":[' * 5000 + "{}" + "]}" * 5000),
    "self reference": ("json_schema", '{"$ref": "#"}'),
    "product of choices": (
        "json_schema",
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"x{i}_{j}": {"type": "integer"}}} for j in range(4)]}
                    for i in range(12)
                ]
            }
        ),
    ),
    "deep gbnf": ("grammar", "root ::= " + "(" * 15000 + '"a"' + ")" * 15000),
    "many properties": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"k{i}": {} for i in range(4000)}}),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_end_in_time_and_leave_the_process_alone(
    compiler: GuidanceCompiler, name: str
) -> None:
    """Stack overflow, exponential size and slow builds happen in the child; here the loop's thread keeps running."""
    kind, text = HOSTILE[name]
    gaps: list[float] = []
    stop = threading.Event()

    def tick() -> None:  # stands for the engine's loop: it wants the interpreter every millisecond
        last = time.perf_counter()
        while not stop.wait(0.001):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    started = time.monotonic()
    outcome = build(compiler, kind, text)
    took = time.monotonic() - started
    stop.set()
    ticker.join()
    assert took < 8.0
    assert sum(gap > 0.25 for gap in gaps) <= 2, "the build held the interpreter"
    assert isinstance(outcome, GuidanceGrammar) or outcome.endswith(".")
    assert isinstance(build(compiler, "regex", "ok"), GuidanceGrammar), "the next request is served"


def test_a_late_child_is_killed_and_replaced(tokenizer: Tokenizer) -> None:
    """A build that cannot be interrupted must not outlive its deadline."""
    from outrider.engine.grammar_check import GrammarChecker, Vocabulary

    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    checker = GrammarChecker(Vocabulary(pieces, sorted(tokenizer.special_ids), [2]), timeout_s=0.1)
    try:
        started = time.monotonic()
        assert "longer than 0.1 s" in (checker.check(GrammarSpec("regex", "(.*a.*b)*" * 3000)).error or "")
        assert time.monotonic() - started < 2.0
        assert checker.check(GrammarSpec("regex", "a")).error is None
    finally:
        checker.close()


def test_a_limit_in_mid_text_is_an_error_of_that_sequence(compiler: GuidanceCompiler) -> None:
    """The grammar gives up after some tokens: only the end token stays allowed, and the error is reported."""
    grammar = build(compiler, "regex", r"[\p{L}\p{N}]{1,100}" * 3000)
    assert isinstance(grammar, GuidanceGrammar)
    rng = random.Random(0)
    for _ in range(200):
        ids = allowed(grammar)
        grammar.advance(int(rng.choice(ids.tolist())))
        if grammar.error is not None:
            break
    assert grammar.error is not None and grammar.error.endswith(".")
    assert not grammar.is_finished


def test_the_cache_stays_within_its_bytes(compiler: GuidanceCompiler) -> None:
    """Guards against a cache of unique schemas that grows for ever (GHSA-mgrm-fgjv-mhv8)."""
    from outrider.engine.guidance import _GrammarCache

    cache = _GrammarCache(1_000_000)
    for i in range(200):
        cache.put(GrammarSpec("regex", f"{i}" + "x" * 100), "refused")
    assert len(cache._entries) < 25
    assert cache.get(GrammarSpec("regex", "199" + "x" * 100)) == "refused"
    assert cache.get(GrammarSpec("regex", "0" + "x" * 100)) is None


class MaskedExecutor:
    """Samples the first allowed token of constrained rows and a constant for free ones."""

    def launch(self, plan):  # type: ignore[no-untyped-def]
        from outrider.types import StepResult

        ids = []
        for piece in plan.slices:
            if piece.samples:
                mask = plan.masks.get(piece.row)
                bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little") if mask else None
                ids.append(7 if bits is None else int(np.flatnonzero(bits)[-1]))
        result = StepResult(plan.step_id, ids, [None] * len(ids))

        class Handle:
            def wait(self) -> StepResult:
                return result

        return Handle()

    def shutdown(self) -> None:
        """Nothing to free."""


@pytest.mark.parametrize("depth", [1, 2])
def test_the_engine_runs_constrained_beside_free_requests(compiler: GuidanceCompiler, depth: int) -> None:
    """A refused grammar ends its request with status 400 and nothing else; the others run to their ends."""
    scheduler = Scheduler(KVManager(plan_layout((False,), None, 256, 16), 64, True), Limits(8, 64, 32))
    engine = Engine(scheduler, MaskedExecutor(), compiler, depth)
    free = Request(request_id="free", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=40))
    for request in (
        free,
        constrained("json_schema", json.dumps(OBJECT), "json", max_tokens=200),
        constrained("regex", "(", "bad"),
        constrained("grammar", DEEP, "deep"),
        constrained("choice", '["aa", "bb"]', "choice"),
    ):
        assert engine.add(request) == []
    engine.add(constrained("regex", "zz", "gone"))
    engine.abort("gone")
    events: list[TokenEvent] = []
    deadline = time.monotonic() + 20
    while engine.has_work and time.monotonic() < deadline:
        events += engine.step()
        time.sleep(0.0005)
    last = {event.request_id: event for event in events if event.finish_reason}
    assert set(last) == {"free", "json", "bad", "deep", "choice"}
    assert last["free"].finish_reason == "length"
    assert sum(len(e.token_ids) for e in events if e.request_id == "free") == 40
    assert (
        last["json"].finish_reason in (FINISH_STOP, "length") and last["choice"].finish_reason == FINISH_STOP
    )
    for name in ("bad", "deep"):
        assert (last[name].finish_reason, last[name].error_status) == (FINISH_ERROR, 400)
    scheduler.check_integrity()
