"""One rank: a plan in, a launched step out. Called by the executors; knows no requests and no queue.

    apply plan to rows -> index arrays -> Batch -> model -> logits of the last tokens -> sampler -> ids

Ids stay on the device (``_last_ids``) for the next step and are copied to the host in the background.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outrider.kernels.sampling import SamplingRows, top_logprobs
from outrider.models.decoder import Decoder
from outrider.parallel import Parallel
from outrider.runner.batch import AttentionBatch, Batch
from outrider.runner.graphs import StepGraphs
from outrider.runner.images import ImageStore
from outrider.runner.kv_cache import KVCache
from outrider.runner.padding import StepShape
from outrider.runner.rows import RowTable, StepArrays
from outrider.runner.sampler import Sampled, Sampler
from outrider.runner.staging import Staging
from outrider.types import SeqSlice, StepPlan, StepResult, TokenLogprobs

PROMPT_LOGPROB_ROWS = 128
"""Prompt positions whose full logits exist at once (128 x 202,048 x 4 B = 99 MiB)."""

DeviceLogprobs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class LaunchedStep:
    """A step on the device: host copies under way, and the event that says when they are whole."""

    step_id: int
    ids: torch.Tensor | None
    wanted: list[int | None]
    logprobs: list[torch.Tensor] | None
    prompt_logprobs: dict[int, tuple[list[int], int, list[torch.Tensor]]]
    event: torch.cuda.Event | None

    def wait(self) -> StepResult:
        """Block until the copies are whole and read them."""
        if self.event is not None:
            self.event.synchronize()
        ids: list[int] = [] if self.ids is None else self.ids.tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(ids)
        if self.logprobs is not None:
            entries = _entries(ids, self.logprobs, self.wanted)
            logprobs = [e if w is not None else None for e, w in zip(entries, self.wanted, strict=True)]
        prompt = {
            index: list(_entries(targets, tensors, [top] * len(targets)))
            for index, (targets, top, tensors) in self.prompt_logprobs.items()
        }
        return StepResult(self.step_id, ids, logprobs, prompt)


def _entries(ids: list[int], tensors: list[torch.Tensor], wanted: list[int | None]) -> list[TokenLogprobs]:
    values, ranks, top_ids, top_values = (t.tolist() for t in tensors)
    return [
        TokenLogprobs(ids[i], values[i], ranks[i], top_ids[i][: k or 0], top_values[i][: k or 0])
        for i, k in enumerate(wanted)
    ]


class ModelRunner:
    """Owns a rank's model, KV cache, rows and sampler."""

    def __init__(
        self,
        model: Decoder,
        kv: KVCache,
        *,
        num_rows: int,
        max_model_len: int,
        vocab_size: int,
        device: torch.device,
        parallel: Parallel,
        graphs: StepGraphs | None = None,
        images: ImageStore | None = None,
    ) -> None:
        self.model = model
        self.kv = kv
        self.device = device
        self.vocab_size = vocab_size
        self.table = RowTable(kv.layout, num_rows, max_model_len)
        self.sampler = Sampler(self.table, vocab_size, device)
        self._last_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._parallel = parallel
        self._staging = Staging(device)
        self._graphs = graphs
        self._images = images

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue the step on the device; on an inner pipeline stage the result is empty."""
        self.table.apply(plan)
        for init in plan.new_rows:
            self.sampler.start_row(init)
            if self._images is not None:
                self._images.start_row(init)
        arrays = self.table.arrays(plan.slices)
        shape = self._shape_of(plan, arrays)
        if shape is not None:
            assert self._graphs is not None
            arrays = self._graphs.pad(arrays, shape)
        states = self._forward(plan, arrays, shape)
        if not self._parallel.is_last_stage:
            self._parallel.send_next(states)
            return LaunchedStep(plan.step_id, None, [], None, {}, None)
        prompt_logprobs = self._prompt_logprobs(plan.slices, arrays, states)
        if not len(arrays.sample_rows):
            return self._launched(plan, arrays, None, prompt_logprobs)
        return self._launched(plan, arrays, self._sample(plan, arrays, states), prompt_logprobs)

    def _shape_of(self, plan: StepPlan, arrays: StepArrays) -> StepShape | None:
        """The graph shape of the step; None where a step needs more than a graph holds."""
        if self._graphs is None or (self._images is not None and self._images.touches(plan.slices)):
            return None
        return None if self._scores_prompts(arrays) else self._graphs.shape_of(arrays)

    def _scores_prompts(self, arrays: StepArrays) -> bool:
        """Whether log-probabilities of prompt tokens are wanted, for which every hidden state is."""
        inits = (self.table.inits[row] for row in arrays.rows[arrays.num_decodes :].tolist())
        return any(init is not None and init.sampling.prompt_logprobs is not None for init in inits)

    def _forward(self, plan: StepPlan, arrays: StepArrays, shape: StepShape | None) -> torch.Tensor:
        if shape is not None and self._graphs is not None:
            batch = self._graphs.load(arrays, shape)
            self._fill_ids(batch.token_ids, arrays)
            return self._graphs.replay(shape)
        batch = self._batch(plan, arrays)
        if self._parallel.is_first_stage:
            return self.model.forward(batch, self.kv)
        hidden = torch.empty(
            (len(batch.token_ids), self.model.config.hidden_size), dtype=self.model.dtype, device=self.device
        )
        return self.model.forward(batch, self.kv, self._parallel.receive_previous(hidden))

    def _batch(self, plan: StepPlan, arrays: StepArrays) -> Batch:
        token_ids, positions, slots, query_start, seq_lens, tables, last_tokens = self._staging.upload(
            arrays.model_inputs()
        )
        self._fill_ids(token_ids, arrays)
        attention = AttentionBatch(
            query_start=query_start,
            seq_lens=seq_lens,
            block_tables=tables,
            slots=slots,
            num_decodes=arrays.num_decodes,
            max_query_len=arrays.max_query_len,
            max_seq_len=arrays.max_seq_len,
        )
        images = self._images.batch(plan.slices, arrays) if self._images is not None else None
        wants_all = len(token_ids) == len(seq_lens) or self._scores_prompts(arrays)
        return Batch(token_ids, positions, attention, images, None if wants_all else last_tokens)

    def _fill_ids(self, token_ids: torch.Tensor, arrays: StepArrays) -> None:
        """Ids that only the device knows: what the last steps sampled."""
        if len(arrays.device_rows):
            tokens, rows = self._staging.upload([arrays.device_tokens, arrays.device_rows])
            token_ids[tokens] = self._last_ids[rows]

    def _sample(self, plan: StepPlan, arrays: StepArrays, states: torch.Tensor) -> Sampled:
        """Ids of the sampling rows, also kept on the device for the next step.

        ``states``: the hidden states of the sequences' last tokens, or of all tokens.
        """
        rows, wanted = arrays.sample_rows, arrays.sample_seqs
        if len(states) != len(arrays.seq_lens):
            wanted = arrays.last_tokens[wanted]
        states_wanted, row_ids, *params = self._staging.upload(
            [wanted, rows, *self.table.sampling_arrays(rows, arrays.output_index)]
        )
        logits = self.model.logits(states[states_wanted])
        sampled = self.sampler.sample(logits, rows, SamplingRows(*params), arrays.output_index, plan.masks)
        self._last_ids[row_ids] = sampled.ids.clamp(min=0)
        return sampled

    def _prompt_logprobs(
        self, slices: list[SeqSlice], arrays: StepArrays, states: torch.Tensor
    ) -> dict[int, tuple[list[int], int, list[torch.Tensor]]]:
        """Per slice index: the target ids, how many alternatives, and their log-probabilities on the device."""
        found: dict[int, tuple[list[int], int, list[torch.Tensor]]] = {}
        for index, piece in enumerate(slices):
            init = self.table.inits[piece.row]
            top = init.sampling.prompt_logprobs if init is not None else None
            if init is None or top is None or piece.start >= init.prompt_len - 1:
                continue
            # Logits at position p are about token p + 1.
            targets = init.token_ids[
                piece.start + 1 : min(piece.start + piece.num_tokens + 1, init.prompt_len)
            ]
            # Without a longer piece among them, states may be those of the last tokens: these are the same rows.
            first = int(arrays.query_start[index])
            parts = [
                self._target_logprobs(states[first + i : first + len(targets)], targets[i:], top)
                for i in range(0, len(targets), PROMPT_LOGPROB_ROWS)
            ]
            found[index] = (targets, top, [torch.cat(tensors) for tensors in zip(*parts, strict=True)])
        return found

    def _target_logprobs(self, states: torch.Tensor, targets: list[int], top: int) -> DeviceLogprobs:
        states, targets = states[:PROMPT_LOGPROB_ROWS], targets[:PROMPT_LOGPROB_ROWS]
        ids = torch.tensor(targets, dtype=torch.int64, device=self.device)
        return top_logprobs(self.model.logits(states), ids, top)

    def _launched(
        self,
        plan: StepPlan,
        arrays: StepArrays,
        sampled: Sampled | None,
        prompt_logprobs: dict[int, tuple[list[int], int, list[torch.Tensor]]],
    ) -> LaunchedStep:
        wanted: list[int | None] = []
        for row in arrays.sample_rows.tolist():
            params = self.table.params[row]
            wanted.append(None if params is None else params.logprobs)
        tensors = sampled.logprobs if sampled is not None else None
        step = LaunchedStep(
            plan.step_id,
            None if sampled is None else self._to_host(sampled.ids),
            wanted,
            None if tensors is None else [self._to_host(t) for t in tensors],
            {i: (ids, k, [self._to_host(t) for t in ts]) for i, (ids, k, ts) in prompt_logprobs.items()},
            None,
        )
        if self.device.type == "cuda":
            step.event = torch.cuda.Event()
            step.event.record()
        return step

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return host
