"""Images as a dataset holds them: decoded once where they are small and of one size, else whenever they are read."""

from __future__ import annotations

import logging

import datasets
import numpy as np
import torch
from torch import Tensor

from ..public_dataset import FixedRows, PublicDatasetError


logger = logging.getLogger(__name__)
_PIXELS = "pixels"


class _SizesDiffer(Exception):
    """Images are not all of one size."""


class DecodedImages:
    """Images of one size in memory-mapped Arrow.

    Args:
        rows: `[N, C * H * W]` uint8.
        shape: (C, H, W).
    """

    def __init__(self, rows: FixedRows, shape: tuple[int, int, int]) -> None:
        self.rows, self.shape = rows, shape

    def images(self, indices: np.ndarray) -> Tensor:
        """uint8 `[len(indices), C, H, W]`."""
        return torch.from_numpy(self.rows.take(indices)).view(len(indices), *self.shape)


class EncodedImages:
    """Images that are decoded when they are read.

    Args:
        rows: its column `column` is of the feature `datasets.Image`, with a mode.
    """

    def __init__(self, rows: datasets.Dataset, column: str) -> None:
        self.rows, self.column = rows, column

    def images(self, indices: np.ndarray) -> list[Tensor]:
        """uint8 `[C, H, W]` each."""
        return [_pixels(image) for image in self.rows[indices.tolist()][self.column]]


def decode_all(rows: datasets.Dataset, column: str, channels: int, limit_mb: int) -> DecodedImages | EncodedImages:
    """The images of a column; decoded where they have one size and together stay below `limit_mb` (2**20 bytes).

    Raises:
        PublicDatasetError: an image cannot be decoded.
    """
    rows = rows.select_columns(column).cast_column(column, datasets.Image(mode="RGB" if channels == 3 else "L"))
    try:
        shape = tuple(_pixels(rows[0][column]).shape)
        length = int(np.prod(shape))
        if length * len(rows) > limit_mb * 2**20:
            return EncodedImages(rows, column)
        decoded = rows.map(
            _decode,
            batched=True,
            batch_size=1000,
            fn_kwargs={"column": column, "shape": shape},
            remove_columns=[column],
            features=datasets.Features({_PIXELS: datasets.List(datasets.Value("uint8"), length=length)}),
            desc="decode images",
        )
    except _SizesDiffer:
        logger.info("images differ in size: they are decoded whenever they are read")
        return EncodedImages(rows, column)
    except (OSError, ValueError) as error:
        raise PublicDatasetError(f"column '{column}' holds something that is no image: {error}") from error
    return DecodedImages(FixedRows(decoded, _PIXELS), shape)


def _decode(batch: dict[str, list], column: str, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    images = [_pixels(image) for image in batch[column]]
    if any(tuple(image.shape) != shape for image in images):
        raise _SizesDiffer
    return {_PIXELS: torch.stack(images).flatten(1).numpy()}


def _pixels(image) -> Tensor:
    """uint8 `[C, H, W]` of a PIL image."""
    if image is None:
        raise ValueError("a row without an image")
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1).contiguous()
