"""Host arrays to the device in one copy a step. Called by ``model_runner`` and ``graphs``; blind to their meaning.

A copy from ordinary memory may wait for everything queued on the device before it; a copy from pinned memory
does not. Arrays are therefore packed into a ring of pinned buffers, deep enough that a buffer's last copy is
long done when its turn comes again.
"""

from __future__ import annotations

import numpy as np
import torch

_ALIGN = 16
_DEPTH = 4


class _Pinned:
    """One buffer of the ring, and the event after its last copy."""

    def __init__(self, num_bytes: int) -> None:
        self.host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.cuda.Event()


class Staging:
    """Uploads lists of numpy arrays; on a CPU device the tensors share the arrays' memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring: list[_Pinned | None] = [None] * _DEPTH
        self._turn = 0

    def allocate(
        self, arrays: list[np.ndarray], within: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A device buffer for arrays of these shapes, and the tensors in it (contents undefined).

        It is the beginning of ``within``, a buffer of arrays that are no smaller, or memory of its own.
        """
        offsets = _offsets(arrays)
        buffer = (
            torch.empty(offsets[-1], dtype=torch.uint8, device=self._device) if within is None else within
        )
        buffer = buffer[: offsets[-1]]
        tensors = [
            buffer[start : start + a.nbytes].view(_torch_dtype(a)).view(a.shape)
            for a, start in zip(arrays, offsets, strict=False)
        ]
        return buffer, tensors

    def upload(self, arrays: list[np.ndarray], buffer: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The arrays on the device, in the same order; into ``buffer`` (of ``allocate``) if one is given."""
        arrays = [np.ascontiguousarray(a) for a in arrays]
        if self._device.type != "cuda":
            return [torch.from_numpy(a) for a in arrays]
        tensors: list[torch.Tensor] = []
        if buffer is None:
            buffer, tensors = self.allocate(arrays)
        offsets = _offsets(arrays)
        pinned = self._next(offsets[-1])
        packed = pinned.host.numpy()
        for array, start in zip(arrays, offsets, strict=False):
            packed[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        buffer.copy_(pinned.host[: offsets[-1]], non_blocking=True)
        pinned.copied.record()
        return tensors

    def _next(self, num_bytes: int) -> _Pinned:
        self._turn = (self._turn + 1) % _DEPTH
        pinned = self._ring[self._turn]
        if pinned is None or pinned.host.numel() < num_bytes:
            pinned = self._ring[self._turn] = _Pinned(max(1 << 20, 1 << num_bytes.bit_length()))
        else:
            pinned.copied.synchronize()
        return pinned


def _offsets(arrays: list[np.ndarray]) -> list[int]:
    """Where each array starts in the packed buffer; the last entry is the buffer's size."""
    sizes = [-(-a.nbytes // _ALIGN) * _ALIGN for a in arrays]
    return [0, *np.cumsum(sizes).tolist()]


def _torch_dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
