"""Fills a model's weight slots from safetensors shards, one slice at a time. Called by ``registry``.

Only the part that a slot selects is read, moved to the device and copied into place, so loading needs the
weights' memory plus one slice. Knows names, shapes and dtypes; knows no layer. Anything in the checkpoint
that no slot wants, or wanted and absent, or of another shape, is a ``CheckpointError``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from outrider.errors import CheckpointError
from outrider.quant.base import WeightBuilder, WeightSlot

INDEX_FILE = "model.safetensors.index.json"
TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
Progress = Callable[[int, int], None]


def canonical_name(name: str) -> str:
    """A checkpoint's tensor name without what multimodal or newer files put before it.

    ``language_model.model.layers.0…``, ``model.language_model.layers.0…`` and ``model.layers.0…`` are all
    ``layers.0…``; ``model.vision_model.…`` is ``vision_model.…``; ``language_model.lm_head.…`` is ``lm_head.…``.
    """
    for prefix in (*TEXT_PREFIXES, "language_model."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


class WeightFile(Protocol):
    """A checkpoint that can be asked about its tensors and read in part; names are canonical."""

    def names(self) -> Iterable[str]:
        """Every tensor."""

    def full_name(self, name: str) -> str:
        """The tensor's name as this checkpoint spells it, or would spell it if it is absent; for messages."""

    def dtype_of(self, name: str) -> str | None:
        """The stored dtype's safetensors name; None when there is no such tensor."""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""

    def read(self, name: str, select: tuple[slice, ...]) -> torch.Tensor:
        """The selected part (all of it when empty) in CPU memory, in the stored dtype."""


class SafetensorsFile:
    """The shards of a checkpoint folder, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, tuple[Any, str]] = {}
        self.handles: list[Any] = []
        for path in _shards(folder):
            try:
                handle: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error
            self.handles.append(handle)
            for full_name in handle.keys():  # noqa: SIM118 (a handle is no dict)
                name = canonical_name(full_name)
                if name in self.tensors:
                    raise CheckpointError(
                        f"Tensor {full_name} is in the checkpoint twice, again in {path.name}."
                    )
                self.tensors[name] = (handle, full_name)

    def names(self) -> Iterable[str]:
        """See ``WeightFile``."""
        return self.tensors

    def full_name(self, name: str) -> str:
        """See ``WeightFile``. An absent layer's tensor gets the prefix of those that are there."""
        if name in self.tensors:
            return self.tensors[name][1]
        first = name.partition(".")[0]
        for present, (_, full_name) in self.tensors.items():
            if present.partition(".")[0] == first:
                return full_name.removesuffix(present) + name
        return name

    def dtype_of(self, name: str) -> str | None:
        """See ``WeightFile``."""
        if name not in self.tensors:
            return None
        handle, full_name = self.tensors[name]
        return str(handle.get_slice(full_name).get_dtype())

    def shape_of(self, name: str) -> tuple[int, ...]:
        """See ``WeightFile``."""
        handle, full_name = self.tensors[name]
        return tuple(handle.get_slice(full_name).get_shape())

    def read(self, name: str, select: tuple[slice, ...]) -> torch.Tensor:
        """See ``WeightFile``."""
        handle, full_name = self.tensors[name]
        tensor: torch.Tensor = handle.get_slice(full_name)[select] if select else handle.get_tensor(full_name)
        return tensor


def _shards(folder: Path) -> list[Path]:
    """The files that the index names, or every ``*.safetensors`` of a folder without one."""
    index = folder / INDEX_FILE
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder} holds no .safetensors file; download the weights or use dummy ones."
            )
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index with a weight_map.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {missing[0]}, which is not there: finish the download.")
    return [folder / name for name in names]


def fill_slots(
    builder: WeightBuilder,
    file: WeightFile,
    is_unused: Callable[[str], bool],
    progress: Progress | None = None,
) -> None:
    """Check every name and shape, then copy each slot's part into place; ``progress(bytes done, bytes in all)``."""
    others = tuple(builder.unused_prefixes)
    check_names(builder.slots, file, lambda name: name.startswith(others) or is_unused(name))
    total = sum(slot.dest.numel() * slot.dest.element_size() for slot in builder.slots)
    done = 0
    for slot in builder.slots:
        _fill(slot, file)
        done += slot.dest.numel() * slot.dest.element_size()
        if progress is not None:
            progress(done, total)
    builder.finish()


def check_names(slots: list[WeightSlot], file: WeightFile, is_unused: Callable[[str], bool]) -> None:
    """Refuse missing, misshapen and left-over tensors before any byte is read."""
    wanted = {slot.name: slot.shape for slot in slots}
    present = set(file.names())
    for name, shape in wanted.items():
        if name not in present:
            raise CheckpointError(
                f"Tensor {file.full_name(name)} is missing from the checkpoint; its shape must be {list(shape)}."
            )
        found = file.shape_of(name)
        if found != shape and not (shape == () and found == (1,)):
            raise CheckpointError(
                f"Tensor {file.full_name(name)} must have shape {list(shape)}; the checkpoint has {list(found)}."
            )
    left_over = sorted(name for name in present - wanted.keys() if not is_unused(name))
    if left_over:
        more = f" and {len(left_over) - 1} more" if len(left_over) > 1 else ""
        first = f"{file.full_name(left_over[0])} {list(file.shape_of(left_over[0]))}"
        raise CheckpointError(f"The checkpoint holds {first}{more}, which config.json has no place for.")


def _fill(slot: WeightSlot, file: WeightFile) -> None:
    value = file.read(slot.name, slot.select)
    if not _same_kind(value.dtype, slot.dest.dtype):
        name = file.full_name(slot.name)
        raise CheckpointError(f"Tensor {name} is stored as {value.dtype}; {slot.dest.dtype} is needed.")
    value = value.to(slot.dest.device)
    if slot.transpose:
        value = value.transpose(-1, -2)
    # One-byte formats are copied as bytes: not every device can copy strided FP8.
    dest = slot.dest
    if dest.element_size() == 1:
        dest, value = dest.view(torch.uint8), value.view(torch.uint8)
    dest.copy_(value.reshape(dest.shape))


def _same_kind(found: torch.dtype, wanted: torch.dtype) -> bool:
    """Wide floats convert into each other; one-byte codes only mean something as themselves."""
    wide = (torch.float32, torch.bfloat16, torch.float16)
    return found == wanted or (found in wide and wanted in wide)
