"""One model, wherever it comes from: its windows into a part file and its row of `models`, or why it is refused."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets.utils import tqdm  # tqdm.auto that heeds HF_DATASETS_DISABLE_PROGRESS_BARS and disable_progress_bars()

from hf_wsl.workers import one_thread, run_tasks
from modeling_wsl.checkpoints.canonical import canonical_sha256
from modeling_wsl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError, NotTokenizableError, shorten
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor
from modeling_wsl.tokens.layer_normalization import LayerStatistics

from .licenses import is_redistributable
from .model_facts import HubFacts, ModelFacts, find_facts
from .near_copies import fingerprint
from .outcomes import outcome_of
from .schema import ACCEPTED, REFUSED
from .sources import ModelSource
from .tokenize_config import DatasetConfig
from .window_rows import merge_moments, window_moments, window_row, window_schema
from .work_folder import ModelRecord, WorkFolder


logger = logging.getLogger(__name__)
# The columns that follow from the weights, of a refused model.
NOTHING_STORED = {
    "num_parameters": 0,
    "num_tokens": 0,
    "num_windows": 0,
    "padding": 0.0,
    "manifest": None,
    "weights_sha256": None,
}


@dataclass(frozen=True)
class ModelOutcome:
    """A model that was dealt with, as the parent process hears of it; everything else lies in the record.

    Attributes:
        index, model_id: of the task.
        outcome: one of `outcomes.OUTCOMES`.
        reason: of a refusal.
        bytes_read: from the Hub; 0 where its client's cache was used.
    """

    index: int
    model_id: str
    outcome: str
    reason: str | None
    bytes_read: int


@dataclass(frozen=True)
class ModelTask:
    """One model to deal with, for a worker process. `collect` has a task of its own, which fetches the files.

    Attributes:
        index: of the model's part and record.
        source: where it is, and what a list of models says of it.
        fingerprint: of the source when the run began.
        config: of the run.
        output: the dataset's folder.
        hub_facts: as the Hub told them; None asks it, for a model that is there.
    """

    index: int
    source: ModelSource
    fingerprint: str
    config: DatasetConfig
    output: Path

    hub_facts: HubFacts | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the Hub, so far as this task reads them itself."""
        return 0

    def record(self, work: WorkFolder) -> ModelRecord:
        """Writes the part and returns the record of a model that is accepted.

        Raises:
            CheckpointError: the reason to refuse it.
            OSError: the part cannot be written.
        """
        options = {} if self.source.path else {"revision": self.source.revision}
        options["allow_nonfinite"] = self.config.allow_nonfinite
        with refusing(self.source):
            checkpoint = open_checkpoint(self.source.location, min_parameters=self.config.min_parameters, **options)
        with checkpoint:
            return self.tokenized(work, checkpoint)

    def tokenized(self, work: WorkFolder, checkpoint: Checkpoint) -> ModelRecord:
        """The same of a checkpoint that is open."""
        with work.replacing(work.part(self.index)) as temporary:
            stored = write_part(checkpoint, self.source, self.config, temporary)
            with refusing(self.source):
                record = self.accepted(stored, checkpoint.config, checkpoint.library, checkpoint.revision)
                self.check_unchanged()
        return record

    def check_unchanged(self) -> None:
        """Raises CheckpointError where the source is not what it was when the run began."""
        if self.source.fingerprint() != self.fingerprint:
            raise CheckpointError(self.source.location, "changed while it was read", "Tokenize it when it is complete")

    def accepted(
        self, stored: ModelRecord, config: Mapping[str, Any], library: str | None, commit: str | None
    ) -> ModelRecord:
        """The record of a model whose windows are stored.

        Args:
            stored: from `write_part`, or the record of a model of the same weight files.
            config, library, commit: as for `find_facts`.
        """
        facts = find_facts(self.source, config, library, commit, self.hub_facts)
        columns = {name: stored.row[name] for name in NOTHING_STORED}
        row = {**self._columns(facts), **columns, "status": ACCEPTED, "outcome": ACCEPTED, "reason": None}
        return replace(stored, fingerprint=self.fingerprint, row=row)

    def refused(self, error: CheckpointError) -> ModelRecord:
        """The record of a model that is refused for the reason that `error` gives."""
        outcome = outcome_of(error)
        hub_facts = HubFacts() if outcome == "network" else None  # it is not asked again
        facts = find_facts(self.source, {}, None, None, self.hub_facts or hub_facts)
        status = {"status": REFUSED, "outcome": outcome, "reason": f"{error.reason}. {error.advice}."}
        row = {**self._columns(facts), **NOTHING_STORED, **status}
        return ModelRecord(self.fingerprint, row)

    def _columns(self, facts: ModelFacts) -> dict[str, Any]:
        redistributable = is_redistributable(facts.license)
        return {"model_id": self.source.model_id, **asdict(facts), "redistributable": redistributable}


def tokenize_model(task: ModelTask) -> ModelOutcome:
    """Writes the part and the record of one model; a refused model has a record alone.

    Raises:
        OSError: the output cannot be written. What cannot be fetched or read is never raised: it is a reason.
    """
    work = WorkFolder(task.output)
    try:
        record = task.record(work)
    except CheckpointError as error:
        record = task.refused(error)
    work.write_model(task.index, record)
    row = record.row
    return ModelOutcome(task.index, row["model_id"], row["outcome"], row["reason"], task.bytes_read)


def deal_with(
    tasks: Sequence[ModelTask], num_workers: int, title: str, total: int, done: int, *, accepted_only: bool = False
) -> Iterator[ModelOutcome]:
    """Yields the outcome of each task, in the order in which they end; shows progress, and each refusal in the log.

    Args:
        tasks: dropped, if they are not begun, when the caller takes no further outcomes.
        num_workers: processes.
        title, total, done: of the progress bar.
        accepted_only: it counts accepted models.
    """
    if done:
        logger.info("%d models were done before", done)
    refused = received = 0
    preload = type(tasks[0]).__module__ if tasks else __name__
    with one_thread(), tqdm(total=total, initial=min(done, total), desc=title, unit="model") as bar:
        for outcome in run_tasks(tokenize_model, tasks, num_workers, preload):
            received += outcome.bytes_read
            if outcome.outcome != ACCEPTED:
                refused += 1
                logger.warning("refused %s (%s): %s", outcome.model_id, outcome.outcome, outcome.reason)
            bar.update(outcome.outcome == ACCEPTED or not accepted_only)
            bar.set_postfix(refused=refused, **({"received": f"{received / 1e6:.0f} MB"} if received else {}))
            yield outcome


def feature_extractor(
    config: DatasetConfig, layer_normalization: LayerStatistics | None = None
) -> WSLFeatureExtractor:
    """The feature extractor that a configuration describes; layers' statistics are known at the end only."""
    return WSLFeatureExtractor(
        tokenization=config.tokenization,
        token_size=config.token_size,
        position_unit=config.position_unit,
        batch_norm_statistics=config.batch_norm_statistics,
        layer_normalization=layer_normalization,
    )


@contextmanager
def refusing(source: ModelSource) -> Iterator[None]:
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


def write_part(checkpoint: Checkpoint, source: ModelSource, config: DatasetConfig, path: Path) -> ModelRecord:
    """Writes all windows of a model, one record batch each, as an Arrow file, layers not yet normalized.

    Returns:
        a record whose row has the columns that follow from the weights, and nothing of the source.

    Raises:
        CheckpointError: the weights cannot be read, are not finite, or do not fit the stored dtype.
        OSError: the part cannot be written.
    """
    schema = window_schema(config.token_size, config.part_dtype)
    moments: list[dict[str, list[float]]] = []
    with refusing(source):
        manifest = feature_extractor(config).layout_of(checkpoint)
        if not manifest.num_tokens:
            reason = "holds nothing that is tokenized (batch-norm statistics and integers are not)"
            raise NotTokenizableError(checkpoint.source, reason, "Tokenize with batch_norm_statistics tokenize")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for row in _window_rows(checkpoint, source, config, schema, moments):
            writer.write_batch(row)
    with refusing(source):
        columns = {
            "num_parameters": manifest.num_parameters,
            "num_tokens": manifest.num_tokens,
            "num_windows": -(-manifest.num_tokens // config.window_size),
            "padding": manifest.padding,
            "manifest": manifest.to_json(),
            "weights_sha256": checkpoint.sha256(),
        }
        told_by = fingerprint(checkpoint)
        digest = None if told_by else canonical_sha256(checkpoint)
        return ModelRecord("", columns, told_by, merge_moments(moments) if moments else None, digest)


def _window_rows(
    checkpoint: Checkpoint,
    source: ModelSource,
    config: DatasetConfig,
    schema: pa.Schema,
    moments: list[dict[str, list[float]]],
) -> Iterator[pa.RecordBatch]:
    """The rows of a model; where layers are to be normalized, `moments` gets those of each window."""
    # Only what happens in here is caught: an error of the writer, which takes the rows, does not pass through.
    with refusing(source):
        for index, window in enumerate(feature_extractor(config).stream(checkpoint, config.window_size)):
            if config.layer_normalization:
                moments.append(window_moments(window))
            yield window_row(
                window,
                source=checkpoint.source,
                model_id=source.model_id,
                index=index,
                schema=schema,
                dtype=config.part_dtype,
            )
