"""Tokenized datasets of a few kilobytes, in the schema that `hf-wsl tokenize` writes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from datasets_scripts.schema import model_features, window_features
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor
from modeling_wsl.manifest import Segment
from trainers.crops import crop_starts


CARD = """---
configs:
- config_name: windows
  default: true
  data_files:
{windows}
- config_name: models
  data_files:
{models}
---
"""


def make_row(
    generator: np.random.Generator, basis: np.ndarray, num_tokens: int, model_id: str, index: int, token_start: int
) -> dict:
    """A window whose tokens lie near a low-dimensional subspace: PCA has something to find."""
    rank, token_size = basis.shape
    tokens = generator.normal(size=(num_tokens, rank)) @ basis + 0.3 * generator.normal(size=(num_tokens, token_size))
    tokens = tokens * 10 ** generator.uniform(-2, 0, size=(num_tokens, 1))
    valid = np.full(num_tokens, token_size)
    valid[-1] = generator.integers(2, token_size + 1)
    tokens[-1, valid[-1] :] = 0
    first = num_tokens // 2
    segments = [Segment(layer=2 * index, position=5, stride=1, length=first)] if first else []
    segments.append(Segment(layer=2 * index + 1, position=0, stride=3, length=num_tokens - first))
    return {
        "model_id": model_id,
        "window_index": index,
        "token_start": token_start,
        "num_tokens": num_tokens,
        "tokens": tokens.astype(np.float16).tolist(),
        "valid_entries": valid.tolist(),
        "segment_layer": [s.layer for s in segments],
        "segment_position": [s.position for s in segments],
        "segment_stride": [s.stride for s in segments],
        "segment_length": [s.length for s in segments],
    }


def write_dataset(
    folder: Path,
    lengths: dict[str, list[int]],
    token_size: int = 24,
    rank: int = 6,
    seed: int = 0,
    rows_per_file: int = 7,
    rows_per_group: int | None = None,
    edit=None,
) -> Path:
    """Writes windows of the given lengths per split, two a model, in several Parquet files, and what lies beside them.

    Args:
        rows_per_group: rows of a row group; None: a file is one.
        edit: called with each row's dict before it is written; to damage one.
    """
    generator = np.random.default_rng(seed)
    basis = generator.normal(size=(rank, token_size))
    schema = window_features(token_size).arrow_schema
    for config in ("windows", "models"):
        (folder / config).mkdir(parents=True)
    for split, split_lengths in lengths.items():
        rows = [
            make_row(generator, basis, length, f"{split}/model-{i // 2}", i % 2, (i % 2) * split_lengths[i - 1])
            for i, length in enumerate(split_lengths)
        ]
        for row in rows:
            if edit is not None:
                edit(row)
        parts = [rows[i : i + rows_per_file] for i in range(0, len(rows), rows_per_file)]
        for i, part in enumerate(parts):
            name = f"{split}-{i:05d}-of-{len(parts):05d}.parquet"
            table = pa.Table.from_pylist(part, schema=schema)
            pq.write_table(table, folder / "windows" / name, row_group_size=rows_per_group)
        models = [
            {"model_id": f"{split}/model-{i // 2}", "split": split, "num_windows": len(own), "num_tokens": sum(own)}
            for i in range(0, len(split_lengths), 2)
            for own in (split_lengths[i : i + 2],)
        ]
        table = pa.Table.from_pylist(models, schema=model_features().arrow_schema)
        pq.write_table(table, folder / "models" / f"{split}-00000-of-00001.parquet")
    files = {
        config: "\n".join(
            f"  - split: {split}\n    path: {config}/{split}-*.parquet" for split in lengths if lengths[split]
        )
        for config in ("windows", "models")
    }
    (folder / "README.md").write_text(CARD.format(**files))
    WSLFeatureExtractor(token_size=token_size).save_pretrained(folder)
    return folder


SMALL_MODEL = {
    "token_size": 24,
    "window_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "latent_size": 8,
}


def small_model_arguments(**overrides: object) -> list[str]:
    """The command line's `--model.x y` for a backbone of some thousand parameters."""
    return [word for key, value in {**SMALL_MODEL, **overrides}.items() for word in (f"--model.{key}", str(value))]


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def publishable(folder: Path) -> dict[str, Path]:
    """The files of a folder as a commit on the tests' Hub takes them."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def crop_start(seed, epoch, window, num_tokens, window_size):
    """`crop_starts` of one window."""
    return int(crop_starts(seed, epoch, np.array([window]), np.array([num_tokens]), window_size)[0])
