"""The least time a step can take: bytes that it must move and FLOPs that it must do, against what a device reaches.

Called by the benchmarks that set a measured step beside its floor. Counts from ``ModelConfig`` and from the slots of
the model as built on the ``meta`` device, so sizes are those of the checkpoint's formats. A step is four parts that
wait for each other (dense products, routed experts, attention, head); each takes the longer of its bytes and its
FLOPs, and their sum is the floor. Activations, launches and collectives count nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch

from outrider.models.config import ModelConfig
from outrider.models.dummy import DummySource
from outrider.models.registry import build_model
from outrider.parallel import Parallel


@dataclass(frozen=True)
class Rates:
    """What a device reaches: bytes a second of a large copy, FLOP/s of large products by operand."""

    bytes_per_s: float
    linear_flops: float
    attention_flops: float


@dataclass(frozen=True)
class Slice:
    """``count`` new tokens of a sequence of which ``start`` positions are in the cache: a decode has count 1."""

    start: int
    count: int = 1


@dataclass(frozen=True)
class Floor:
    """Seconds of each part of a step, and the bytes and FLOPs behind them."""

    dense_s: float
    experts_s: float
    attention_s: float
    head_s: float
    num_bytes: float
    flops: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.dense_s + self.experts_s + self.attention_s + self.head_s

    def __add__(self, other: Floor) -> Floor:
        return Floor(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class ModelCost:
    """Bytes of a model's weights by use and the FLOPs of a token.

    ``dense_bytes``: read by every step; ``expert_bytes``: one routed expert of one layer; ``head_bytes``: the matrix
    behind the logits; ``kv_itemsize``: a cached value. A product of ``[1, n] @ [n, m]`` counts as ``2nm`` FLOPs.
    """

    config: ModelConfig
    dense_bytes: int
    expert_bytes: int
    head_bytes: int
    kv_itemsize: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, kv_dtype: torch.dtype) -> ModelCost:
        """Measured on the ``meta`` device; nothing is allocated. ``dtype`` is what unquantized weights take."""
        model = build_model(
            config,
            Parallel(),
            DummySource(config),
            dtype=dtype,
            device=torch.device("meta"),
            kv_cache_dtype=kv_dtype,
        )
        sizes = {"head": 0, "embed": 0, "experts": 0, "vision": 0, "dense": 0}
        for slot in model.builder.slots:
            sizes[_use(slot.name)] += slot.dest.numel() * slot.dest.element_size()
        num_moe = sum(config.moe_layers)
        head = sizes["embed"] if config.tie_word_embeddings else sizes["head"]
        expert = sizes["experts"] // (num_moe * config.num_experts) if num_moe else 0
        return cls(config, sizes["dense"], expert, head, kv_dtype.itemsize)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one position of one layer."""
        return 2 * self.config.num_kv_heads * self.config.head_dim * self.kv_itemsize

    def experts_touched(self, num_tokens: int) -> float:
        """Expected number of a layer's experts that ``num_tokens`` tokens choose, with an even router."""
        config = self.config
        missed = (1 - config.num_experts_per_tok / config.num_experts) ** num_tokens
        return config.num_experts * (1 - missed)

    def step(self, slices: Sequence[Slice], rates: Rates) -> Floor:
        """The floor of one step; every slice ends in a sampled token."""
        config = self.config
        tokens = sum(piece.count for piece in slices)
        num_moe = sum(config.moe_layers)
        dense_flops = 2.0 * tokens * self._dense_params()
        expert_flops = (
            2.0 * tokens * num_moe * config.num_experts_per_tok * self._mlp(config.intermediate_size)
        )
        expert_bytes = num_moe * self.experts_touched(tokens) * self.expert_bytes if num_moe else 0.0
        head_flops = 2.0 * len(slices) * config.hidden_size * config.vocab_size
        reads, pairs = self._attention(slices)
        attention_bytes = (reads + tokens * config.num_layers) * self.kv_bytes_per_token
        attention_flops = 4.0 * config.num_heads * config.head_dim * pairs
        return Floor(
            max(self.dense_bytes / rates.bytes_per_s, dense_flops / rates.linear_flops),
            max(expert_bytes / rates.bytes_per_s, expert_flops / rates.linear_flops),
            max(attention_bytes / rates.bytes_per_s, attention_flops / rates.attention_flops),
            max(self.head_bytes / rates.bytes_per_s, head_flops / rates.attention_flops),
            self.dense_bytes + expert_bytes + attention_bytes + self.head_bytes,
            dense_flops + expert_flops + attention_flops + head_flops,
        )

    def decode(self, num_seqs: int, context: int, rates: Rates) -> Floor:
        """One token for each of ``num_seqs`` sequences that hold ``context`` tokens, the new one included."""
        return self.step([Slice(context - 1)] * num_seqs, rates)

    def prefill(self, prompt_len: int, max_step_tokens: int, rates: Rates) -> Floor:
        """One prompt alone, in steps of at most ``max_step_tokens`` that no attention chunk's end cuts."""
        starts = range(0, prompt_len, max_step_tokens)
        steps = [self.step([Slice(s, min(max_step_tokens, prompt_len - s))], rates) for s in starts]
        return _total(steps)

    def _dense_params(self) -> int:
        """Weights that every token is multiplied by, the head and the embedding not counted."""
        config = self.config
        heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o, k and v
        params = config.num_layers * heads * config.head_dim * config.hidden_size
        for is_moe in config.moe_layers:
            params += self._mlp(
                config.intermediate_size
                if is_moe
                else config.intermediate_size_mlp or config.intermediate_size
            )
            params += config.num_experts * config.hidden_size if is_moe else 0
        return params

    def _mlp(self, inter_size: int) -> int:
        return 3 * self.config.hidden_size * inter_size

    def _attention(self, slices: Sequence[Slice]) -> tuple[int, int]:
        """``(positions read, query-key pairs)`` summed over layers; a rope layer sees its chunk alone."""
        config = self.config
        num_local = sum(config.rope_layers) if config.attention_chunk_size else 0
        reads = pairs = 0
        for piece in slices:
            end = piece.start + piece.count
            num_full = config.num_layers - num_local
            reads += num_full * end
            pairs += num_full * _pairs(piece.start, piece.count)
            if num_local and config.attention_chunk_size:
                chunk = config.attention_chunk_size
                reads += num_local * (end - piece.start // chunk * chunk)
                pairs += num_local * sum(_pairs(*part) for part in _parts(piece, chunk))
        return reads, pairs


def _pairs(seen: int, count: int) -> int:
    """Query-key pairs of ``count`` causal queries behind ``seen`` positions."""
    return seen * count + count * (count + 1) // 2


def _parts(piece: Slice, chunk: int) -> Iterable[tuple[int, int]]:
    """``(positions of the chunk seen, count)`` of the slice's part in each chunk that it touches."""
    start, end = piece.start, piece.start + piece.count
    while start < end:
        border = min(end, (start // chunk + 1) * chunk)
        yield start % chunk, border - start
        start = border


def _use(name: str) -> str:
    """What a weight is for, by its canonical name."""
    if name.startswith(("vision_model.", "multi_modal_projector.")):
        return "vision"
    if name.startswith("embed_tokens."):
        return "embed"
    if name.startswith("lm_head."):
        return "head"
    return "experts" if ".experts." in name else "dense"


def _total(floors: Sequence[Floor]) -> Floor:
    total = floors[0]
    for floor in floors[1:]:
        total = total + floor
    return total
