"""Images of running rows: which of their feature rows fall into a step. Called by ``model_runner``.

Features are computed once per row, in the step that first touches them, and dropped with the row's next start.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from outrider.runner.batch import ImageBatch
from outrider.runner.rows import StepArrays
from outrider.types import ImageInput, RowInit, SeqSlice


class ImageStore:
    """Pixels and projected features of every row that has images.

    ``encode`` maps pixels ``[tiles, 3, size, size]`` to features ``[tiles * tokens_per_tile, hidden]``.
    """

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        self._encode = encode
        self._device = device
        self._images: dict[int, tuple[ImageInput, ...]] = {}
        self._features: dict[int, torch.Tensor] = {}

    def start_row(self, init: RowInit) -> None:
        """A sequence takes the row; what the last one left is dropped."""
        self._images.pop(init.row, None)
        self._features.pop(init.row, None)
        if init.images:
            self._images[init.row] = init.images

    def touches(self, slices: list[SeqSlice]) -> bool:
        """Whether any patch falls into the step (so that its embeddings are not the token table's)."""
        return any(
            start < piece.start + piece.num_tokens and start + length > piece.start
            for piece in slices
            for image in self._images.get(piece.row, ())
            for start, length in image.spans
        )

    def batch(self, slices: list[SeqSlice], arrays: StepArrays) -> ImageBatch | None:
        """The feature rows of this step and the token rows they overwrite; None if no patch is in it."""
        tokens: list[np.ndarray] = []
        features: list[torch.Tensor] = []
        for index, piece in enumerate(slices):
            images = self._images.get(piece.row)
            if images is None:
                continue
            positions = np.concatenate([np.arange(s, s + n) for image in images for s, n in image.spans])
            inside = (positions >= piece.start) & (positions < piece.start + piece.num_tokens)
            if inside.any():
                tokens.append(positions[inside] - piece.start + int(arrays.query_start[index]))
                wanted = torch.from_numpy(np.flatnonzero(inside)).to(self._device)
                features.append(self._row_features(piece.row, images)[wanted])
        if not tokens:
            return None
        token_idx = torch.from_numpy(np.concatenate(tokens)).to(self._device)
        return ImageBatch(torch.cat(features), token_idx)

    def _row_features(self, row: int, images: tuple[ImageInput, ...]) -> torch.Tensor:
        if row not in self._features:
            parts = [self._encode(self._pixels(image)) for image in images]
            self._features[row] = torch.cat([part.flatten(0, -2) for part in parts])
        return self._features[row]

    def _pixels(self, image: ImageInput) -> torch.Tensor:
        raw = torch.frombuffer(bytearray(image.pixels), dtype=torch.bfloat16)
        return raw.view(image.num_tiles, -1, image.size, image.size).to(self._device)
