"""Small image datasets, written as `datasets` reads them."""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture


CLASSES = ("dark", "bright", "green")


def picture(label: int, number: int, size: tuple[int, int] = (12, 12)) -> Picture.Image:
    """A noisy picture whose colour tells its class; size is (height, width)."""
    noise = np.random.default_rng((label, number)).integers(0, 60, (*size, 3), dtype=np.uint8)
    noise[..., 1] += np.uint8(150 * (label == 2))
    return Picture.fromarray(noise + np.uint8(150 * (label == 1)))


def image_rows(count: int, first: int = 0, size: tuple[int, int] = (12, 12)) -> dict[str, list]:
    labels = [number % len(CLASSES) for number in range(first, first + count)]
    return {"image": [picture(label, first + i, size) for i, label in enumerate(labels)], "label": labels}


def write_parquet(folder: Path, features: Features | None = None, **splits: dict[str, list]) -> Path:
    """A folder of Parquet files, one a split: `<split>-00000-of-00001.parquet`."""
    folder.mkdir(parents=True, exist_ok=True)
    features = features or Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    for split, rows in splits.items():
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_imagefolder(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((12, 12),)) -> Path:
    """`<class>/<number>.png`, without splits."""
    for number in range(count):
        label = number % len(CLASSES)
        place = folder / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        picture(label, number, sizes[number % len(sizes)]).save(place / f"{number:03d}.png")
    return folder


UNLABELLED = Features({"image": Image(), "note": Value("string")})
