"""The values that travel between the rooms: requests, step plans, results, token events.

Every room imports this file; it imports nothing of outrider and never torch. All types are
``msgspec`` structs, so the same value crosses a process border as msgpack (never pickle).

    HTTP -> Request -> [engine] -> StepPlan -> [runner] -> StepResult -> [engine] -> TokenEvent -> HTTP
"""

from __future__ import annotations

import msgspec

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"
FINISH_ERROR = "error"

STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class GrammarSpec(msgspec.Struct, frozen=True):
    """A constraint on the generated text, in llguidance's own notation.

    ``kind`` is one of ``json_schema``, ``json_object``, ``regex``, ``choice``, ``grammar`` (Lark/EBNF).
    ``text`` holds the schema, pattern or grammar source; for ``choice`` a JSON list of strings.
    """

    kind: str
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence is sampled; every value is already validated and defaulted.

    ``temperature`` 0 means greedy. ``top_k`` 0 and ``top_p`` 1 mean off. ``stop`` strings are the
    text layer's business: the engine reads only token ids. ``logprobs`` is the number of top
    alternatives reported beside the sampled token (0: the sampled token alone, None: nothing).
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Ids that finish the sequence when sampled (eos unless ignored, and the user's own)."""
        eos = () if self.ignore_eos else self.eos_token_ids
        return frozenset(eos) | frozenset(self.stop_token_ids)

    @property
    def uses_history(self) -> bool:
        """Whether sampling depends on the tokens seen so far (penalties)."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


class ImageInput(msgspec.Struct, frozen=True):
    """One preprocessed image and the places of its patch tokens in the prompt.

    ``pixels`` is raw little-endian bfloat16 of shape ``[num_tiles, 3, size, size]``; ``spans`` lists
    ``(start, length)`` runs of patch tokens in prompt positions, in the order of the tiles' features;
    ``digest`` identifies the content for the prefix cache (SHA-256 of bytes and shape).
    """

    pixels: bytes
    num_tiles: int
    size: int
    spans: tuple[tuple[int, int], ...]
    digest: bytes


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled continuation that is known to be runnable; built only by the OpenAI layer.

    Invariants: ``1 <= len(prompt_token_ids)``, ``max_tokens >= 1`` and their sum is at most the
    model's ``max_model_len``; every id is inside the vocabulary. ``arrival_s`` is read from the host's monotonic
    clock, which all its processes share.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_s: float = 0.0
    priority: int = 0
    cache_salt: str = ""
    images: tuple[ImageInput, ...] = ()


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Raw log-softmax of one position: the token's own value and rank (1 is the best), and the top ones."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class TokenEvent(msgspec.Struct, array_like=True):
    """What one step brought to one request. ``finish_reason`` is set exactly once, in the last event.

    ``stop_reason`` is the stopping token id when it is not the primary eos (``eos_token_ids[0]``).
    ``prompt_logprobs`` (one entry per prompt position, the first None) comes with the first event.
    ``error`` is a fixed sentence for the client when ``finish_reason`` is ``error``, and ``error_status`` its HTTP
    status: 400 when the request itself is at fault (a grammar that cannot be built), 500 otherwise.
    ``queue_s`` comes with the first token: the time from ``Request.arrival_s`` to its first step.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    error_status: int = 500
    queue_s: float = 0.0


class RowInit(msgspec.Struct, frozen=True, array_like=True):
    """A sequence takes a device row: its sampling parameters and all its tokens known so far."""

    row: int
    sampling: SamplingParams
    prompt_len: int
    token_ids: list[int]
    images: tuple[ImageInput, ...] = ()


class SeqSlice(msgspec.Struct, frozen=True, array_like=True):
    """ "Compute tokens [start, start + num_tokens) of the sequence in ``row``": prefill and decode alike.

    ``from_device``: the single input id was sampled by a step that the host has not read yet; the
    runner takes it from the row's device slot. Otherwise ids are those the row already knows plus
    ``token_ids``, which are exactly the ids of the slice.
    ``samples``: the slice reaches the sequence's end, so a token is sampled from its last logits.
    ``output_index``: how many tokens the sequence had generated before this one (drives the seed).
    """

    row: int
    start: int
    num_tokens: int
    token_ids: list[int]
    from_device: bool
    samples: bool
    output_index: int


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step, decided by the scheduler, executed by every rank. Plain ints only.

    ``block_updates`` are ``(group, row, index, block_id)`` writes to the rows' block tables, applied
    before the step. ``slices`` come decodes (one token) first. ``masks`` maps a row to the packed
    little-endian bitmask (bit set: token allowed) of its grammar.
    """

    step_id: int
    slices: list[SeqSlice]
    new_rows: list[RowInit] = []
    block_updates: list[tuple[int, int, int, int]] = []
    masks: dict[int, bytes] = {}


class StepResult(msgspec.Struct, array_like=True):
    """The outcome of a step, one entry per *sampling* slice of the plan, in order.

    A ``token_id`` of -1 means that the row's logits were not finite. ``logprobs[i]`` is None unless
    asked for. ``prompt_logprobs`` holds, per slice index of the plan, the entries of its positions.
    """

    step_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}


class EngineStats(msgspec.Struct, array_like=True):
    """A snapshot of the engine, sent with every batch of events; counters only ever grow.

    ``ledger_checks`` counts how often the idle engine found every block and every row where its books say.
    ``step_token_counts[i]`` is the number of steps of at most ``STEP_TOKEN_BUCKETS[i]`` tokens and more than the
    bucket before, with one entry more for longer steps; ``num_compiling`` counts requests whose grammar is built.
    """

    num_running: int = 0
    num_waiting: int = 0
    waiting_prompt_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_prompt_tokens: int = 0
    prefix_query_tokens: int = 0
    preemptions: int = 0
    step_tokens: int = 0
    last_step_s: float = 0.0
    ledger_checks: int = 0
    num_compiling: int = 0
    step_tokens_sum: int = 0
    step_token_counts: list[int] = []


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine found and chose, sent once when it is ready; shown in the start-up line and `/server_info`."""

    model: str
    architecture: str
    device: str
    dtype: str
    quantization: str
    kv_cache_dtype: str
    kernels: dict[str, str]
    max_model_len: int
    block_size: int
    num_blocks: int
    kv_capacity_tokens: int
    max_concurrency: float
    startup_s: dict[str, float] = {}
    weights_gb: float = 0.0
    max_num_seqs: int = 0
