"""Random resized crops, flips and normalization: the paper's augmentations (appendix C.2), of many images at once.

What happens to image i in an epoch follows from (seed, epoch, i) alone: neither the order of the images nor the number
of processes that load them changes it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from ..windows.crops import mix


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colors in [0, 1]
GRAY_MEAN, GRAY_STD = (0.449,), (0.226,)  # their means
_RATIO = (3 / 4, 4 / 3)  # of width to height, as in torchvision's RandomResizedCrop
_TRIES = 10


def random_crops(
    seed: int, epoch: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray, scale_min: float
) -> tuple[np.ndarray, np.ndarray]:
    """The crop of each image, drawn as torchvision's `RandomResizedCrop` draws it, and whether it is flipped.

    Args:
        indices: of the images in their dataset, int `[N]`.
        heights, widths: pixels, int `[N]`.
        scale_min: smallest share of the area, in (0, 1].

    Returns:
        int64 `[N, 4]`: top, left, height, width; bool `[N]`, true for a half of all draws.
    """
    draws = _uniform(seed, epoch, indices, 4 * _TRIES + 1)
    tries = draws[:, 1:].reshape(-1, _TRIES, 4)
    area = (heights * widths)[:, None] * (scale_min + (1 - scale_min) * tries[..., 0])
    low, high = np.log(_RATIO)
    ratio = np.exp(low + (high - low) * tries[..., 1])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    rows, first = np.arange(len(indices)), fits.argmax(1)
    w, h, (u, v) = w[rows, first], h[rows, first], tries[rows, first, 2:].T
    boxes = np.stack([np.floor(u * (heights - h + 1)), np.floor(v * (widths - w + 1)), h, w], 1)
    # None of ten fits (a long, thin image): the largest central crop of an allowed ratio, as torchvision does.
    w = np.minimum(widths, np.rint(heights * _RATIO[1]))
    h = np.minimum(heights, np.rint(widths / _RATIO[0]))
    central = np.stack([(heights - h) // 2, (widths - w) // 2, h, w], 1)
    return np.where(fits.any(1)[:, None], boxes, central).astype(np.int64), draws[:, 0] < 0.5


def central_crops(heights: np.ndarray, widths: np.ndarray, share: float) -> np.ndarray:
    """The central square with `share` of the shorter side; resized, it is what a resize and a center crop give.

    Returns:
        int64 `[N, 4]`: top, left, height, width.
    """
    side = np.maximum(np.rint(share * np.minimum(heights, widths)), 1).astype(np.int64)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)


def crop_together(images: Tensor, boxes: np.ndarray, flips: np.ndarray, size: int) -> Tensor:
    """Crops, resizes (antialiased) and flips images of one size.

    Bilinear resizing with antialias is a matrix for the rows and one for the columns; one multiplication each does all
    images, in a tenth of the time of one call an image.

    Args:
        images: uint8 `[N, C, H, W]`.
        boxes, flips: see `random_crops`.
        size: pixels a side of the result.

    Returns:
        float32 `[N, C, size, size]` in [0, 1].
    """
    box = torch.from_numpy(boxes).float()
    rows = _resize_matrices(box[:, 0], box[:, 2], size, images.shape[2])  # [N, size, H]
    columns = _resize_matrices(box[:, 1], box[:, 3], size, images.shape[3])  # [N, size, W]
    columns = torch.where(torch.from_numpy(flips)[:, None, None], columns.flip(1), columns)
    return (rows[:, None] @ images.float().div_(255)) @ columns.mT[:, None]


def crop_one(image: Tensor, box: np.ndarray, flip: bool, size: int) -> Tensor:
    """`crop_together` for one image, uint8 `[C, H, W]`, by torchvision; for images of different sizes."""
    top, left, height, width = (int(number) for number in box)
    cropped = transforms.crop(image, top, left, height, width).float().div_(255)
    resized = transforms.resize(cropped, [size, size], antialias=True)
    return transforms.horizontal_flip(resized) if flip else resized


def normalize(images: Tensor) -> Tensor:
    """Subtracts ImageNet's mean and divides by its deviation, in place; `[N, C, H, W]`, C is 3 or 1."""
    mean, std = (MEAN, STD) if images.shape[1] == 3 else (GRAY_MEAN, GRAY_STD)
    return images.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def _resize_matrices(start: Tensor, length: Tensor, size: int, extent: int) -> Tensor:
    """`[N, size, extent]`: what each pixel of the crop [start, start + length) weighs in each pixel of the result."""
    step = (length / size)[:, None]
    centers = start[:, None] + (torch.arange(size) + 0.5) * step  # [N, size]
    pixels = torch.arange(extent) + 0.5
    weights = (1 - (pixels - centers[..., None]).abs() / step.clamp(min=1)[..., None]).clamp_(min=0)
    inside = (pixels > start[:, None]) & (pixels < (start + length)[:, None])
    weights *= inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def _uniform(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """`[N, count]` numbers in [0, 1): a counter-based generator, so that no image needs a generator of its own."""
    with np.errstate(over="ignore"):
        state = mix(mix(mix(np.uint64(seed)) ^ np.uint64(epoch)) ^ indices.astype(np.uint64))
        bits = mix(state[:, None] ^ mix(np.arange(count, dtype=np.uint64)))
    return (bits >> np.uint64(11)) * 2.0**-53
