"""The windows of one opened model into a part file, and its row of the config `models`."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError, NonFiniteWeightsError, NotTokenizableError, shorten
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor
from modeling_wsl.tokens.layer_normalization import LayerStatistics

from .layer_moments import merge_moments, window_moments
from .model_facts import ModelFacts
from .near_copies import fingerprint
from .outcomes import outcome_of
from .schema import ACCEPTED, REFUSED
from .tokenize_config import DatasetConfig
from .window_rows import window_row, window_schema
from .work_folder import ModelRecord


logger = logging.getLogger(__name__)
# The columns of a refused model that tell of weights, beside its manifest, which records alone have.
NOTHING_STORED = {
    "num_parameters": 0,
    "num_tokens": 0,
    "num_windows": 0,
    "padding": 0.0,
    "weights_sha256": None,
}


@dataclass(frozen=True)
class ModelPart:
    """What is known of a model whose windows are written.

    Attributes:
        columns: of the config `models`, those that follow from the weights.
        near_copy_fingerprint: see `near_copies.py`.
        layer_moments: see `layer_moments.py`; None where no layer is to be normalized.
    """

    columns: Mapping[str, Any]
    near_copy_fingerprint: Mapping[str, Any] | None
    layer_moments: Mapping[str, Sequence[float]] | None = None


def feature_extractor(
    config: DatasetConfig, layer_normalization: LayerStatistics | None = None
) -> WSLFeatureExtractor:
    """The feature extractor that a configuration describes; what layers are normalized by is known at the end only."""
    return WSLFeatureExtractor(
        tokenization=config.tokenization,
        token_size=config.token_size,
        position_unit=config.position_unit,
        batch_norm_statistics=config.batch_norm_statistics,
        layer_normalization=layer_normalization,
    )


@contextmanager
def refusing(model_id: str, location: object) -> Iterator[None]:
    """Makes whatever goes wrong while a model is read a reason to refuse it: files from the wild break in any way."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        logger.warning("%s cannot be read", model_id, exc_info=True)
        reason = f"cannot be read ({type(error).__name__}: {shorten(error)})"
        raise CheckpointError(location, reason, "Look at the file, or at the log for where it happened") from error


def write_part(checkpoint: Checkpoint, model_id: str, config: DatasetConfig, path: Path) -> ModelPart:
    """Writes all windows of a model, one record batch each, as an Arrow file, layers not yet normalized.

    Raises:
        CheckpointError: the weights cannot be read, are not finite, or do not fit the stored dtype.
        OSError: the part cannot be written.
    """
    schema = window_schema(config.token_size, config.part_dtype)
    moments: list[dict[str, list[float]]] = []
    with refusing(model_id, checkpoint.source):
        manifest = feature_extractor(config).layout(checkpoint.tensors, checkpoint.tied, checkpoint.tensor_order)
        if not manifest.num_tokens:
            reason = "holds nothing that is tokenized (batch-norm statistics and integers are not)"
            raise NotTokenizableError(checkpoint.source, reason, "Tokenize with batch_norm_statistics tokenize")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for row in _window_rows(checkpoint, model_id, config, schema, moments):
            writer.write_batch(row)
    with refusing(model_id, checkpoint.source):
        columns = {
            "num_parameters": manifest.num_parameters,
            "num_tokens": manifest.num_tokens,
            "num_windows": -(-manifest.num_tokens // config.window_size),
            "padding": manifest.padding,
            "manifest": manifest.to_json(),
            "weights_sha256": checkpoint.sha256(),
        }
        return ModelPart(columns, fingerprint(checkpoint), merge_moments(moments) if moments else None)


def _window_rows(
    checkpoint: Checkpoint,
    model_id: str,
    config: DatasetConfig,
    schema: pa.Schema,
    moments: list[dict[str, list[float]]],
) -> Iterator[pa.RecordBatch]:
    """The rows of a model; where layers are to be normalized, `moments` gets those of each window."""
    # Only what happens in here is caught: an error of the writer, which takes the rows, does not pass through.
    with refusing(model_id, checkpoint.source):
        for index, window in enumerate(feature_extractor(config).stream(checkpoint, config.window_size)):
            if config.layer_normalization:
                moments.append(window_moments(window))
            yield window_row(
                window,
                source=checkpoint.source,
                model_id=model_id,
                index=index,
                schema=schema,
                dtype=config.part_dtype,
            )


def accepted_record(source_fingerprint: str, model_id: str, facts: ModelFacts, part: ModelPart) -> ModelRecord:
    """The record of a model whose part is written."""
    status = {"status": ACCEPTED, "outcome": ACCEPTED, "reason": None}
    return ModelRecord(
        source_fingerprint,
        {"model_id": model_id, **asdict(facts), **part.columns, **status},
        part.near_copy_fingerprint,
        part.layer_moments,
    )


def refused_record(source_fingerprint: str, model_id: str, facts: ModelFacts, error: CheckpointError) -> ModelRecord:
    """The record of a model that is refused for the reason that `error` gives."""
    # The advice on such weights is to admit them, which a dataset never does.
    advice = "" if isinstance(error, NonFiniteWeightsError) else f" {error.advice}."
    return ModelRecord(
        source_fingerprint,
        {
            "model_id": model_id,
            **asdict(facts),
            **NOTHING_STORED,
            "manifest": None,
            "status": REFUSED,
            "outcome": outcome_of(error),
            "reason": f"{error.reason}.{advice}",
        },
    )
