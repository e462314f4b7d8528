"""Padded steps: what a CUDA graph computes for the real rows must be what the exact step computes."""

from __future__ import annotations

import os
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch

from outrider.engine.starts import LAST_WAVE_TOKENS
from outrider.kv_layout import plan_layout
from outrider.models.config_hf import load_model_config
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from outrider.runner.batch import AttentionBatch, Batch
from outrider.runner.kv_cache import KVCache
from outrider.runner.padding import ShapeTable, StepShape, pad
from outrider.runner.rows import RowTable, StepArrays
from outrider.runner.staging import Staging
from outrider.types import SeqSlice, StepPlan

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[2].parent / "shared"))
FIXTURE = SHARED / "fixtures/llama4-tiny-a/bf16"


def batch_of(arrays: StepArrays, only_last: bool = False) -> Batch:
    ids, positions, slots, query_start, seq_lens, tables, last_tokens = (
        torch.from_numpy(np.ascontiguousarray(a)) for a in arrays.model_inputs()
    )
    attention = AttentionBatch(
        query_start,
        seq_lens,
        tables,
        slots,
        arrays.num_decodes,
        arrays.max_query_len,
        arrays.max_seq_len,
    )
    return Batch(ids, positions, attention, output_rows=last_tokens if only_last else None)


def random_plan(rng: np.random.Generator, table: RowTable, num_decodes: int, prompts: list[int]) -> StepPlan:
    """Decodes in the middle of their contexts, prompts from their beginnings, every block distinct."""
    slices, updates, next_block = [], [], 1
    starts = [int(rng.integers(1, 90)) for _ in range(num_decodes)] + [0] * len(prompts)
    for row, (start, count) in enumerate(zip(starts, [1] * num_decodes + prompts, strict=True)):
        ids = rng.integers(0, 900, count).tolist()
        slices.append(SeqSlice(row, start, count, ids, False, True, 0))
        for group in range(len(table.layout.groups)):
            for index in range(-(-(start + count) // table.layout.block_size)):
                updates.append((group, row, index, next_block))
                next_block += 1
    return StepPlan(0, slices, [], updates)


@pytest.mark.skipif(not FIXTURE.exists(), reason="needs the shared fixtures")
@pytest.mark.parametrize(
    ("num_decodes", "prompts", "shape"),
    [
        (3, [], StepShape(5, 0, 0)),
        (0, [7, 33], StepShape(0, 64, 4)),
        (2, [40, 1, 5], StepShape(8, 64, 16)),
    ],
)
def test_padding_changes_no_real_row(num_decodes: int, prompts: list[int], shape: StepShape) -> None:
    """A wrong query start, slot or table in the padded layout shows in the hidden states or the cache.

    The padded step's last layer goes on with the sequences' last tokens alone, as in a graph.
    """
    rng = np.random.default_rng(num_decodes)
    config = load_model_config(FIXTURE)
    model = load_model(
        config,
        FIXTURE,
        Parallel(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        kv_cache_dtype=torch.float32,
    )
    layout = plan_layout(config.rope_layers, config.attention_chunk_size, 128, 16)
    table = RowTable(layout, 8, 128)
    plan = random_plan(rng, table, num_decodes, prompts)
    table.apply(plan)
    arrays = table.arrays(plan.slices)
    padded = pad(arrays, shape, table.max_blocks, 128)
    assert len(padded.token_ids) == shape.num_tokens and len(padded.seq_lens) == shape.num_seqs
    kv = [
        KVCache(layout, 200, config.num_kv_heads, config.head_dim, torch.float32, torch.device("cpu"))
        for _ in range(2)
    ]
    noise = torch.randn(kv[0].data.shape)
    for cache in kv:
        cache.data.copy_(noise)
    exact = model.forward(batch_of(arrays), kv[0])[arrays.last_tokens[arrays.sample_seqs]]
    states = model.forward(batch_of(padded, only_last=True), kv[1])
    assert len(states) == shape.num_seqs
    poured = states[padded.sample_seqs]
    torch.testing.assert_close(poured, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kv[1].data[:, 1:], kv[0].data[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_num_seqs", [1, 7, 64, 100, 512])
def test_every_step_finds_a_shape_that_holds_it(max_num_seqs: int) -> None:
    """A shape smaller than its step would cut sequences off."""
    table = ShapeTable(max_num_seqs, 512)
    layout = plan_layout((False,), None, 4096, 16)
    rows = RowTable(layout, max_num_seqs, 4096)
    rng = np.random.default_rng(max_num_seqs)
    for _ in range(40):
        num_decodes = int(rng.integers(0, max_num_seqs + 1))
        num_prefills = min(max_num_seqs - num_decodes, int(rng.integers(0, 4)))
        prompts = rng.integers(2, 340, num_prefills).tolist()
        if num_decodes + num_prefills == 0:
            continue
        arrays = rows.arrays(random_plan(rng, rows, num_decodes, prompts).slices)
        shape = table.shape_of(arrays)
        assert shape is not None
        assert shape.decodes >= num_decodes and shape.prefill_tokens >= sum(prompts)
        assert shape.prefill_seqs >= len(prompts)
    for shape in table.start_shapes():
        assert all(a <= b for a, b in zip(astuple(shape), astuple(table.largest), strict=True))


def test_shapes_share_one_buffer() -> None:
    """What the largest shape takes must hold every other; a smaller one's arrays begin where its own begin."""
    table = ShapeTable(64, 512)
    layout = plan_layout((True, True, True, False), 64, 256, 16)
    rows = RowTable(layout, 64, 256)
    staging = Staging(torch.device("cpu"))
    rng = np.random.default_rng(2)

    def inputs(shape: StepShape) -> list[np.ndarray]:
        num_decodes = min(shape.decodes, 3)
        plan = random_plan(rng, rows, num_decodes, [9] if shape.prefill_tokens else [])
        return pad(rows.arrays(plan.slices), shape, rows.max_blocks, 256).model_inputs()

    whole, _ = staging.allocate(inputs(table.largest))
    for shape in table.start_shapes():
        arrays = inputs(shape)
        buffer, tensors = staging.allocate(arrays, within=whole)
        assert buffer.data_ptr() == whole.data_ptr() and len(buffer) <= len(whole)
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        assert all(np.array_equal(t.numpy(), a) for t, a in zip(tensors, arrays, strict=True))


def test_the_usual_steps_have_their_graphs_from_the_start() -> None:
    """A graph captured when its step is met delays every stream in it."""
    table = ShapeTable(512, 512)
    shapes = table.start_shapes()
    assert len(shapes) == len(set(shapes)) < 100
    rows = RowTable(plan_layout((False,), None, 4096, 16), 512, 4096)
    rng = np.random.default_rng(1)
    for num_decodes in (1, 17, 200, 500):
        rest = LAST_WAVE_TOKENS - num_decodes - 1000
        for prompts in ([1], [64], [512], [511, 1], [300, 212], [512, 1], [1000, rest], [200, 800, rest - 1]):
            arrays = rows.arrays(random_plan(rng, rows, num_decodes, prompts).slices)
            assert table.shape_of(arrays) in shapes, f"{num_decodes} decodes and {prompts}"
