"""Access to ``fixtures/llama4-tiny-a``: checkpoints by modelopt's exporter, results by transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from outrider.models.config import ModelConfig
from outrider.models.config_hf import load_model_config
from outrider.models.decoder import Decoder
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from tests.models.paged_driver import PagedDriver, relative_rms

PREFILL_CHUNK = 13  # no divisor of the attention chunk (32) or of the block size
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mode:
    """One row of the fixture README's table of modes: which checkpoint, which arithmetic, which tolerance."""

    name: str
    folder: str
    dtype: torch.dtype
    kv_dtype: torch.dtype
    tolerance: float
    hidden_tolerance: float


class References:
    """Prompts and, per mode, what transformers computed for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = json.loads((folder / "refs.json").read_text())
        self.tensors = safe_open(folder / "refs.safetensors", framework="pt")
        self.prompts: list[list[int]] = self.values["prompts"]

    def tensor(self, name: str) -> torch.Tensor:
        """A reference tensor by its full name."""
        return self.tensors.get_tensor(name)

    def config(self, folder: str) -> ModelConfig:
        """The config of one of the checkpoints ``bf16``, ``fp8``, ``nvfp4``."""
        return load_model_config(self.folder / folder)

    def model(
        self,
        folder: str,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        config: ModelConfig | None = None,
        **options: Any,
    ) -> Decoder:
        """One of the checkpoints, loaded; ``config`` replaces its own."""
        return load_model(
            config or self.config(folder),
            self.folder / folder,
            options.pop("parallel", Parallel()),
            dtype=dtype,
            device=CPU,
            kv_cache_dtype=kv_dtype or dtype,
            **options,
        )

    def worst_error(self, model: Decoder, mode: str, kv_dtype: torch.dtype, prompts: list[int]) -> float:
        """The largest relative RMS of the last logits over ``prompts``, prefilled in chunks."""
        errors = []
        for index in prompts:
            logits = PagedDriver(model, kv_dtype=kv_dtype).prefill(self.prompts[index], PREFILL_CHUNK)
            errors.append(relative_rms(logits, self.tensor(f"{mode}/p{index}/last_logits")))
        return max(errors)
