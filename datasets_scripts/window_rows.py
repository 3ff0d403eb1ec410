"""One window of tokens to one Arrow row: no copy but the conversion of the weights to the stored dtype."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pyarrow as pa
import torch
from transformers.feature_extraction_utils import BatchFeature

from modeling_wsl.tokens.layer_normalization import LayerStatistics, normalize_layers_
from modeling_wsl.tokens.manifest import Segment, WeightManifest

from .outcomes import RefusedModel
from .schema import window_features


# From here on rounding to the nearest gives infinity: half a step above the largest number.
OVERFLOW = {"float16": 65520.0, "float32": 3.4028235677973366e38}


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
    if max(-low.item(), high.item()) >= limit:
        at = int((tokens.abs() >= limit).flatten().nonzero()[0])
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
