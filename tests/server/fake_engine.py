"""A deterministic stand-in for the engine, behind the same protocol: says what the test tells it to say."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Sequence

from outrider.engine.protocol import Health
from outrider.types import EngineInfo, EngineStats, Request, TokenEvent, TokenLogprobs


def token_logprobs(position: int, token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """Made-up but consistent values: ranked alternatives, and the token's own rank among them."""
    rng = random.Random(position * 1_000_003 + token_id)
    ids = rng.sample(range(vocab_size), max(num_top, 1) + 1)
    values = sorted((math.log(rng.uniform(0.001, 0.3)) for _ in ids), reverse=True)
    rank = rng.randrange(1, len(ids) + 1)
    if token_id in ids:
        ids.remove(token_id)
        ids.append(next(i for i in range(vocab_size) if i not in ids and i != token_id))
    ids[rank - 1] = token_id
    return TokenLogprobs(token_id, values[rank - 1], rank, ids[:num_top], values[:num_top])


class FakeEngine:
    """Answers every request with ``reply(request)``, ``group`` tokens an event, ``delay_s`` before each.

    Ends as a real engine does: at an end token, or at ``max_tokens``. ``submitted`` and ``aborted`` record the calls;
    ``fail`` is raised by the next submit; ``error_after`` ends a request with an error event after so many events.
    """

    def __init__(
        self, reply: Callable[[Request], Sequence[int]], *, vocab_size: int, max_model_len: int = 512
    ) -> None:
        self.reply = reply
        self.vocab_size = vocab_size
        self.group = 1
        self.delay_s = 0.0
        self.fail: Exception | None = None
        self.error_after: int | None = None
        self.state = Health(ready=True, alive=True)
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.num_restarts = 0
        self.num_stalls = 0
        self.stats = EngineStats(kv_blocks_total=100, kv_blocks_used=25, num_running=3, generation_tokens=77)
        self.info = EngineInfo(
            model="tests/tiny",
            architecture="Fake",
            device="cpu",
            dtype="float32",
            quantization="none",
            kv_cache_dtype="float32",
            kernels={},
            max_model_len=max_model_len,
            block_size=16,
            num_blocks=100,
            kv_capacity_tokens=1600,
            max_concurrency=3.0,
        )

    def submit(self, request: Request) -> AsyncIterator[TokenEvent]:
        if self.fail is not None:
            raise self.fail
        self.submitted.append(request)
        return self._events(request)

    async def _events(self, request: Request) -> AsyncIterator[TokenEvent]:
        sampling = request.sampling
        ids = list(self.reply(request))[: sampling.max_tokens]
        ends = sampling.end_token_ids
        stop_at = next((i for i, token in enumerate(ids) if token in ends and i >= sampling.min_tokens), None)
        if stop_at is not None:
            ids = ids[: stop_at + 1]
        for count, start in enumerate(range(0, len(ids), self.group)):
            await asyncio.sleep(self.delay_s)
            if request.request_id in self.aborted:
                return
            part = ids[start : start + self.group]
            event = TokenEvent(request.request_id, part)
            if self.error_after is not None and count >= self.error_after:
                yield TokenEvent(request.request_id, [], "error", error="The step failed.")
                return
            if start == 0 and sampling.prompt_logprobs is not None:
                event.prompt_logprobs = [None] + [
                    token_logprobs(i, token, sampling.prompt_logprobs, self.vocab_size)
                    for i, token in enumerate(request.prompt_token_ids[1:], 1)
                ]
            if sampling.logprobs is not None:
                base = len(request.prompt_token_ids) + start
                event.logprobs = [
                    token_logprobs(base + i, token, sampling.logprobs, self.vocab_size)
                    for i, token in enumerate(part)
                ]
            if start + self.group >= len(ids):
                event.finish_reason = "length" if stop_at is None else "stop"
                if stop_at is not None and part[-1] != sampling.eos_token_ids[0]:
                    event.stop_reason = part[-1]
            yield event

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def health(self) -> Health:
        return self.state

    async def reset_prefix_cache(self) -> bool:
        return True
