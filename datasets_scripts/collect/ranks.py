"""A collection on many processes or machines: datatrove's executors run it, one rank a share of the models.

All ranks write parts and records into the same output folder (on a file system that all see), as the workers of
`collect` do, so that both give the same dataset. A rank that ended is skipped when the same command is run again; one
that was killed goes on where it was.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from hf_wsl.errors import RunError
from hf_wsl.workers import one_thread

from ..assembly import DatasetReport
from ..model_task import tokenize_model
from ..tokenize_config import TokenizeError
from ..work_folder import WorkFolder
from .collect import (
    Progress,
    belonging,
    finish,
    finished_collection,
    fix_listing,
    is_prepared,
    read_listing,
    stop_if_unreachable,
)
from .config import CollectConfig
from .task import hub_task


EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
LOOKAHEAD = 100  # models of its share that a rank may be ahead of the slowest one: what is beyond may not be needed
PATIENCE = 3600  # seconds that it waits for that one to advance


class CollectRank(PipelineStep):
    """Deals with every `world_size`-th model of the listing, until the ranks together have accepted enough.

    Args:
        output: the dataset's folder, in which the listing is fixed.
        config: of the collection.
        workers: ranks that run at once; they share `max_disk`.
    """

    name = "collect"
    type = "hf-wsl"

    def __init__(self, output: str, config: CollectConfig, workers: int):
        super().__init__()
        self.output = output
        self.config = config
        self.workers = workers

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yields nothing; raises RunError where the Hub is gone or another rank does not advance."""
        work = WorkFolder(Path(self.output))
        candidates = read_listing(work).candidates
        progress = Progress(work, len(candidates), self.config.num_models)
        pending = set(work.pending([candidate.commit for candidate in candidates]))
        work.temporary.mkdir(exist_ok=True)  # whoever listed the models, and held the folder for it, removed it
        with one_thread():
            for index in range(rank, len(candidates), world_size):
                if index not in pending:
                    continue
                _wait_for_others(progress, index, world_size)
                if progress.is_settled():
                    break
                outcome = tokenize_model(hub_task(index, candidates[index], self.config, work.output, self.workers))
                self.stat_update(outcome.outcome)
                self.stat_update("bytes", value=outcome.bytes_read)
                stop_if_unreachable(work, self.config, outcome)
        yield from data or ()


class FinishCollection(PipelineStep):
    """Tries again what failed, and makes the dataset of what all ranks collected."""

    name = "finish"
    type = "hf-wsl"

    def __init__(self, output: str, config: CollectConfig, models: Sequence[str]):
        super().__init__()
        self.output = output
        self.config = config
        self.models = list(models)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yields nothing; raises as `collect.finish`."""
        _finish(WorkFolder(Path(self.output)), self.config, self.models)
        yield from data or ()


def collect_with_ranks(
    output: str | PathLike,
    config: CollectConfig,
    models: Sequence[str] = (),
    *,
    ranks: int,
    executor: str = "local",
    options: Mapping[str, Any] | None = None,
    logs: str | PathLike | None = None,
) -> DatasetReport | None:
    """Collects as `collect.collect` does, on one of datatrove's executors.

    Args:
        output, config, models: as for `collect.collect`; all machines must see `output` under this path.
        ranks: shares of the models.
        executor: "local" (processes of this machine), "slurm" (array jobs) or "ray".
        options: further arguments of datatrove's class of that executor, such as `workers`, `local_rank_offset` and
            `local_tasks`, or `time` and `partition`.
        logs: datatrove's folder of logs and completed ranks; by default `<output>.ranks`, beside the output.

    Returns:
        the report; None where the ranks run elsewhere (Slurm), or not all on this machine: the last job, or the same
        command when all ranks have ended, makes the dataset.

    Raises:
        TokenizeError: an unknown executor or option, and as `collect.collect`.
        RunError, OSError: as `collect.collect`.
    """
    options = dict(options or {})
    if executor not in EXECUTORS:
        raise TokenizeError(f"executor={executor!r} is not known; choose one of {', '.join(EXECUTORS)}.")
    if ranks < 1:
        raise TokenizeError(f"ranks is {ranks}; it is at least 1.")
    work = WorkFolder(Path(output).absolute())
    if report := finished_collection(work, config, models):
        return report
    logs = Path(logs or f"{work.output}.ranks")
    if not is_prepared(work):
        shutil.rmtree(logs, ignore_errors=True)  # of a run whose output was deleted
    prepare(work, config, models)
    workers = options.get("workers", -1)
    step = CollectRank(str(work.output), config, ranks if workers == -1 else workers)
    runner = _executor(executor, [step], ranks, f"{logs}/collect", options)
    if executor == "slurm":
        last = FinishCollection(str(work.output), config, models)
        _executor(executor, [last], 1, f"{logs}/finish", {**options, "depends": runner}).run()
        return None
    runner.run()
    if runner.get_incomplete_ranks():
        return None
    report = _finish(work, config, models)
    shutil.rmtree(logs)
    return report


def prepare(work: WorkFolder, config: CollectConfig, models: Sequence[str]) -> None:
    """Fixes the candidates of a run, or compares the run that is there with these settings.

    Raises:
        TokenizeError, RunFolderError, RunError, OSError: as `collect.collect`.
    """
    settings = belonging(config, models)
    if is_prepared(work):
        work.check_settings(settings)  # and no more: ranks on other machines may be at work
        return
    with work.open(settings):
        fix_listing(work, config, models)


def _finish(work: WorkFolder, config: CollectConfig, models: Sequence[str]) -> DatasetReport:
    with work.open(belonging(config, models)):
        return finish(work, config, models)


def _executor(
    name: str, pipeline: list[PipelineStep], tasks: int, logs: str, options: Mapping[str, Any]
) -> PipelineExecutor:
    try:
        return EXECUTORS[name](pipeline=pipeline, tasks=tasks, logging_dir=logs, **options)
    except TypeError as error:
        raise TokenizeError(f"datatrove's {name} executor does not take these options ({error}).") from error


def _wait_for_others(progress: Progress, index: int, world_size: int) -> None:
    """Returns when the rank is not too far ahead, or there are enough models."""
    since, seen = time.monotonic(), progress.seen
    while not progress.is_settled() and index - progress.seen > LOOKAHEAD * world_size:
        if progress.seen != seen:
            since, seen = time.monotonic(), progress.seen
        elif time.monotonic() - since > PATIENCE:
            raise RunError(
                f"Rank {seen % world_size} has not advanced for {PATIENCE} s. Run it again, then the same command."
            )
        time.sleep(1)
