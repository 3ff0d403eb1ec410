"""One model: its windows into a part file, its facts into a record, or the reason why it is refused."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from modeling_wsl.checkpoint_errors import CheckpointError, NonFiniteWeightsError, shorten
from modeling_wsl.checkpoint_hub import hub_error
from modeling_wsl.checkpoints import Checkpoint, open_checkpoint
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor
from modeling_wsl.manifest import WeightManifest

from .files import replacing
from .model_facts import find_facts
from .schema import ACCEPTED, REFUSED
from .sources import ModelSource
from .tokenize_config import TokenizeConfig
from .window_rows import window_row, window_schema
from .work_folder import ModelRecord, WorkFolder


logger = logging.getLogger(__name__)
UNREACHABLE = "unreachable"  # not refused: the Hub could not be asked, so nothing is recorded
PERMANENT_HUB_ERRORS = (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, DisabledRepoError)


@dataclass(frozen=True)
class ModelTask:
    """What a worker process needs to know."""

    index: int
    source: ModelSource
    fingerprint: str
    config: TokenizeConfig
    output: Path


@dataclass(frozen=True)
class ModelOutcome:
    """What the parent process hears of it; everything else lies in the record."""

    model_id: str
    status: str
    reason: str | None = None


def feature_extractor(config: TokenizeConfig) -> WSLFeatureExtractor:
    """The feature extractor that a configuration describes."""
    return WSLFeatureExtractor(
        tokenization=config.tokenization,
        token_size=config.token_size,
        position_unit=config.position_unit,
        batch_norm_statistics=config.batch_norm_statistics,
    )


def tokenize_model(task: ModelTask) -> ModelOutcome:
    """Writes the part and the record of one model; a refused model has a record alone.

    Raises:
        OSError: the output cannot be written. What cannot be read is never raised: it is a reason for refusal.
    """
    source, work = task.source, WorkFolder(task.output)
    try:
        with replacing(work.part(task.index), work.temporary) as temporary:
            row = _write_part(task, temporary)
            with _refusing(source):
                if source.fingerprint() != task.fingerprint:
                    reason = "changed while it was read"
                    raise CheckpointError(source.location, reason, "Tokenize it when it is complete")
    except CheckpointError as error:
        if source.path is None and _is_passing(error):
            return ModelOutcome(source.model_id, UNREACHABLE, str(error))
        # Its advice is to admit such weights, which a dataset never does.
        advice = "" if isinstance(error, NonFiniteWeightsError) else f" {error.advice}."
        reason = f"{error.reason}.{advice}"
        work.write_record(task.index, ModelRecord(task.fingerprint, _refused_row(source, reason)))
        return ModelOutcome(source.model_id, REFUSED, reason)
    work.write_record(task.index, ModelRecord(task.fingerprint, row))
    return ModelOutcome(source.model_id, ACCEPTED)


@contextmanager
def _refusing(source: ModelSource) -> Iterator[None]:
    """Makes whatever goes wrong while a model is read a reason to refuse it: files from the wild break in any way."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        logger.warning("%s cannot be read", source.model_id, exc_info=True)
        reason = f"cannot be read ({type(error).__name__}: {shorten(error)})"
        raise CheckpointError(
            source.location, reason, "Look at the file, or at the log for where it happened"
        ) from error


def _is_passing(error: CheckpointError) -> bool:
    """Whether the Hub was out of reach, rather than certain that there is no such model."""
    cause = error.__cause__
    if cause is None or isinstance(cause, PERMANENT_HUB_ERRORS):
        return False
    # What the Hub's client raises has no common class; a damaged file has a cause as well, but not these words.
    return error.reason == hub_error(error.source, None, cause).reason


def _write_part(task: ModelTask, path: Path) -> dict[str, Any]:
    """Writes all windows, one record batch each, and returns the model's row."""
    source, config = task.source, task.config
    with _refusing(source):
        options = {} if source.path else {"revision": source.revision}
        checkpoint = open_checkpoint(source.location, min_parameters=config.min_parameters, **options)
        manifest = feature_extractor(config).layout(checkpoint.tensors, checkpoint.tied, checkpoint.tensor_order)
        if not manifest.num_tokens:
            reason = "holds nothing that is tokenised (batch-norm statistics and integers are not)"
            raise CheckpointError(checkpoint.source, reason, "Tokenize with batch_norm_statistics tokenize")
    with checkpoint:
        schema = window_schema(config.token_size, config.dtype)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for row in _window_rows(task, checkpoint, schema):
                writer.write_batch(row)
        with _refusing(source):
            return _accepted_row(task, checkpoint, manifest)


def _window_rows(task: ModelTask, checkpoint: Checkpoint, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    # Only what happens in here is caught: an error of the writer, which takes the rows, does not pass through.
    with _refusing(task.source):
        windows = feature_extractor(task.config).stream(checkpoint, task.config.window_size)
        for index, window in enumerate(windows):
            yield window_row(
                window,
                source=checkpoint.source,
                model_id=task.source.model_id,
                index=index,
                schema=schema,
                dtype=task.config.dtype,
            )


def _accepted_row(task: ModelTask, checkpoint: Checkpoint, manifest: WeightManifest) -> dict[str, Any]:
    facts = find_facts(task.source, checkpoint.config, checkpoint.library, checkpoint.revision)
    return {
        "model_id": task.source.model_id,
        **asdict(facts),
        "num_parameters": manifest.num_parameters,
        "num_tokens": manifest.num_tokens,
        "num_windows": -(-manifest.num_tokens // task.config.window_size),
        "padding": manifest.padding,
        "manifest": manifest.to_json(),
        "weights_sha256": checkpoint.sha256(),
        "status": ACCEPTED,
        "reason": None,
    }


def _refused_row(source: ModelSource, reason: str) -> dict[str, Any]:
    empty = {"num_parameters": 0, "num_tokens": 0, "num_windows": 0, "padding": 0.0}
    return {
        "model_id": source.model_id,
        **asdict(find_facts(source, {}, None, None)),
        **empty,
        "manifest": None,
        "weights_sha256": None,
        "status": REFUSED,
        "reason": reason,
    }
