"""One model that `hf-wsl tokenize` was given: its windows into a part file, or the reason why it is refused."""

import logging
from dataclasses import dataclass
from pathlib import Path

from hf_wsl.files import replacing
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError
from modeling_wsl.checkpoints.hub import hub_error

from .collect.hub_reader import final_outcome
from .model_facts import find_facts
from .model_part import accepted_record, refused_record, refusing, write_part
from .outcomes import RefusedModel
from .schema import ACCEPTED, REFUSED
from .sources import ModelSource
from .tokenize_config import TokenizeConfig
from .work_folder import ModelRecord, WorkFolder


logger = logging.getLogger(__name__)
UNREACHABLE = "unreachable"  # not refused: the Hub could not be asked, so nothing is recorded


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


def tokenize_model(task: ModelTask) -> ModelOutcome:
    """Writes the part and the record of one model; a refused model has a record alone.

    Raises:
        OSError: the output cannot be written. What cannot be read is never raised: it is a reason for refusal.
    """
    source, work = task.source, WorkFolder(task.output)
    try:
        with replacing(work.part(task.index), work.temporary) as temporary:
            record = _write_part(task, temporary)
            with refusing(source.model_id, source.location):
                if source.fingerprint() != task.fingerprint:
                    reason = "changed while it was read"
                    raise CheckpointError(source.location, reason, "Tokenize it when it is complete")
    except CheckpointError as error:
        if source.path is None and _is_passing(error):
            return ModelOutcome(source.model_id, UNREACHABLE, str(error))
        facts = find_facts(source, {}, None, None)
        record = refused_record(task.fingerprint, source.model_id, facts, _with_outcome(error))
        work.write_record(task.index, record)
        return ModelOutcome(source.model_id, REFUSED, record.row["reason"])
    work.write_record(task.index, record)
    return ModelOutcome(source.model_id, ACCEPTED)


def _write_part(task: ModelTask, path: Path) -> ModelRecord:
    source = task.source
    with refusing(source.model_id, source.location):
        options = {} if source.path else {"revision": source.revision}
        checkpoint = open_checkpoint(source.location, min_parameters=task.config.min_parameters, **options)
    with checkpoint:
        part = write_part(checkpoint, source.model_id, task.config, path)
        with refusing(source.model_id, source.location):
            facts = find_facts(source, checkpoint.config, checkpoint.library, checkpoint.revision)
    return accepted_record(task.fingerprint, source.model_id, facts, part)


def _is_passing(error: CheckpointError) -> bool:
    """Whether the Hub was out of reach, rather than certain that there is no such model."""
    cause = error.__cause__
    if cause is None or final_outcome(cause):
        return False
    # What the Hub's client raises has no common class; a damaged file has a cause as well, but not these words.
    return error.reason == hub_error(error.source, None, cause).reason


def _with_outcome(error: CheckpointError) -> CheckpointError:
    """The same error with the outcome code that the Hub's answer stands for."""
    outcome = final_outcome(error.__cause__)
    return RefusedModel(error.source, outcome, error.reason, error.advice) if outcome else error
