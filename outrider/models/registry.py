"""From a config and a checkpoint to a model with weights. The runner's only door into ``models``; imports torch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from outrider.models.config import ModelConfig, QuantConfig
from outrider.models.decoder import Decoder
from outrider.models.dummy import DummySource, fill_random
from outrider.models.llama import Llama
from outrider.models.llama4 import Llama4
from outrider.models.loader import Progress, SafetensorsFile, WeightFile, fill_slots
from outrider.models.loader_gguf import GgufFile
from outrider.parallel import Parallel
from outrider.quant.base import Source, WeightBuilder
from outrider.quant.ignore_list import disagreements

logger = logging.getLogger("outrider.models")

ARCHITECTURES: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": Llama,
    "Llama4ForCausalLM": Llama4,
    "Llama4ForConditionalGeneration": Llama4,
}


def load_model(
    config: ModelConfig,
    path: str | Path,
    parallel: Parallel,
    *,
    load_format: str = "auto",
    dtype: torch.dtype,
    device: torch.device,
    kv_cache_dtype: torch.dtype,
    language_model_only: bool = False,
    progress: Progress | None = None,
) -> Decoder:
    """This rank's part of the model with its weights on ``device``; ``CheckpointError`` names what does not fit.

    ``path``: checkpoint folder or ``.gguf`` file, unread when ``load_format`` is ``dummy``. ``progress`` is
    called with bytes done and bytes in all. ``language_model_only`` leaves the vision tower out.
    """
    if language_model_only:
        config = replace(config, vision=None)
    file = None if load_format == "dummy" else open_weights(Path(path))
    source: Source = DummySource(config) if file is None else file
    if file is not None and config.quant is not None:
        _warn_of_disagreements(file, config.quant)
    model = build_model(
        config,
        parallel,
        source,
        dtype=dtype,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
    )
    if file is None:
        fill_random(model.builder, config, progress)
    else:
        fill_slots(model.builder, file, model.is_unused, progress)
    return model


def build_model(
    config: ModelConfig,
    parallel: Parallel,
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kv_cache_dtype: torch.dtype,
) -> Decoder:
    """The model with uninitialised weights, allocated in the formats that ``source`` holds."""
    builder = WeightBuilder(source=source, parallel=parallel, dtype=dtype, device=device)
    return ARCHITECTURES[config.architecture](config, builder, kv_cache_dtype)


def _warn_of_disagreements(file: WeightFile, quant: QuantConfig) -> None:
    """The tensors decide; a list that says otherwise deserves one line in the log."""
    stored = ((name, str(file.dtype_of(name))) for name in file.names())
    names = sorted(disagreements(stored, quant.ignore))
    if names:
        logger.warning(
            "%d tensors are stored otherwise than the checkpoint's quantization config says (first: %s); "
            "they are used as stored.",
            len(names),
            names[0],
        )


def open_weights(path: Path) -> WeightFile:
    """The weights of a ``.gguf`` file or of a folder of safetensors."""
    return GgufFile(path) if path.suffix == ".gguf" else SafetensorsFile(path)
