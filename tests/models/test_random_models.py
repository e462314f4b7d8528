"""Random tiny models of other shapes against transformers in float32: what the one fixture does not have."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from outrider.models.config_hf import load_model_config
from outrider.models.decoder import Decoder
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from tests.models.paged_driver import PagedDriver, relative_rms

F32, CPU = torch.float32, torch.device("cpu")

LLAMA4 = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "intermediate_size_mlp": 56,
    "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 24, "floor_scale": 8,
    "attn_scale": 0.3, "rms_norm_eps": 1e-5, "pad_token_id": 0, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maverick": {"interleave_moe_layer_step": 2, "num_local_experts": 8, "use_qk_norm": False},
    "top-2 of 3 experts": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "explicit no_rope_layers": {"no_rope_layers": [0, 1, 1, 0, 0, 1]},
    "explicit moe_layers": {"moe_layers": [0, 4]},
    "no temperature tuning": {"attn_temperature_tuning": False},
    "llama3 rope with a middle band": {"rope_parameters": LLAMA3_ROPE},
    "one kv head per query head": {"num_key_value_heads": 6},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
}
LLAMA = {
    "vocab_size": 89, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
DENSE_VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "attention bias": {"attention_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "wide heads": {"head_dim": 32},
}


def _randomize(model: torch.nn.Module) -> None:
    """Weights large enough that every part of the model shows in the logits."""
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.3)


def _save(model: Any, folder: Path) -> torch.Tensor:
    """Write the checkpoint in several shards; give the logits of a random 60-token prompt with the prompt."""
    _randomize(model)
    model.eval().save_pretrained(folder, max_shard_size="100KB")
    return torch.randint(1, model.config.vocab_size, (1, 60))


def _load(folder: Path, parallel: Parallel | None = None) -> Decoder:
    return load_model(
        load_model_config(folder), folder, parallel or Parallel(), dtype=F32, device=CPU, kv_cache_dtype=F32
    )


def _check(reference: Any, folder: Path) -> None:
    ids = _save(reference, folder)
    with torch.inference_mode():
        wanted = reference(ids).logits[0]
    driver = PagedDriver(_load(folder))
    prompt: list[int] = ids[0].tolist()
    assert relative_rms(driver.prefill(prompt[:41], 11), wanted[40]) < 1e-4
    for i in range(41, 60):
        logits = driver.step([(0, [prompt[i]])])[0]
    assert relative_rms(logits, wanted[59]) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama4(variant: str, tmp_path: Path) -> None:
    """Guards what the config decides: layers, experts, heads, norms, biases."""
    _check(Llama4ForCausalLM(Llama4TextConfig(**LLAMA4 | VARIANTS[variant])), tmp_path)


@pytest.mark.parametrize("variant", DENSE_VARIANTS)
def test_dense_llama(variant: str, tmp_path: Path) -> None:
    """Guards the plain decoder: half-split rope, tied and untied head, biases."""
    _check(LlamaForCausalLM(LlamaConfig(**LLAMA | DENSE_VARIANTS[variant])), tmp_path)


class Meeting:
    """Where threads that play ranks exchange tensors: everybody brings one and takes all."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.table: list[torch.Tensor | None] = [None] * size

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in the order of ranks."""
        self.table[rank] = x.clone()
        self.barrier.wait()
        gathered = [t for t in self.table if t is not None]
        self.barrier.wait()
        return gathered


@dataclass(frozen=True)
class ThreadParallel(Parallel):
    """A tensor rank that is a thread, so that no process group is needed."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the threads, in place."""
        return x.copy_(torch.stack(self.meeting.exchange(self.tp_rank, x)).sum(0))

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """The threads' tensors side by side."""
        return torch.cat(self.meeting.exchange(self.tp_rank, x), dim=-1)


def _run_ranks(folder: Path, size: int, prompt: list[int], expert_parallel: bool) -> list[torch.Tensor]:
    meeting = Meeting(size)
    results: list[torch.Tensor | None] = [None] * size
    models = [
        _load(
            folder, ThreadParallel(tp_rank=r, tp_size=size, expert_parallel=expert_parallel, meeting=meeting)
        )
        for r in range(size)
    ]

    def run(rank: int) -> None:
        driver = PagedDriver(models[rank])
        driver.prefill(prompt[:-1], 17)
        results[rank] = driver.step([(0, prompt[-1:])])[0]

    threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return [r for r in results if r is not None]


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["columns", "experts"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_tensor_parallel(tmp_path: Path, size: int, expert_parallel: bool, bias: bool) -> None:
    """Guards each shard: 2 ranks split the kv heads, 4 ranks share them; a row-split bias is added once."""
    shape = {
        "num_attention_heads": 8,
        "vocab_size": 96,
        "interleave_moe_layer_step": 2,
        "attention_bias": bias,
    }
    reference = Llama4ForCausalLM(Llama4TextConfig(**LLAMA4 | shape))
    ids = _save(reference, tmp_path)
    with torch.inference_mode():
        wanted = reference(ids).logits[0, -1]
    results = _run_ranks(tmp_path, size, ids[0].tolist(), expert_parallel)
    assert len(results) == size
    for logits in results:
        assert relative_rms(logits, wanted) < 1e-4


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_pipeline_parallel(tmp_path: Path, tied: bool) -> None:
    """Guards the cut between stages: 6 layers over 4 stages, embedding first, head last."""
    reference = Llama4ForCausalLM(Llama4TextConfig(**LLAMA4 | {"tie_word_embeddings": tied}))
    ids = _save(reference, tmp_path)
    with torch.inference_mode():
        wanted = reference(ids).logits[0, -1]
    hidden = None
    for rank in range(4):
        model = _load(tmp_path, Parallel(pp_rank=rank, pp_size=4))
        driver = PagedDriver(model)
        hidden = model.forward(driver.batch([(0, ids[0].tolist())]), driver.kv, hidden)
    assert hidden is not None
    assert relative_rms(model.logits(hidden[-1:])[0], wanted) < 1e-4
