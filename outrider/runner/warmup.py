"""Steps on made-up tokens: they compile every kernel before the first request and show the peak memory.

Called by ``rank`` only. The tokens are random, never zeros, and their k/v go into blocks that no request holds yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from outrider.kernels.compile_ahead import compiling
from outrider.kernels.gemm import MOST_FEW_ROWS
from outrider.kernels.sampling import SamplingRows, sample, top_logprobs
from outrider.kv_layout import KVLayout, plan_layout
from outrider.models.config import ModelConfig
from outrider.models.decoder import Decoder
from outrider.models.layers import HEAD_ROWS
from outrider.runner.batch import AttentionBatch, Batch
from outrider.runner.graphs import StepGraphs
from outrider.runner.kv_cache import KVCache
from outrider.runner.model_runner import ModelRunner
from outrider.runner.padding import PREFILL_TOKENS
from outrider.types import RowInit, SamplingParams, SeqSlice, StepPlan

if TYPE_CHECKING:
    from outrider.runner.resolve import Resolved


@torch.inference_mode()
def compile_kernels(model: Decoder, config: ModelConfig, resolved: Resolved) -> None:
    """Compile, on all cores at once, the kernels of the usual steps: prefill, graph shapes, head and sampling."""
    layout = plan_layout(
        config.rope_layers, config.attention_chunk_size, resolved.max_model_len, resolved.block_size
    )
    kv = _tiny_cache(model, config, resolved, layout)
    graphs = StepGraphs(
        model,
        kv,
        max_num_seqs=resolved.max_num_seqs,
        max_model_len=resolved.max_model_len,
        prefill_share=resolved.prefill_share_tokens,
        device=resolved.device,
    )
    with compiling(), model.shortened():
        num_tokens = resolved.max_num_batched_tokens
        hidden = _prefill(model, config, resolved, kv, num_tokens)
        while (num_tokens := num_tokens // 2) > PREFILL_TOKENS[-1]:  # tiles follow the number of rows
            _prefill(model, config, resolved, kv, num_tokens)
        if model.parallel.pp_size == 1:
            graphs.run_start_shapes()
        else:  # prompts of few tokens have tiles of their own
            _prefill(model, config, resolved, kv, min(PREFILL_TOKENS[0], num_tokens))
        if model.parallel.is_last_stage:
            for rows in (1, 32, 64):
                logits = model.logits(hidden[:rows])
                for all_greedy in (True, False):
                    sample(logits, _sampling_rows(len(logits), resolved.device), all_greedy)


@torch.inference_mode()
def measure_activations(model: Decoder, config: ModelConfig, resolved: Resolved) -> int:
    """Peak bytes of weights and activations in a full prefill step followed by a full sampling step."""
    layout = plan_layout(config.rope_layers, None, resolved.max_model_len, resolved.block_size)
    kv = _tiny_cache(model, config, resolved, layout)
    torch.cuda.reset_peak_memory_stats(resolved.device)
    hidden = _prefill(model, config, resolved, kv, resolved.max_num_batched_tokens)
    if model.parallel.is_last_stage:
        logits = model.logits(hidden[: resolved.max_num_seqs])
        edited = logits.float()  # what penalties, biases and grammars are applied to
        top_logprobs(logits, edited.argmax(-1), 20)
    torch.cuda.synchronize(resolved.device)
    return torch.cuda.max_memory_allocated(resolved.device)


def _tiny_cache(model: Decoder, config: ModelConfig, resolved: Resolved, layout: KVLayout) -> KVCache:
    return KVCache(layout, 2, model.kv_heads_per_rank, config.head_dim, resolved.kv_dtype, resolved.device)


def _prefill(
    model: Decoder, config: ModelConfig, resolved: Resolved, kv: KVCache, num_tokens: int
) -> torch.Tensor:
    """The hidden states of a prefill step of random tokens, whose k/v all go into one block."""
    device, num_groups = resolved.device, len(kv.layout.groups)
    length = min(num_tokens, resolved.max_model_len)
    num_seqs = -(-num_tokens // length)
    starts = torch.arange(num_seqs + 1, device=device).mul(length).clamp(max=num_tokens).int()
    width = -(-length // resolved.block_size)
    attention = AttentionBatch(
        query_start=starts,
        seq_lens=starts.diff().int(),
        block_tables=torch.ones((num_groups, num_seqs, width), dtype=torch.int32, device=device),
        slots=torch.zeros((num_groups, num_tokens), dtype=torch.int64, device=device),
        num_decodes=0,
        max_query_len=length,
        max_seq_len=length,
    )
    token_ids = torch.randint(config.vocab_size, (num_tokens,), device=device)
    positions = torch.arange(num_tokens, device=device) % length
    hidden = None
    if not model.parallel.is_first_stage:
        hidden = torch.randn((num_tokens, config.hidden_size), dtype=model.dtype, device=device)
    return model.forward(Batch(token_ids, positions, attention), kv, hidden)


def _sampling_rows(count: int, device: torch.device) -> SamplingRows:
    """Parameters that take every branch of the sampler."""
    filled = torch.full((count,), 0.5, device=device)
    return SamplingRows(
        filled, filled, torch.full((count,), 20, dtype=torch.int32, device=device), filled, filled
    )


def warm_up(runner: ModelRunner, max_num_batched_tokens: int) -> None:
    """Run one prefill, one mixed and one decode step with every kind of sampling, then forget them."""
    if runner.device.type == "cuda" and runner.model.parallel.is_last_stage:
        _load_head_kernels(runner)
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


def _load_head_kernels(runner: ModelRunner) -> None:
    """Run the head for every number of rows that it knows."""
    model, num_rows = runner.model, len(runner.table.params)
    hidden = torch.zeros((num_rows, model.config.hidden_size), dtype=model.dtype, device=runner.device)
    for count in range(MOST_FEW_ROWS, num_rows + HEAD_ROWS, HEAD_ROWS):
        model.logits(hidden[:count])


def _slice(start: int, ids: list[int]) -> SeqSlice:
    return SeqSlice(0, start, len(ids), ids, False, True, 0)
