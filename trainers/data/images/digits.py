"""scikit-learn's handwritten digits as image-classification splits: real data that needs no download."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset


NUM_CLASSES = 10
MEAN = STD = 0.5  # of the pixels in [0, 1], as a model's preprocessing config states them
# One split for everybody, whatever the seed of a run: a test image of one zoo is never a training image of another.
SPLIT_SEED = 0
TEST_IMAGES = VALIDATION_IMAGES = 360


def digits_splits(image_size: int) -> dict[str, TensorDataset]:
    """The 1797 gray 8x8 digits (UCI, optical recognition of handwritten digits), split by class and always the same.

    Args:
        image_size: pixels a side, at least 8; the images are resized bilinearly.

    Returns:
        "train" (1077), "validation" (360) and "test" (360): pairs of image float32 `[1, image_size, image_size]`,
        scaled to [-1, 1], and label int64.

    Raises:
        ValueError: an image size below 8 would throw pixels away.
    """
    if image_size < 8:
        raise ValueError(f"image_size is {image_size}; the digits have 8x8 pixels, choose 8 or more.")
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)  # [1797, 1, 8, 8] in [0, 1]
    images = interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = (images - MEAN) / STD
    labels = torch.from_numpy(digits.target).long()
    rest, test = train_test_split(
        range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=SPLIT_SEED, shuffle=True
    )
    train, validation = train_test_split(
        rest, test_size=VALIDATION_IMAGES, stratify=labels[rest], random_state=SPLIT_SEED, shuffle=True
    )
    indices = {"train": train, "validation": validation, "test": test}
    return {name: TensorDataset(images[rows], labels[rows]) for name, rows in indices.items()}
