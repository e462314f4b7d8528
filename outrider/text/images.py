"""Images to what a Llama 4 prompt holds of them: tiles of pixels and a run of patch tokens. Called by the server.

Follows the checkpoint's ``preprocessor_config.json`` (size, max_patches). Sizes are checked before pixels are decoded.
Never fetches anything and never imports torch. One image costs up to ``MAX_PIXELS`` x 8 bytes while it is decoded.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from outrider.errors import ConfigError, MediaError
from outrider.models.config import ModelConfig
from outrider.types import ImageInput

MAX_BYTES = 20 << 20
MAX_PIXELS = 50_000_000
MAX_SIDE = 65_535
"""JPEG's own limit; the weights of a resize grow with the longer side."""

MAX_TILES = 256
"""Tiles of an image that a checkpoint may ask for."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_SERVED_SETTINGS = {"resize_to_max_canvas": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_DECODE_FAILED = f"The image cannot be decoded; send a valid {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file."

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ProcessedImage:
    """Tiles of one image: ``pixels`` is raw bfloat16 ``[num_tiles, 3, size, size]``, row by row, the whole image last.

    ``rows`` x ``columns`` is the grid of tiles; a grid of one tile has no extra tile for the whole image.
    """

    pixels: bytes
    rows: int
    columns: int
    num_tiles: int


@dataclass(frozen=True)
class ImageTokens:
    """Ids of the tokens around and in an image."""

    image: int
    start: int
    end: int
    patch: int
    column_separator: int
    row_separator: int


@dataclass(frozen=True)
class ImageProcessor:
    """Cuts images into tiles of ``size`` pixels, at most ``max_tiles`` of them, and writes their tokens."""

    size: int
    max_tiles: int
    patches_per_tile: int
    tokens: ImageTokens

    @classmethod
    def load(
        cls, folder: str | Path, config: ModelConfig, special_tokens: dict[str, int]
    ) -> ImageProcessor | None:
        """The processor of a checkpoint folder; None when the model sees no images."""
        if config.vision is None:
            return None
        names = {
            "image": "<|image|>",
            "start": "<|image_start|>",
            "end": "<|image_end|>",
            "patch": "<|patch|>",
            "column_separator": "<|tile_x_separator|>",
            "row_separator": "<|tile_y_separator|>",
        }
        if missing := [name for name in names.values() if name not in special_tokens]:
            raise ConfigError(
                f"the tokenizer lacks {missing[0]}, which images need; use --language-model-only"
            )
        settings = _read_settings(Path(folder) / "preprocessor_config.json")
        for key, served in _SERVED_SETTINGS.items():
            if settings.get(key) not in (None, served):
                raise ConfigError(
                    f"preprocessor_config.json has {key} {settings[key]}; only {served} is served; "
                    f"use --language-model-only."
                )
        return cls(
            size=config.vision.image_size,
            max_tiles=_max_tiles(settings),
            patches_per_tile=config.vision.tokens_per_tile,
            tokens=ImageTokens(**{field: special_tokens[name] for field, name in names.items()}),
        )

    def process(self, data: bytes) -> ProcessedImage:
        """Decode, resize, pad and cut one image file; ``MediaError`` if it cannot be read or is too large."""
        image = decode_image(data)
        width, height = image.size
        rows, columns = self.grid(height, width)
        target_height = min(max(height, self.size), rows * self.size)
        target_width = min(max(width, self.size), columns * self.size)
        canvas = np.zeros((rows * self.size, columns * self.size, 3), dtype=np.uint8)
        fitted = _resize(image, *_fit(height, width, target_height, target_width))
        canvas[: fitted.shape[0], : fitted.shape[1]] = fitted
        tiles = canvas.reshape(rows, self.size, columns, self.size, 3).transpose(0, 2, 4, 1, 3)
        tiles = tiles.reshape(rows * columns, 3, self.size, self.size)
        if rows * columns > 1:
            whole = _resize(image, self.size, self.size).transpose(2, 0, 1)
            tiles = np.concatenate([tiles, whole[None]])
        return ProcessedImage(_BFLOAT16_OF_BYTE[tiles].tobytes(), rows, columns, len(tiles))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the canvas that shrinks the image least, else enlarges it least; then the smallest.

        Scales are compared in float32, as the model's own processor does.
        """
        side, one = np.float32(self.size), np.float32(1)
        scales = {
            (rows, columns): min(side * rows / np.float32(height), side * columns / np.float32(width))
            for rows in range(1, self.max_tiles + 1)
            for columns in range(1, self.max_tiles // rows + 1)
        }
        enlarging = [scale for scale in scales.values() if scale >= one]
        best = min(enlarging) if enlarging else max(scales.values())
        return min(
            (grid for grid, scale in scales.items() if scale == best), key=lambda grid: grid[0] * grid[1]
        )

    def expand(
        self, ids: list[int], images: list[ProcessedImage]
    ) -> tuple[list[int], tuple[ImageInput, ...]]:
        """Replace each image placeholder of a rendered prompt by the image's tokens.

        ``ids`` holds as many placeholders as there are ``images``. Returns the prompt and the images with the
        positions of their patch tokens.
        """
        result: list[int] = []
        inputs: list[ImageInput] = []
        waiting = iter(images)
        for token_id in ids:
            if token_id != self.tokens.image:
                result.append(token_id)
                continue
            image = next(waiting)
            spans = self._write_tokens(result, image)
            digest = hashlib.sha256(image.pixels)
            digest.update(f"{image.rows}x{image.columns}x{self.size}".encode())
            inputs.append(ImageInput(image.pixels, image.num_tiles, self.size, tuple(spans), digest.digest()))
        return result, tuple(inputs)

    def _write_tokens(self, result: list[int], image: ProcessedImage) -> list[tuple[int, int]]:
        tokens, spans = self.tokens, []
        patches = [tokens.patch] * self.patches_per_tile

        def tile() -> None:
            spans.append((len(result), len(patches)))
            result.extend(patches)

        result.append(tokens.start)
        if image.rows * image.columns > 1:
            for _ in range(image.rows):
                for column in range(image.columns):
                    if column:
                        result.append(tokens.column_separator)
                    tile()
                result.append(tokens.row_separator)
        result.append(tokens.image)
        tile()
        result.append(tokens.end)
        return spans


def decode_image(data: bytes) -> Image.Image:
    """The first frame of an image file as upright RGB; refuses by size before any pixel is decoded."""
    if len(data) > MAX_BYTES:
        raise MediaError(
            f"The image has more than {MAX_BYTES >> 20} MiB; send a smaller one.", param="image_url"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        too_large = image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE
        rgb = None if too_large else _upright_rgb(image)
    except Image.DecompressionBombError:  # Pillow's own bound, far above ours
        rgb = None
    except Exception as error:  # decoders raise almost anything on hostile files
        raise MediaError(_DECODE_FAILED, param="image_url") from error
    if rgb is None:
        raise MediaError(
            f"The image has more than {MAX_PIXELS:,} pixels, or a side of more than {MAX_SIDE:,}; send a smaller one.",
            param="image_url",
        )
    return rgb


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says and converted, without copies that change nothing (200 MB each)."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image if image.mode == "RGB" else image.convert("RGB")


def _fit(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """The largest size inside the target with the image's proportions, at least one pixel each way."""
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return max(1, min(math.floor(height * scale_width), target_height)), target_width
    return target_height, max(1, min(math.floor(width * scale_height), target_width))


def _resize(image: Image.Image, height: int, width: int) -> Pixels:
    """Bilinear with antialiasing on 8-bit values, ``[height, width, 3]``."""
    resized = (
        image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
    )
    return np.asarray(resized)


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def _normalised_bytes() -> npt.NDArray[np.uint16]:
    """The bfloat16 bits of (b / 255 - 0.5) / 0.5 for every byte, rounded after each step as the model was trained."""
    scaled = _bfloat16(np.arange(256, dtype=np.float32) * np.float32(1 / 255))
    normalised = _bfloat16(_bfloat16(scaled - np.float32(0.5)) / np.float32(0.5))
    return (normalised.view(np.uint32) >> 16).astype("<u2")


def _max_tiles(settings: dict[str, Any]) -> int:
    count = settings.get("max_patches", 16)
    if not isinstance(count, int) or not 1 <= count <= MAX_TILES:
        raise ConfigError(f"preprocessor_config.json: max_patches must be a number from 1 to {MAX_TILES}.")
    return count


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    return settings if isinstance(settings, dict) else {}


_BFLOAT16_OF_BYTE = _normalised_bytes()
