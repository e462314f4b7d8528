"""ModelOpt's list of modules left in high precision, used as a check: formats are decided tensor by tensor.

Called by ``registry`` after a checkpoint is opened and by the dummy, which has no tensors to look at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from outrider.quant.base import FORMAT_OF_DTYPE, Format


def is_ignored(module: str, ignore: tuple[str, ...]) -> bool:
    """Whether the list keeps ``module`` (a canonical name) in high precision.

    Entries are globs on dotted names, with or without a multimodal prefix; an entry covers the modules under
    it too, and ModelOpt before 0.39 wrote bare names that count anywhere in the path.
    """
    for entry in ignore:
        bare = entry.removeprefix("language_model.").removeprefix("model.")
        if any(fnmatchcase(module, p) for p in (bare, f"{bare}.*", f"*.{bare}", f"*.{bare}.*")):
            return True
    return False


def is_projection(name: str) -> bool:
    """Whether ``name`` is the weight of a decoder matrix that exporters quantize (never router, norm or head)."""
    fused_experts = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return name.startswith("layers.") and (fused_experts or name.endswith("_proj.weight"))


def disagreements(dtypes: Iterable[tuple[str, str]], ignore: tuple[str, ...]) -> Iterator[str]:
    """Names, of ``(name, stored dtype)``, that are quantized though listed, or wide though not listed."""
    for name, dtype in dtypes:
        if is_projection(name):
            quantized = FORMAT_OF_DTYPE.get(dtype) is not Format.PLAIN
            if quantized == is_ignored(name.removesuffix(".weight"), ignore):
                yield name
