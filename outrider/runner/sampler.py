"""From logits to token ids on the device: edits per row, then the sampling kernel, then log-probabilities.

Called by ``model_runner`` once a step. Rows that ask for nothing special cost nothing here: edits touch only
the rows that need them. No host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outrider.kernels.sampling import SamplingRows, sample, top_logprobs
from outrider.runner.rows import IntArray, RowTable
from outrider.types import RowInit, SamplingParams


@dataclass(frozen=True, slots=True)
class Sampled:
    """Device tensors of one step: ``ids`` int64 ``[N]`` (-1: not finite), and log-probabilities if wanted."""

    ids: torch.Tensor
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None


class Sampler:
    """Holds what sampling remembers per row: token counts for penalties, on the device, made on first use."""

    def __init__(self, table: RowTable, vocab_size: int, device: torch.device) -> None:
        self._table = table
        self._vocab_size = vocab_size
        self._device = device
        self._bit_places = torch.arange(8, dtype=torch.uint8, device=device)
        self._counts: torch.Tensor | None = None  # [R, V] int32, generated tokens
        self._seen: torch.Tensor | None = None  # [R, V] bool, prompt tokens

    def start_row(self, init: RowInit) -> None:
        """Count the known tokens of a row whose parameters look back at them."""
        if not init.sampling.uses_history:
            return
        if self._counts is None or self._seen is None:
            shape = (len(self._table.params), self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        prompt = torch.tensor(init.token_ids[: init.prompt_len], device=self._device)
        output = torch.tensor(init.token_ids[init.prompt_len :], dtype=torch.int64, device=self._device)
        self._seen[init.row] = False
        self._seen[init.row, prompt] = True
        self._counts[init.row] = torch.bincount(output, minlength=self._vocab_size).int()

    def sample(
        self,
        logits: torch.Tensor,
        rows: IntArray,
        device_rows: SamplingRows,
        output_index: IntArray,
        masks: dict[int, bytes],
    ) -> Sampled:
        """One id per row of ``logits`` ``[N, V]``; ``device_rows`` are the rows' parameters on the device."""
        params = [self._params(row) for row in rows.tolist()]
        raw = logits
        logits = self._edit(logits, params, rows, output_index, masks)
        all_greedy = all(p.temperature == 0.0 for p in params)
        ids = sample(logits, device_rows, all_greedy)
        self._count(ids, params, rows)
        top = max((p.logprobs for p in params if p.logprobs is not None), default=None)
        if top is None:
            return Sampled(ids, None)
        return Sampled(ids, top_logprobs(raw, ids.clamp(min=0), top))

    def _params(self, row: int) -> SamplingParams:
        params = self._table.params[row]
        assert params is not None, "a slice names a row that was never started"
        return params

    def _edit(
        self,
        logits: torch.Tensor,
        params: list[SamplingParams],
        rows: IntArray,
        output_index: IntArray,
        masks: dict[int, bytes],
    ) -> torch.Tensor:
        """Logits with penalties, biases, bans and grammar masks applied; the input is not changed."""
        edited: torch.Tensor | None = None
        for i, (p, row) in enumerate(zip(params, rows.tolist(), strict=True)):
            banned = p.end_token_ids if output_index[i] < p.min_tokens else frozenset()
            if not (p.uses_history or p.logit_bias or p.allowed_token_ids or banned or row in masks):
                continue
            if edited is None:
                edited = logits.float() if logits.dtype != torch.float32 else logits.clone()
            line = edited[i]
            if p.uses_history:
                self._penalise(line, p, row)
            if p.logit_bias:
                line[self._ids(p.logit_bias)] += torch.tensor(
                    list(p.logit_bias.values()), dtype=torch.float32, device=self._device
                )
            if p.allowed_token_ids:
                keep = torch.zeros_like(line, dtype=torch.bool)
                keep[self._ids(p.allowed_token_ids)] = True
                line.masked_fill_(~keep, float("-inf"))
            if banned:
                line[self._ids(banned)] = float("-inf")
            if row in masks:
                line.masked_fill_(~self._unpack(masks[row]), float("-inf"))
        return logits if edited is None else edited

    def _ids(self, ids: dict[int, float] | tuple[int, ...] | frozenset[int]) -> torch.Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self._device)

    def _penalise(self, line: torch.Tensor, p: SamplingParams, row: int) -> None:
        """Repetition (CTRL, Keskar 2019) over prompt and output; presence and frequency over the output (OpenAI)."""
        assert self._counts is not None and self._seen is not None
        counts = self._counts[row]
        if p.repetition_penalty != 1.0:
            seen = self._seen[row] | (counts > 0)
            scaled = torch.where(line > 0, line / p.repetition_penalty, line * p.repetition_penalty)
            line.copy_(torch.where(seen, scaled, line))
        line -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)

    def _unpack(self, mask: bytes) -> torch.Tensor:
        """``[V]`` bool from packed bits; they travel packed and are taken apart on the device."""
        packed = torch.frombuffer(bytearray(mask), dtype=torch.uint8).to(self._device, non_blocking=True)
        bits = packed[:, None].bitwise_right_shift(self._bit_places).bitwise_and_(1).flatten()
        return torch.nn.functional.pad(
            bits[: self._vocab_size].bool(), (0, max(0, self._vocab_size - len(bits)))
        )

    def _count(self, ids: torch.Tensor, params: list[SamplingParams], rows: IntArray) -> None:
        tracked = [i for i, p in enumerate(params) if p.uses_history]
        if tracked and self._counts is not None:
            index = torch.tensor(tracked, device=self._device)
            row_ids = torch.from_numpy(rows).to(self._device)[index]
            ones = torch.ones(len(tracked), dtype=torch.int32, device=self._device)
            self._counts.index_put_((row_ids, ids[index].clamp(min=0)), ones, accumulate=True)
