"""One model of the Hub: examined, fetched, tokenized and let go of, or refused for a reason."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from hf_wsl.files import replacing, write_text
from modeling_wsl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError

from ..model_facts import HubFacts, ModelFacts, find_facts
from ..model_part import ModelPart, accepted_record, refused_record, refusing, write_part
from ..schema import ACCEPTED
from ..work_folder import ModelRecord, WorkFolder
from .config import CollectConfig
from .examine import Examined, check_parameters, examine, shown_to_loader
from .hub_listing import Candidate
from .hub_reader import HubReader, Pace
from .loadable import check_loadable


MEMORY_DISK = Path("/dev/shm")  # where Linux keeps files in memory; elsewhere all files go to the disk


@dataclass(frozen=True)
class CollectTask:
    """What a worker process needs to know.

    Attributes:
        index: of the candidate's part and record.
        candidate: as listed.
        config: of the collection.
        output: the dataset's folder.
        workers: how many work at once, on this and other machines that share the output.
    """

    index: int
    candidate: Candidate
    config: CollectConfig
    output: Path
    workers: int


@dataclass(frozen=True)
class CollectOutcome:
    """What the parent process hears of it; everything else lies in the record.

    Attributes:
        index, repo_id: of the candidate.
        outcome: one of `outcomes.OUTCOMES`; a copy of a model before it still counts as accepted here.
        reason: of a refusal.
        bytes_read: from the Hub.
    """

    index: int
    repo_id: str
    outcome: str
    reason: str | None
    bytes_read: int


def new_reader(work: WorkFolder, config: CollectConfig) -> HubReader:
    """A reader of the Hub that keeps pace with all others of the run."""
    return HubReader(Pace(work.root / "pace"), retries=config.retries, pause=config.retry_pause)


def collect_model(task: CollectTask) -> CollectOutcome:
    """Writes the part and the record of one model; a refused model has a record alone.

    Raises:
        OSError: the output cannot be written. What cannot be fetched or read is never raised: it is a reason.
    """
    candidate, work = task.candidate, WorkFolder(task.output)
    hub = new_reader(work, task.config)
    key = None
    with empty_folder(work.temporary / f"examined-{task.index}") as folder:
        try:
            with refusing(candidate.repo_id, candidate.repo_id):
                examined = examine(candidate, hub, task.config, folder)
            key = examined.weights_key and hashlib.sha256(examined.weights_key.encode()).hexdigest()
            record = _known_copy(task, work, examined, key) or _tokenize(task, work, hub, examined, folder)
        except CheckpointError as error:
            record = refused_record(candidate.commit, candidate.repo_id, _facts(candidate), error)
    work.write_record(task.index, record)
    if key and record.row["status"] == ACCEPTED:
        write_text(work.mark(key), str(task.index), work.temporary)
    row = record.row
    return CollectOutcome(task.index, candidate.repo_id, row["outcome"], row["reason"], hub.bytes_read)


def _facts(candidate: Candidate, examined: Examined | None = None) -> ModelFacts:
    config, library = (examined.config, examined.library) if examined else ({}, None)
    return find_facts(candidate.source, config, library, candidate.commit, HubFacts(candidate.tags, candidate.card))


def _known_copy(task: CollectTask, work: WorkFolder, examined: Examined, key: str | None) -> ModelRecord | None:
    """The record of a model whose weight files are those of a model before it, which need not be fetched again.

    It takes the other's columns, the hash of the weights among them, by which `collect` then finds the copy.
    """
    mark = work.mark(key) if key else None
    if mark is None or not mark.is_file():
        return None
    first = int(mark.read_text(encoding="utf-8"))
    if first >= task.index:  # a faster worker's: the first in order keeps its windows
        return None
    before = work.read_record(first)
    columns = ("num_parameters", "num_tokens", "num_windows", "padding", "manifest", "weights_sha256")
    part = ModelPart({name: before.row[name] for name in columns}, before.near_copy_fingerprint, before.layer_moments)
    return accepted_record(task.candidate.commit, task.candidate.repo_id, _facts(task.candidate, examined), part)


def _tokenize(task: CollectTask, work: WorkFolder, hub: HubReader, examined: Examined, folder: Path) -> ModelRecord:
    """Fetches the weights, tokenizes them into the part, and lets go of the files."""
    candidate, config = task.candidate, task.config
    with weights_folder(task, work, examined.download_bytes) as files:
        for path in folder.glob("*.json"):
            shutil.copyfile(path, files / path.name)
        for file in examined.weights:
            hub.download(candidate.repo_id, candidate.commit, file, files / file.path)
        with refusing(candidate.repo_id, candidate.repo_id):
            checkpoint = open_checkpoint(files, min_parameters=config.min_parameters)
        with checkpoint, replacing(work.part(task.index), work.temporary) as temporary:
            if not examined.checked:
                _check_pickle(task, examined, checkpoint, folder, files)
            part = write_part(checkpoint, candidate.repo_id, config, temporary)
    return accepted_record(candidate.commit, candidate.repo_id, _facts(candidate, examined), part)


def _check_pickle(task: CollectTask, examined: Examined, checkpoint: Checkpoint, folder: Path, files: Path) -> None:
    """What a safetensors file's header tells beforehand, asked of a file that had to be fetched for it."""
    source, config = task.candidate.repo_id, task.config
    check_parameters(source, checkpoint.num_parameters, config)
    if config.check == "loadable":
        shown = shown_to_loader(folder)
        for file in examined.weights:
            os.symlink(files / file.path, shown / file.path)
        check_loadable(shown, source, examined.library, examined.config, checkpoint.tensors)


@contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """A folder for the block, empty at first (a run that was killed may have left it) and removed at the end."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def weights_folder(task: CollectTask, work: WorkFolder, size: int) -> Iterator[Path]:
    """A folder with room for `size` bytes: in memory where they fit, else on the disk.

    All workers together never hold more than `max_disk`: one half is shared out among them, and a model that is larger
    than a worker's share takes the other half, one such model at a time.
    """
    config = task.config
    memory = memory_folder(work.output)
    with ExitStack() as stack:
        if size <= config.max_memory_bytes and memory is not None and shutil.disk_usage(MEMORY_DISK).free > 2 * size:
            parent = memory
        else:
            parent = work.temporary
            if size > config.max_disk_bytes // 2 // task.workers:
                stack.enter_context(FileLock(work.root / "large_model.lock"))
        yield stack.enter_context(empty_folder(parent / f"weights-{task.index}"))


def memory_folder(output: Path) -> Path | None:
    """Where the weight files of a run lie in memory; None where the system has no such place."""
    if not MEMORY_DISK.is_dir():
        return None
    return MEMORY_DISK / f"hf-wsl-{hashlib.sha256(str(output).encode()).hexdigest()[:16]}"
