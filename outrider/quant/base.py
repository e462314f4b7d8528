"""How weights come into being: the builder that allocates them and lists where each checkpoint tensor goes.

A layer is complete at construction: it asks the ``WeightBuilder`` for memory in the format that the
``Source`` (a checkpoint, or the dummy) holds, and registers one ``WeightSlot`` per piece it wants. The
loader then fills slots and knows no layer. Names are canonical: ``layers.0.self_attn.q_proj.weight``,
without the prefix that a multimodal checkpoint puts before them. On the ``meta`` device the same code
measures a model without memory. Never reads a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import torch

from outrider.errors import CheckpointError
from outrider.parallel import Parallel


class Format(StrEnum):
    """How a weight matrix is stored: as it is multiplied, as e4m3 with a scale, or as e2m1 with block scales."""

    PLAIN = "plain"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


FORMAT_OF_DTYPE = {
    "BF16": Format.PLAIN,
    "F16": Format.PLAIN,
    "F32": Format.PLAIN,
    "F8_E4M3": Format.FP8,
    "U8": Format.NVFP4,
}


class Source(Protocol):
    """What a checkpoint tells about its tensors before they are read."""

    def dtype_of(self, name: str) -> str | None:
        """The stored dtype by its safetensors name (``BF16``, ``F8_E4M3``, …); None when there is no such tensor."""


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One piece of a checkpoint tensor and the memory that takes it.

    ``shape`` is the whole tensor's expected shape; () accepts any one-element tensor. ``select`` cuts out
    this rank's part (empty: all), ``transpose`` swaps its last two dimensions, the result fills ``dest``.
    """

    name: str
    shape: tuple[int, ...]
    dest: torch.Tensor
    select: tuple[slice, ...] = ()
    transpose: bool = False


@dataclass(slots=True)
class WeightBuilder:
    """Allocates weights on one device and remembers what must be loaded into them.

    ``unused_prefixes`` begin the names of tensors that belong to other tensor ranks alone.
    """

    source: Source
    parallel: Parallel
    dtype: torch.dtype
    device: torch.device
    slots: list[WeightSlot] = field(default_factory=list)
    after_load: list[Callable[[], None]] = field(default_factory=list)
    unused_prefixes: list[str] = field(default_factory=list)
    num_bytes: int = 0
    num_table_bytes: int = 0

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised memory, counted in ``num_bytes``."""
        tensor = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def table(self, *shape: int) -> torch.Tensor:
        """Uninitialised memory of which a step reads a few rows: a GPU's lies in pinned host memory.

        Counted in ``num_table_bytes`` alone.
        """
        device = torch.device("cpu") if self.device.type == "cuda" else self.device
        tensor = torch.empty(shape, dtype=self.dtype, device=device, pin_memory=self.device.type == "cuda")
        self.num_table_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def add_slot(
        self,
        name: str,
        shape: tuple[int, ...],
        dest: torch.Tensor,
        select: tuple[slice, ...] = (),
        transpose: bool = False,
    ) -> None:
        """Ask for (a piece of) the checkpoint tensor ``name`` to be copied into ``dest``."""
        self.slots.append(WeightSlot(name, shape, dest, select, transpose))

    def param(self, name: str, *shape: int) -> torch.Tensor:
        """A whole tensor of the checkpoint in the model dtype, the same on every rank."""
        dest = self.empty(*shape)
        self.add_slot(name, shape, dest)
        return dest

    def finish(self) -> None:
        """Forget the slots (they would keep memory alive that layers replace) and run what follows a load."""
        self.slots.clear()
        for callback in self.after_load:
            callback()
        self.after_load.clear()

    def format_of(self, *names: str) -> Format:
        """The common format of the tensors that one layer fuses; ``CheckpointError`` when they differ."""
        formats = {name: self._one_format(name) for name in names if self.source.dtype_of(name) is not None}
        if len(set(formats.values())) > 1:
            listed = ", ".join(f"{name} is {fmt}" for name, fmt in formats.items())
            raise CheckpointError(f"These tensors must have one format to be multiplied together: {listed}.")
        # With none present any format does: the loader names the missing tensor.
        return next(iter(formats.values()), Format.PLAIN)

    def _one_format(self, name: str) -> Format:
        dtype = self.source.dtype_of(name)
        if dtype not in FORMAT_OF_DTYPE:
            known = ", ".join(FORMAT_OF_DTYPE)
            raise CheckpointError(f"Tensor {name} is stored as {dtype}; weights must be one of {known}.")
        return FORMAT_OF_DTYPE[dtype]


def check_depth(name: str, depth: int, multiple: int) -> None:
    """``CheckpointError`` where tensor ``name`` has in features (of this rank) that its kernels cannot read."""
    if depth % multiple:
        raise CheckpointError(
            f"Tensor {name} has {depth} in features on each rank, and NVFP4 needs a multiple of {multiple} on this "
            f"device; use another --tensor-parallel-size."
        )
