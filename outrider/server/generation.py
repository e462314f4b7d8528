"""Runs the engine requests behind one API call and turns their events into text, choice by choice.

``Generation`` submits, merges events of several choices and aborts; ``Choice`` detokenises, finds stop strings and
keeps the counts. Called by the completions and chat handlers; knows neither JSON nor HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec

from outrider.engine.protocol import EngineClient
from outrider.errors import DeadlineError, EngineDeadError, EngineError, RequestError
from outrider.server.context import ServerContext
from outrider.server.metrics import Metrics
from outrider.server.sampling import derived_seed
from outrider.text.detokenizer import Detokenizer
from outrider.types import (
    FINISH_ABORT,
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    ImageInput,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)

ENGINE_FAILED = "The engine could not finish this request; send it again."


@dataclass(frozen=True)
class Prompt:
    """One prompt of an API call; ``text`` is None when the client sent ids."""

    ids: list[int]
    text: str | None = None
    images: tuple[ImageInput, ...] = ()


class Delta(msgspec.Struct):
    """What one event means for the client: new text, the tokens it counts, and how the choice ended."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Choice:
    """One continuation: its engine request, its text so far and its numbers."""

    def __init__(
        self,
        context: ServerContext,
        index: int,
        request: Request,
        *,
        skip_special_tokens: bool,
        score_only: bool,
    ) -> None:
        sampling = request.sampling
        self.index = index
        self.request = request
        self.finished = False
        self.engine_done = False
        self.num_cached_tokens = 0
        self._score_only = score_only
        self._include_stop = sampling.include_stop_str_in_output
        self._end_token_ids = frozenset(sampling.eos_token_ids) | frozenset(sampling.stop_token_ids)
        self._detokenizer = Detokenizer(
            context.tokenizer,
            stop=sampling.stop,
            include_stop=self._include_stop,
            skip_special_tokens=skip_special_tokens,
            min_tokens=sampling.min_tokens,
        )
        self._timer = context.metrics.start_request(request)

    @property
    def num_tokens(self) -> int:
        """Generated tokens so far: the end token and the tokens of a stop string count."""
        return 0 if self._score_only else self._detokenizer.num_tokens

    def feed(self, event: TokenEvent) -> Delta:
        """Consume an event. After a stop string the delta is final though the engine does not know it yet."""
        self.engine_done = event.finish_reason is not None
        if event.finish_reason == FINISH_ERROR:
            self.close(FINISH_ERROR)
            raise _failure(event)
        detokenizer = self._detokenizer
        ids, finish, stop_reason = event.token_ids, event.finish_reason, event.stop_reason
        self._timer.tokens(len(ids), event.queue_s)
        if event.num_cached_tokens:
            self.num_cached_tokens = event.num_cached_tokens
        before = detokenizer.num_tokens
        # A constrained text may end with its last token, which is text, and not with an end token.
        has_end_token = finish == FINISH_STOP and bool(ids) and ids[-1] in self._end_token_ids
        ends_silently = has_end_token and not self._include_stop
        text = detokenizer.push(ids[:-1] if ends_silently else ids)
        delta = Delta(text, ids, event.logprobs, event.prompt_logprobs, finish, stop_reason)
        if detokenizer.stop_match is not None:
            used = detokenizer.num_tokens - before
            delta.token_ids = ids[:used]
            delta.logprobs = event.logprobs[:used] if event.logprobs else event.logprobs
            delta.finish_reason, delta.stop_reason = FINISH_STOP, detokenizer.stop_match
        elif finish is not None:
            detokenizer.skip(before + len(ids) - detokenizer.num_tokens)
            delta.text += detokenizer.finish()
        if delta.finish_reason is not None:
            self.close(delta.finish_reason)
        if self._score_only:  # the engine had to generate one token; the client asked for none
            return Delta("", [], None, event.prompt_logprobs, delta.finish_reason and FINISH_LENGTH)
        return delta

    def close(self, reason: str) -> None:
        """The choice has ended for the given reason; only the first call counts."""
        if not self.finished:
            self.finished = True
            self._timer.finish(reason, self.num_tokens, self.num_cached_tokens)


def _failure(event: TokenEvent) -> Exception:
    """The error that a last event stands for."""
    text = event.error or ENGINE_FAILED
    if event.error_status < 500:
        return RequestError(text)
    return {503: EngineDeadError, 504: DeadlineError}.get(event.error_status, EngineError)(text)


class Generation:
    """All choices of one API call: prompts times ``n``, in that order."""

    def __init__(
        self,
        context: ServerContext,
        request_id: str,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        n: int,
        cache_salt: str,
        priority: int,
        skip_special_tokens: bool,
        score_only: bool,
    ) -> None:
        """``params[i]`` belongs to ``prompts[i]``; ``score_only`` hides the generated tokens.

        Nothing is submitted before ``start``.
        """
        self._engine: EngineClient = context.engine
        self._metrics: Metrics = context.metrics
        self.prompts = prompts
        self.n = n
        now = time.monotonic()
        self.choices = [
            Choice(
                context,
                p * n + k,
                Request(
                    request_id=f"{request_id}-{p}-{k}",
                    prompt_token_ids=prompt.ids,
                    sampling=msgspec.structs.replace(sampling, seed=derived_seed(sampling.seed, p * n + k)),
                    arrival_s=now,
                    priority=priority,
                    cache_salt=cache_salt,
                    images=prompt.images,
                ),
                skip_special_tokens=skip_special_tokens,
                score_only=score_only,
            )
            for p, (prompt, sampling) in enumerate(zip(prompts, params, strict=True))
            for k in range(n)
        ]
        self._streams: list[AsyncIterator[TokenEvent]] = []
        self._is_closed = False

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens, each prompt counted once."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens of all choices so far."""
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache, each prompt counted once."""
        return sum(choice.num_cached_tokens for choice in self.choices[:: self.n])

    def start(self) -> None:
        """Hand every choice to the engine; when one is refused, none runs and the error is raised."""
        try:
            for choice in self.choices:
                self._streams.append(self._engine.submit(choice.request))
        except BaseException:
            self.close()
            raise

    async def deltas(self) -> AsyncIterator[list[tuple[Choice, Delta]]]:
        """What happened since the last time, until every choice has ended. Leaving early aborts the rest."""
        try:
            if len(self.choices) == 1:
                choice = self.choices[0]
                async for event in self._streams[0]:
                    yield [(choice, choice.feed(event))]
                    if choice.finished:
                        return
            else:
                async for batch in self._merged():
                    yield [
                        (choice, self._feed(choice, event)) for choice, event in batch if not choice.finished
                    ]
        finally:
            self.close()

    def close(self) -> None:
        """Abort what has not ended. Idempotent."""
        for choice, _ in zip(self.choices, self._streams, strict=False):
            self._abort(choice)
        for choice in self.choices:
            choice.close(FINISH_ABORT)
        if self._streams and not self._is_closed:
            self._is_closed = True
            for first in range(0, len(self.choices), self.n):
                self._metrics.observe_choices([c.num_tokens for c in self.choices[first : first + self.n]])

    def _feed(self, choice: Choice, event: TokenEvent) -> Delta:
        delta = choice.feed(event)
        if choice.finished:
            self._abort(choice)
        return delta

    def _abort(self, choice: Choice) -> None:
        """Tell the engine that nobody waits any more (after a stop string it would go on); once."""
        if not choice.engine_done:
            choice.engine_done = True
            self._engine.abort(choice.request.request_id)

    async def _merged(self) -> AsyncIterator[list[tuple[Choice, TokenEvent]]]:
        """Events of all streams as they come; those that arrive while the consumer is busy come together."""
        inbox: list[tuple[Choice, TokenEvent]] = []
        wake, taken = asyncio.Event(), asyncio.Event()

        async def pump(choice: Choice, stream: AsyncIterator[TokenEvent]) -> None:
            try:
                async for event in stream:
                    if choice.finished:
                        return
                    inbox.append((choice, event))
                    wake.set()
                    while len(inbox) >= len(
                        tasks
                    ):  # what nobody reads stays in the streams, which are bounded
                        taken.clear()
                        await taken.wait()
            finally:
                wake.set()

        tasks = [
            asyncio.create_task(pump(choice, stream))
            for choice, stream in zip(self.choices, self._streams, strict=True)
        ]
        try:
            while True:
                await wake.wait()
                wake.clear()
                if inbox:
                    batch, inbox[:] = inbox[:], []
                    taken.set()
                    yield batch
                if all(choice.finished for choice in self.choices):
                    return
                for task in tasks:
                    if task.done():
                        task.result()
                if not inbox and all(task.done() for task in tasks):
                    return
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
