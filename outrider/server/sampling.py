"""Sampling fields of a request to ``SamplingParams``: defaults, ranges that depend on the model, one clear refusal.

Defaults are the checkpoint's ``generation_config.json`` values, then the neutral ones. Called by the completions and
chat handlers; knows no HTTP.
"""

from __future__ import annotations

import math

from outrider.errors import RequestError
from outrider.server.context import ServerContext
from outrider.server.protocol import SamplingBody
from outrider.server.structured import grammar_spec
from outrider.types import SamplingParams

GREEDY_BELOW = 1e-5
MIN_TEMPERATURE = 0.01
_UNSUPPORTED = (
    "use_beam_search",
    "bad_words",
    "logprob_token_ids",
    "repetition_detection",
    "thinking_token_budget",
)


def sampling_params(
    context: ServerContext,
    body: SamplingBody,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The validated parameters of the first choice; ``max_tokens`` is already fitted to the context."""
    for name in _UNSUPPORTED:
        if getattr(body, name):
            raise RequestError(f"{name} is not supported; remove it.", param=name)
    temperature = _temperature(context, body)
    greedy = temperature == 0.0
    n = body.n or 1
    if greedy and n > 1:
        raise RequestError("n must be 1 when temperature is 0, since all choices would be equal.", param="n")
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens must be at most max_tokens ({max_tokens}), got {min_tokens}.", param="min_tokens"
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    seed = body.seed if body.seed not in (None, -1) else context.seeds.getrandbits(63)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=1.0 if greedy else _default(context, body, "top_p", 1.0),
        top_k=0 if greedy else max(0, int(_default(context, body, "top_k", 0))),
        min_p=0.0 if greedy else _default(context, body, "min_p", 0.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_default(context, body, "repetition_penalty", 1.0),
        seed=seed or 0,
        stop=stop,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        stop_token_ids=_token_ids(context, body.stop_token_ids, "stop_token_ids"),
        eos_token_ids=context.eos_token_ids,
        ignore_eos=bool(body.ignore_eos),
        logit_bias=_logit_bias(context, body.logit_bias),
        allowed_token_ids=_token_ids(context, body.allowed_token_ids, "allowed_token_ids"),
        logprobs=_logprob_count(context, logprobs, "logprobs"),
        prompt_logprobs=_logprob_count(context, prompt_logprobs, "prompt_logprobs"),
        grammar=grammar_spec(body),
    )


def output_budget(context: ServerContext, requested: int | None, prompt_len: int) -> int:
    """How many tokens may be generated after ``prompt_len`` prompt tokens; refuses what exceeds the context."""
    limit = context.max_model_len
    if requested is not None and requested > limit:
        raise RequestError(
            f"max_tokens={requested} cannot be greater than max_model_len={limit}.", param="max_tokens"
        )
    wanted = 1 if requested is None else requested
    if prompt_len + wanted > limit:
        raise RequestError(
            f"This model's maximum context length is {limit} tokens. However, you requested {wanted} output tokens "
            f"and your prompt contains {prompt_len} input tokens, for a total of {prompt_len + wanted} tokens. "
            f"Please reduce the length of the input prompt or the number of requested output tokens. "
            f"(parameter=input_tokens, value={prompt_len})",
            param="input_tokens",
        )
    budget = limit - prompt_len if requested is None else requested
    return min(budget, int(context.generation_defaults.get("max_new_tokens") or budget))


def derived_seed(seed: int, index: int) -> int:
    """The seed of choice ``index``; the first keeps the request's own."""
    return (seed + index * 0x9E3779B97F4A7C15) % (1 << 63) if index else seed


def truncate(context: ServerContext, body: SamplingBody, ids: list[int], reserved: int) -> list[int]:
    """Apply ``truncate_prompt_tokens``; -1 means all that the context leaves beside ``reserved`` output tokens."""
    if body.truncate_prompt_tokens is None:
        return ids
    room = context.max_model_len - reserved
    keep = room if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    if not 1 <= keep <= room:
        raise RequestError(
            f"truncate_prompt_tokens must be -1 or between 1 and {room} here, got {keep}.",
            param="truncate_prompt_tokens",
        )
    return ids[:keep] if body.truncation_side == "right" else ids[-keep:]


def _default(context: ServerContext, body: SamplingBody, name: str, neutral: float) -> float:
    value: float | None = getattr(body, name)
    return float(context.generation_defaults.get(name, neutral) if value is None else value)


def _temperature(context: ServerContext, body: SamplingBody) -> float:
    value = _default(context, body, "temperature", 1.0)
    return 0.0 if value < GREEDY_BELOW else max(value, MIN_TEMPERATURE)


def _token_ids(context: ServerContext, ids: list[int] | None, name: str) -> tuple[int, ...]:
    if ids and max(ids) >= context.vocab_size:
        raise RequestError(
            f"{name} holds {max(ids)}, but ids must be below the vocabulary size {context.vocab_size}.",
            param=name,
        )
    return tuple(dict.fromkeys(ids or ()))


def _logit_bias(context: ServerContext, bias: dict[str, float] | None) -> dict[int, float]:
    result = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < context.vocab_size):
            raise RequestError(
                f"logit_bias keys must be token ids below {context.vocab_size}.", param="logit_bias"
            )
        result[int(key)] = min(100.0, max(-100.0, value)) if math.isfinite(value) else 0.0
    return result


def _logprob_count(context: ServerContext, count: int | None, name: str) -> int | None:
    if count is None:
        return None
    limit = context.engine_config.max_logprobs
    if limit >= 0 and not 0 <= count <= limit:
        raise RequestError(f"{name} must be between 0 and {limit}, got {count}.", param=name)
    return context.vocab_size if count == -1 else min(count, context.vocab_size)
