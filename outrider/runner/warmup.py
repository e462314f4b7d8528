"""Steps on made-up tokens: they compile every kernel before the first request and show the peak memory.

Called by ``setup`` only. The tokens are random, never zeros, and their k/v go into blocks that no request holds yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from outrider.kv_layout import plan_layout
from outrider.models.config import ModelConfig
from outrider.models.decoder import Decoder
from outrider.runner.batch import AttentionBatch, Batch
from outrider.runner.kv_cache import KVCache
from outrider.runner.model_runner import ModelRunner
from outrider.types import RowInit, SamplingParams, SeqSlice, StepPlan

if TYPE_CHECKING:
    from outrider.runner.resolve import Resolved


@torch.inference_mode()
def measure_activations(model: Decoder, config: ModelConfig, resolved: Resolved) -> int:
    """Peak bytes of weights and activations in a full prefill step followed by a full sampling step."""
    layout = plan_layout(config.rope_layers, None, resolved.max_model_len, resolved.block_size)
    kv = KVCache(layout, 2, model.kv_heads_per_rank, config.head_dim, resolved.kv_dtype, resolved.device)
    torch.cuda.reset_peak_memory_stats(resolved.device)
    num_tokens = resolved.max_num_batched_tokens
    device = resolved.device
    length = min(num_tokens, resolved.max_model_len)
    num_seqs = -(-num_tokens // length)
    starts = torch.arange(num_seqs + 1, device=device).mul(length).clamp(max=num_tokens).int()
    attention = AttentionBatch(
        query_start=starts,
        seq_lens=starts.diff().int(),
        block_tables=torch.ones(
            (1, num_seqs, -(-length // resolved.block_size)), dtype=torch.int32, device=device
        ),
        slots=torch.zeros((1, num_tokens), dtype=torch.int64, device=device),
        num_decodes=0,
        max_query_len=length,
        max_seq_len=length,
    )
    token_ids = torch.randint(config.vocab_size, (num_tokens,), device=device)
    positions = torch.arange(num_tokens, device=device) % length
    hidden = model.forward(Batch(token_ids, positions, attention), kv)
    logits = model.logits(hidden[: resolved.max_num_seqs])
    _ = logits.float().softmax(-1)  # as much as sampling with logprobs ever holds
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def warm_up(runner: ModelRunner, max_num_batched_tokens: int) -> None:
    """Run one prefill, one mixed and one decode step with every kind of sampling, then forget them."""
    vocab_size = runner.vocab_size
    num_tokens = max(
        2, min(max_num_batched_tokens, runner.table.max_blocks * runner.kv.layout.block_size // 2)
    )
    ids = torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    greedy = SamplingParams(max_tokens=4, temperature=0.0)
    random = SamplingParams(max_tokens=4, temperature=0.8, top_p=0.9, top_k=20, logprobs=1)
    for params in (greedy, random):
        init = RowInit(0, params, num_tokens, ids)
        runner.launch(StepPlan(0, [_slice(0, ids[:-1])], [init])).wait()
        runner.launch(StepPlan(1, [_slice(num_tokens - 1, ids[-1:])])).wait()


def _slice(start: int, ids: list[int]) -> SeqSlice:
    return SeqSlice(0, start, len(ids), ids, False, True, 0)
