"""From a config to a running engine: load the rank(s), plan the KV cache, put a scheduler in front.

Called once by the engine process. Every choice made on the way is in the ``EngineInfo`` that comes back:
nothing falls back in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from outrider.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.engine.executor import Executor
from outrider.engine.guidance import build_compiler
from outrider.engine.kv_manager import KVManager
from outrider.engine.scheduler import Limits, Scheduler
from outrider.errors import ConfigError
from outrider.kernels import op_table
from outrider.kv_layout import KVLayout, plan_layout
from outrider.models.config import ModelConfig
from outrider.models.config_hf import load_model_config
from outrider.models.memory import weight_bytes
from outrider.parallel import Parallel
from outrider.runner.executor import InlineExecutor
from outrider.runner.ledger import Ledger
from outrider.runner.rank import GIB, load_rank, start_rank
from outrider.runner.resolve import Resolved, resolve
from outrider.runner.workers import Workers
from outrider.types import EngineInfo

logger = logging.getLogger("outrider.engine")

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the engine knows of the loaded model. ``layer_block_bytes``: one block of one layer on one rank."""

    config: EngineConfig
    model_config: ModelConfig
    resolved: Resolved
    layer_block_bytes: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class KVPlan:
    """The cache that every rank allocates, and the context length it was made for."""

    layout: KVLayout
    num_blocks: int
    max_model_len: int


def build_engine(config: EngineConfig, on_progress: ProgressCallback) -> tuple[Engine, EngineInfo]:
    """Load the model and put an engine around it; ``ConfigError`` if it cannot run here."""
    clock = Ledger()

    def weights(done: int, total: int) -> None:
        on_progress("weights", done, total)

    if config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        return _build_parallel(config, weights, clock)
    rank = load_rank(config, Parallel(), weights, clock)
    model = Facts(
        config,
        rank.model_config,
        rank.resolved,
        rank.block_bytes(_one_layer(rank.resolved)),
        rank.model.weight_bytes(),
    )
    plan = plan_kv(model, rank.kv_budget)
    runner = start_rank(rank, plan.layout, plan.num_blocks, plan.max_model_len, clock)
    engine = _make_engine(model, plan, InlineExecutor(runner))
    return engine, _info(model, plan, engine, clock.stages)


def _build_parallel(
    config: EngineConfig, on_progress: Callable[[int, int], None], clock: Ledger
) -> tuple[Engine, EngineInfo]:
    """The same with a process per rank; the smallest rank's memory decides."""
    model_config = load_model_config(config.model)
    resolved = resolve(config, model_config)
    split = Parallel(
        tp_size=config.tensor_parallel_size,
        pp_size=config.pipeline_parallel_size,
        expert_parallel=config.enable_expert_parallel,
    )
    weight_bytes(
        model_config, split, resolved.dtype
    )  # a split that does not divide ends here, before any rank
    workers = Workers(config, on_progress)
    clock.mark("load")
    loaded = workers.loaded
    # The rank with the most bytes per block in proportion to its budget is the tightest.
    tightest = min(loaded, key=lambda rank: rank.kv_budget / rank.block_bytes_per_layer)
    total_bytes = sum(rank.weight_bytes for rank in loaded)
    model = Facts(config, model_config, resolved, tightest.block_bytes_per_layer, total_bytes)
    plan = plan_kv(model, tightest.kv_budget)
    workers.start(plan.layout, plan.num_blocks, plan.max_model_len)
    clock.mark("warm-up")
    engine = _make_engine(model, plan, workers)
    return engine, _info(model, plan, engine, clock.stages)


def _one_layer(resolved: Resolved) -> KVLayout:
    return KVLayout(((0,),), (False,), None, resolved.block_size)


def _make_engine(model: Facts, plan: KVPlan, executor: Executor) -> Engine:
    """A scheduler of this machine's limits in front of ``executor``."""
    config, resolved = model.config, model.resolved
    limits = Limits(
        resolved.max_num_seqs,
        resolved.max_num_batched_tokens,
        resolved.prefill_share_tokens,
        priority=config.scheduling_policy == "priority",
        one_plan_per_sequence=config.pipeline_parallel_size > 1,
    )
    kv = KVManager(plan.layout, plan.num_blocks, config.enable_prefix_caching)
    depth = 1 + config.pipeline_parallel_size if config.async_scheduling else 1
    facts = model.model_config
    compiler = build_compiler(config.model, config.tokenizer, facts.vocab_size, facts.eos_token_ids)
    return Engine(Scheduler(kv, limits), executor, compiler, depth)


def plan_kv(model: Facts, budget: int) -> KVPlan:
    """Layout and number of blocks; a default context length shrinks to what fits, an explicit one is refused."""
    config, resolved = model.config, model.resolved
    max_model_len = resolved.max_model_len
    while True:
        layout = plan_layout(
            model.model_config.rope_layers,
            model.model_config.attention_chunk_size,
            max_model_len,
            resolved.block_size,
        )
        block_bytes = model.layer_block_bytes * layout.layers_per_block
        num_blocks = config.num_gpu_blocks_override or max(2, int(budget // block_bytes))
        needed = KVManager(layout, 2, False).num_blocks_for(max_model_len) + 1
        if num_blocks >= needed:
            return KVPlan(layout, num_blocks, max_model_len)
        fitting = int(max_model_len * (num_blocks - 1) / needed) // resolved.block_size * resolved.block_size
        if config.max_model_len is not None or fitting < 1:
            choices = [f"--max-model-len {fitting}"] if fitting else []
            choices += ["--kv-cache-dtype fp8"] if resolved.kv_dtype.itemsize > 1 else []
            raise ConfigError(
                f"One request of --max-model-len {max_model_len} needs {needed * block_bytes / GIB:.3g} GiB of KV "
                f"cache and {num_blocks * block_bytes / GIB:.3g} GiB fit; use "
                f"{' or '.join([*choices, 'more memory'])}."
            )
        logger.info("The KV cache does not hold %d tokens; --max-model-len is %d.", max_model_len, fitting)
        max_model_len = fitting


def _info(model: Facts, plan: KVPlan, engine: Engine, stages: dict[str, float]) -> EngineInfo:
    resolved, quant = model.resolved, model.model_config.quant
    kv = engine.scheduler.kv
    concurrency = kv.pool.capacity / kv.num_blocks_for(plan.max_model_len)
    on_gpu = resolved.device.type == "cuda"
    return EngineInfo(
        model=model.config.model,
        architecture=model.model_config.architecture,
        device=torch.cuda.get_device_name() if on_gpu else f"cpu ({torch.get_num_threads()} threads)",
        dtype=str(resolved.dtype).removeprefix("torch."),
        quantization="none" if quant is None else quant.algo,
        kv_cache_dtype=str(resolved.kv_dtype).removeprefix("torch."),
        kernels=op_table(resolved.device),
        max_model_len=plan.max_model_len,
        block_size=resolved.block_size,
        num_blocks=plan.num_blocks,
        kv_capacity_tokens=int(concurrency * plan.max_model_len),
        max_concurrency=round(concurrency, 2),
        startup_s=stages,
        weights_gb=round(model.weight_bytes / 1e9, 3),
        max_num_seqs=resolved.max_num_seqs,
    )
