"""One window of tokens to one Arrow row: no copy but the conversion of the weights to the stored dtype.

Where layers are normalized (`modeling_wsl/tokens/layer_normalization.py`), each model has the moments of its layers:
layer name -> [count, mean, sum of squared deviations], in float64, gathered window by window. Those of the training
models, merged, give what the rows are normalized with at the end.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers.feature_extraction_utils import BatchFeature

from modeling_wsl.tokens.layer_normalization import LayerStatistics, normalize_layers_
from modeling_wsl.tokens.manifest import Segment, WeightManifest

from .outcomes import RefusedModel
from .schema import window_features


# From here on rounding to the nearest gives infinity: half a step above the largest number.
OVERFLOW = {"float16": 65520.0, "float32": 3.4028235677973366e38}
# Each row names its model, so that readers can skip row groups by it; the rest of a row is not searched.
SEARCHABLE = ["model_id", "window_index", "token_start", "num_tokens"]

Moments = Mapping[str, Sequence[float]]
# Deviations below what float32 resolves at the mean are rounding: such a layer is constant.
RESOLUTION = torch.finfo(torch.float32).eps


def window_row(
    window: BatchFeature, *, source: object, model_id: str, index: int, schema: pa.Schema, dtype: str
) -> pa.RecordBatch:
    """Makes the row of the config `windows` for a window of `WSLFeatureExtractor.stream`.

    Args:
        window: tokens `[T, d_t]`, `token_start`, and the manifest of the whole model.
        source: what the tokens are from, for messages.
        model_id, index: of the row.
        schema: `window_features(...).arrow_schema`.
        dtype: of the payload, "float16" or "float32".

    Returns:
        a batch of one row.

    Raises:
        RefusedModel: a weight that is infinite in the payload's dtype; tensor and value are named.
    """
    tokens, start, manifest = window["tokens"], window["token_start"], window["manifest"]
    stop = start + len(tokens)
    if dtype == "float16":
        tokens = tokens.float()  # from float64, torch rounds by way of float32: the limit is checked where it counts
    low, high = torch.aminmax(tokens)
    limit = OVERFLOW[dtype]
    if not (math.isfinite(low) and math.isfinite(high)):  # what was not finite before was admitted as it is
        finite = torch.where(torch.isfinite(window["tokens"]), tokens, 0)
        low, high = torch.aminmax(finite)
    else:
        finite = tokens
    if max(-low.item(), high.item()) >= limit:
        at = int((finite.abs() >= limit).flatten().nonzero()[0])
        token, entry = divmod(at, manifest.token_size)
        name = tensor_at(manifest, start + token, entry)
        value = tokens[token, entry].item()
        advice = "Tokenize with dtype float32" if dtype == "float16" else "No stored dtype is wider"
        raise RefusedModel(
            source, "overflow", f"tensor {name!r} holds {value:.9g}, more than {dtype} does ({limit:.6g})", advice
        )
    payload = tokens.to(getattr(torch, dtype))  # [T, d_t]
    valid = manifest.valid_entries(start, stop).to(torch.uint16)  # [T]
    segments = manifest.segments(start, stop)
    columns = [
        pa.array([model_id]),
        pa.array([index], pa.int32()),
        pa.array([start], pa.int64()),
        pa.array([len(tokens)], pa.int32()),
        _row(pa.FixedSizeListArray.from_arrays(_flat(payload), manifest.token_size)),
        _row(_flat(valid)),
        *_segment_columns(segments, schema),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def normalized_row(
    row: pa.RecordBatch, manifest: WeightManifest, statistics: LayerStatistics, dtype: str
) -> pa.RecordBatch:
    """A row of float32 weights with its layers normalized (see `normalize_layers_`), stored as `dtype`.

    Raises:
        RefusedModel: a normalized weight that is infinite in `dtype`.
    """
    model_id, index, start = (row.column(name)[0].as_py() for name in ("model_id", "window_index", "token_start"))
    values = row.column("tokens").flatten().flatten().to_numpy(zero_copy_only=False, writable=True)
    tokens = torch.from_numpy(values).view(-1, manifest.token_size)  # [T, d_t]
    normalize_layers_(tokens, manifest, statistics, start)
    window = BatchFeature({"tokens": tokens, "token_start": start, "manifest": manifest})
    schema = window_schema(manifest.token_size, dtype)
    return window_row(window, source=model_id, model_id=model_id, index=index, schema=schema, dtype=dtype)


def tensor_at(manifest: WeightManifest, token: int, entry: int) -> str:
    """The name of the tensor that entry `entry` of token `token` belongs to; the entry holds a weight."""
    block = manifest.blocks_between(token, token + 1)[0]
    column = (token - block.first_token) % block.row_tokens * manifest.token_size + entry
    for spec in block.tensors:
        width = spec.numel // block.rows
        if column < width:
            return spec.name
        column -= width
    raise IndexError(f"Entry {entry} of token {token} is padding.")


@cache
def window_schema(token_size: int, dtype: str) -> pa.Schema:
    """The Arrow schema of the config `windows`, with the features in its metadata, where `datasets` looks for them."""
    return window_features(token_size, dtype).arrow_schema


def windows_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of rows of the config `windows`."""
    return pq.ParquetWriter(
        path,
        schema,
        # Real weights in float16 shrink to 0.87; plain Parquet is written only a tenth faster, for the time goes into
        # the nesting of the lists. Byte planes would give 0.81, but not every reader knows them for float16.
        compression="zstd",
        compression_level=1,
        use_dictionary=["model_id"],
        write_statistics=SEARCHABLE,
        write_page_checksum=True,  # all that tells a wrong byte to whom streams them
    )


def _flat(tensor: torch.Tensor) -> pa.Array:
    """A contiguous tensor as an Arrow array of the same memory."""
    values = tensor.numpy().reshape(-1)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _row(values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _segment_columns(segments: Sequence[Segment], schema: pa.Schema) -> list[pa.Array]:
    fields: dict[str, list[Any]] = {
        "segment_layer": [s.layer for s in segments],
        "segment_position": [s.position for s in segments],
        "segment_stride": [s.stride for s in segments],
        "segment_length": [s.length for s in segments],
    }
    return [_row(pa.array(values, schema.field(name).type.value_type)) for name, values in fields.items()]


def window_moments(window: BatchFeature) -> dict[str, list[float]]:
    """The moments of the layers in a window of `WSLFeatureExtractor.stream`, padding left out."""
    mask, layers = window["token_mask"], window["manifest"].layers
    values = window["tokens"].double()  # [T, d_t], the padding 0
    index, layer = torch.unique(window["positions"][:, 1], return_inverse=True)
    zeros = torch.zeros(len(index), dtype=torch.float64)
    count = zeros.index_add(0, layer, mask.sum(1).double())
    mean = zeros.index_add(0, layer, values.sum(1)) / count
    deviations = (values - mean[layer, None]).square_().mul_(mask).sum(1)
    table = torch.stack([count, mean, zeros.index_add(0, layer, deviations)], dim=1).tolist()
    return {layers[i].name: row for i, row in zip(index.tolist(), table, strict=True)}


def merge_moments(parts: Iterable[Moments]) -> dict[str, list[float]]:
    """The moments of all parts together (Chan et al., 1983), layers in order of first appearance."""
    merged: dict[str, list[float]] = {}
    for part in parts:
        for name, (count, mean, squares) in part.items():
            before, its_mean, its_squares = merged.get(name, (0.0, 0.0, 0.0))
            total, step = before + count, mean - its_mean
            squares += its_squares + step * step * before * count / total
            merged[name] = [total, its_mean + step * count / total, squares]
    return merged


def layer_statistics(moments: Moments) -> dict[str, list[float]]:
    """Layer name -> [mean, standard deviation]; a layer that is constant over the zoo has 1 for its deviation."""
    statistics = {}
    for name, (count, mean, squares) in moments.items():
        std = math.sqrt(squares / count)
        statistics[name] = [mean, std if std > RESOLUTION * abs(mean) else 1.0]
    return statistics
