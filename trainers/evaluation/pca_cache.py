"""PCA over the tokens of a dataset, fitted once and kept for all evaluations that need the same."""

import hashlib
import json
import logging
from pathlib import Path

from safetensors.torch import load_file, save_file

from datasets_scripts.embedding.linear_projection import LinearBaseline
from hf_wsl.files import replacing

from ..data.windows.dataset_source import DatasetSource
from ..data.windows.window_data import WindowDataset
from ..pretraining.baselines import fit_pca


logger = logging.getLogger(__name__)


def cached_pca(source: DatasetSource, rank: int, max_tokens: int, cache_dir: Path) -> LinearBaseline:
    """The leading directions of a dataset's standardized training tokens.

    Args:
        source: the tokenized dataset.
        rank: latent size.
        max_tokens: tokens to fit on, about.
        cache_dir: keeps `pca-<key>.safetensors`; the key follows from the dataset's files and the numbers above.

    Raises:
        DatasetError: the dataset cannot be read.
    """
    path = cache_dir / f"pca-{_key(source, rank, max_tokens)}.safetensors"
    if not path.is_file():
        logger.info("fitting PCA on %s", source.name)
        fitted = fit_pca(WindowDataset(source.load()["train"], split="train"), rank, max_tokens)
        with replacing(path) as temporary:
            save_file({"components": fitted.components, "mean": fitted.mean}, temporary)
    return LinearBaseline(**load_file(path))


def _key(source: DatasetSource, rank: int, max_tokens: int) -> str:
    files = [source.name, source.commit()]
    if source.folder is not None:
        found = sorted(source.folder.glob("windows/*.parquet"))
        files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found]
    return hashlib.sha256(json.dumps([files, rank, max_tokens]).encode()).hexdigest()[:16]
