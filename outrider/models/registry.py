"""From a config and a checkpoint to a model with weights. The runner's only door into ``models``; imports torch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from outrider.errors import CheckpointError
from outrider.models.config import ModelConfig, QuantConfig
from outrider.models.decoder import Decoder
from outrider.models.dummy import DummySource, fill_random
from outrider.models.llama import Llama
from outrider.models.llama4 import Llama4
from outrider.models.loader import Progress, SafetensorsFile, WeightFile, fill_slots
from outrider.models.loader_gguf import GgufFile
from outrider.parallel import Parallel
from outrider.quant.base import FORMAT_OF_DTYPE, Format, Source, WeightBuilder
from outrider.quant.ignore_list import disagreements, is_projection

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
    if file is not None:
        check_formats(file, config.quant)
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


def check_formats(file: WeightFile, quant: QuantConfig | None) -> None:
    """``CheckpointError`` where the weights hold another quantization than the checkpoint's metadata says.

    Which matrices are quantized the tensors decide; a list that says otherwise deserves one line in the log.
    """
    stored = {name: str(file.dtype_of(name)) for name in file.names() if is_projection(name)}
    formats = {name: FORMAT_OF_DTYPE[dtype] for name, dtype in stored.items() if dtype in FORMAT_OF_DTYPE}
    announced = Format(quant.algo.lower()) if quant else Format.PLAIN
    for name, fmt in formats.items():
        if fmt not in (Format.PLAIN, announced):
            raise CheckpointError(
                f"Tensor {file.full_name(name)} is {fmt.upper()} ({stored[name]}), but config.json and "
                f"hf_quant_config.json announce {announced.upper() if quant else 'no quantization'}: correct them."
            )
    if quant is None:
        return
    if formats and announced not in formats.values():
        name = next(iter(formats))
        raise CheckpointError(
            f"The checkpoint announces {quant.algo} and holds no such weight (tensor {file.full_name(name)} is "
            f"{stored[name]}): remove quantization_config from config.json, or hf_quant_config.json."
        )
    names = sorted(disagreements(stored.items(), quant.ignore))
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
