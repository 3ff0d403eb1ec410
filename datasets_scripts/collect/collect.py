"""`hf-wsl collect`: the paper's collection of Hub models (section 2) as a tokenized dataset.

The listing is fixed first. Then each model, in its order, is examined, fetched, tokenized and let go of
(`collect_task`), by several workers or by the ranks of `collect_ranks`, until enough are accepted. At the end the
models are gone through in the order of the listing, so that neither workers nor interruptions change the result.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from datasets.utils import tqdm
from huggingface_hub import constants

from hf_wsl.errors import RunError
from hf_wsl.workers import one_thread, run_tasks

from ..assembly import AssembledModel, counts, find_groups, read_models, write_dataset
from ..card.dataset_card import Collection
from ..model_part import NOTHING_STORED
from ..schema import ACCEPTED, FORMAT_VERSION, REFUSED, REPORT_FILE, VALIDATION
from ..sources import expand_sources
from ..splits import assign_splits_by_count
from ..tokenize_config import TokenizeError
from ..work_folder import ModelRecord, WorkFolder, compare_runs, finished_run
from .config import CollectConfig
from .hub_listing import Candidate, Listing, list_candidates, named_candidates
from .task import CollectOutcome, CollectTask, collect_model, memory_folder, new_reader


logger = logging.getLogger(__name__)
LISTING_FILE = "listing.json"


@dataclass(frozen=True)
class CollectReport:
    """What a collection made.

    Attributes:
        output: the dataset's folder.
        already_complete: an earlier run had made it; nothing was written.
        outcomes: code of `outcomes.OUTCOMES` -> models; the models looked at, each once.
        counts: of the accepted ones, as in `tokenize.TokenizeReport`.
    """

    output: Path
    already_complete: bool
    outcomes: Mapping[str, int]
    counts: Mapping[str, Any]


def collect(
    output: str | PathLike,
    config: CollectConfig | None = None,
    models: Iterable[str | PathLike] = (),
) -> CollectReport:
    """Collects models of the Hub into a tokenized dataset, or goes on with a collection that was interrupted.

    Args:
        output: a new or empty folder, or that of an earlier run with the same settings.
        config: what to collect and how.
        models: Hub ids (`org/name@revision`) or lists of them, instead of the Hub's listing.

    Raises:
        TokenizeError: the output holds something else, or a run with other settings; the Hub lists nothing; no model
            at all was accepted.
        RunError: the Hub does not list models, or stopped answering; what is done is kept.
        WorkerError: a worker process died; what is done is kept.
        OSError: the output cannot be written.
    """
    config = config or CollectConfig()
    work = WorkFolder(Path(output).absolute())
    named = [str(model) for model in models]
    if report := finished_collection(work, config, named):
        return report
    listing = prepare(work, config, named)
    with work.open(run_settings(config, named), []), one_thread():
        remove_from_memory(work)  # what a run that was killed left
        _collect_models(work, listing.candidates, config)
    with one_thread():
        retry_failed(work, config, named)
    return finish(work, config, named)


def run_settings(config: CollectConfig, named: Sequence[str]) -> dict[str, Any]:
    """What decides the result: a run with other ones is another run."""
    return {**config.settings(), "models": list(named), "endpoint": constants.ENDPOINT}


def finished_collection(work: WorkFolder, config: CollectConfig, named: Sequence[str]) -> CollectReport | None:
    """The report of an earlier run that came to its end with the same settings; None if there is none.

    Raises:
        TokenizeError: the folder holds a finished dataset of other settings.
    """
    report = finished_run(work.output)
    if report is None:
        return None
    now = {"format": FORMAT_VERSION, "settings": run_settings(config, named), "models": report["models"]}
    if differences := compare_runs(report, now):
        raise TokenizeError(
            f"{work.output} holds a finished dataset that differs: {differences}. Name another folder, or delete this "
            "one to collect anew."
        )
    _remove_leftovers(work)  # of a run that was killed between its last file and this line
    logger.info("%s is complete; nothing was done", work.output)
    return CollectReport(work.output, True, report["outcomes"], report["counts"])


def prepare(work: WorkFolder, config: CollectConfig, named: Sequence[str]) -> Listing:
    """Fixes the candidates of a run, once; a run that goes on has the same ones, whatever the Hub lists by now.

    Raises:
        TokenizeError, RunError, OSError: as `collect`.
    """
    settings = run_settings(config, named)
    if is_prepared(work):
        work.check_same(settings, [])  # and no more: ranks on other machines may be at work
        return read_listing(work)
    with work.open(settings, []):
        hub = new_reader(work, config)
        listing = named_candidates(expand_sources(named), hub) if named else list_candidates(config, hub)
        logger.info("%d models are listed", listing.num_listed)
        work.write_json(work.root / LISTING_FILE, asdict(listing))
    return listing


def is_prepared(work: WorkFolder) -> bool:
    """Whether the candidates of a run are fixed."""
    return (work.root / LISTING_FILE).is_file()


def read_listing(work: WorkFolder) -> Listing:
    """The candidates that `prepare` fixed."""
    content = json.loads((work.root / LISTING_FILE).read_text(encoding="utf-8"))
    return Listing(**{**content, "candidates": [Candidate(**entry) for entry in content["candidates"]]})


class Progress:
    """How far the models are dealt with in the order of the listing, which alone tells whether there are enough.

    Args:
        work: of the run.
        candidates: number of them.
        wanted: models to accept.
    """

    def __init__(self, work: WorkFolder, candidates: int, wanted: int):
        self._work = work
        self._candidates = candidates
        self._wanted = wanted
        self._accepted: set[str] = set()  # hashes of weights: copies count once
        self.seen = 0

    def is_settled(self) -> bool:
        """Whether it is known which models the collection looks at: the first `seen` ones, which all have a record and
        include as many accepted ones as are wanted, or are all that there are.
        """
        while self.seen < self._candidates and len(self._accepted) < self._wanted:
            record = self._work.read_record(self.seen)
            if record is None:
                return False
            if record.row["status"] == ACCEPTED:
                self._accepted.add(record.row["weights_sha256"])
            self.seen += 1
        return True

    @property
    def num_accepted(self) -> int:
        return len(self._accepted)


def is_pending(record: ModelRecord | None) -> bool:
    """Whether a model is still to be dealt with: one that the network kept away is tried again."""
    return record is None or record.row["outcome"] == "network"


def _collect_models(work: WorkFolder, candidates: Sequence[Candidate], config: CollectConfig) -> None:
    """The first pass: models in the order of the listing until enough are accepted."""
    pending = [index for index in range(len(candidates)) if is_pending(work.read_record(index))]
    if done := len(candidates) - len(pending):
        logger.info("%d models were done before", done)
    progress = Progress(work, len(candidates), config.num_models)
    if not progress.is_settled():
        _run(work, candidates, config, pending, progress)


def retry_failed(work: WorkFolder, config: CollectConfig, named: Sequence[str]) -> None:
    """Tries once more what could not be fetched: the rest is done, and the fault may have passed."""
    with work.open(run_settings(config, named), []):
        candidates = read_listing(work).candidates
        progress = Progress(work, len(candidates), config.num_models)
        progress.is_settled()
        again = [index for index in range(progress.seen) if is_pending(work.read_record(index))]
        if again:
            logger.info("%d models that could not be fetched are tried again", len(again))
            _run(work, candidates, config, again, progress)


def _run(
    work: WorkFolder,
    candidates: Sequence[Candidate],
    config: CollectConfig,
    indices: Sequence[int],
    progress: Progress,
) -> None:
    """Deals with models, in order; those that are not begun when there are enough are left alone."""
    tasks = [CollectTask(index, candidates[index], config, work.output, config.num_workers) for index in indices]
    repeating = progress.is_settled()  # then all of them are wanted
    refused = received = 0
    with tqdm(total=min(config.num_models, len(candidates)), desc="Collecting", unit="model") as bar:
        for outcome in run_tasks(collect_model, tasks, config.num_workers, __name__):
            received += outcome.bytes_read
            if outcome.outcome != ACCEPTED:
                refused += 1
                logger.warning("refused %s (%s): %s", outcome.repo_id, outcome.outcome, outcome.reason)
            stop_if_unreachable(work, config, outcome)
            settled = progress.is_settled()
            bar.update(progress.num_accepted - bar.n)
            bar.set_postfix(refused=refused, received=f"{received / 1e6:.0f} MB")
            if settled and not repeating:
                break


def stop_if_unreachable(work: WorkFolder, config: CollectConfig, outcome: CollectOutcome) -> None:
    """Ends a run whose Hub is gone, which else would refuse every model for the network's sake.

    Raises:
        RunError: a model could not be fetched, and the Hub does not answer a listing either.
    """
    if outcome.outcome == "network" and not new_reader(work, config).is_answering():
        raise RunError(
            f"The Hub at {constants.ENDPOINT} stopped answering, at {outcome.repo_id}: {outcome.reason} What is done "
            "is kept: run the same command again."
        )


def finish(work: WorkFolder, config: CollectConfig, named: Sequence[str]) -> CollectReport:
    """The second pass: duplicates, splits and files, when enough models have a record.

    Raises:
        RunError: some models have none yet.
        TokenizeError: none was accepted; the folder lists all with the reasons.
    """
    settings = run_settings(config, named)
    with work.open(settings, []):
        listing = read_listing(work)
        progress = Progress(work, len(listing.candidates), config.num_models)
        if not progress.is_settled():
            missing = listing.candidates[progress.seen].repo_id
            raise RunError(f"{missing} has not been dealt with. Run the same command again, to go on.")
        models = read_models(work, range(progress.seen))
        refuse_copies(models)
        _draw_splits(models, config)
        collected = Collection(
            # of a list of models, the file's name alone
            ["hf-wsl", "collect", *(Path(name).name if Path(name).is_file() else name for name in named)],
            constants.ENDPOINT,
            listing.listed_on,
            listing.queries,
            listing.num_listed,
            len(models),
        )
        write_dataset(work, models, config, worker_module=__name__, collected=collected)
        outcomes: dict[str, int] = {}
        for model in models:
            outcomes[model.row["outcome"]] = outcomes.get(model.row["outcome"], 0) + 1
        counted = counts(models, config)
        report = {
            "format": FORMAT_VERSION,
            "counts": counted,
            "outcomes": outcomes,
            "collection": asdict(collected),
            "settings": settings,
            "models": {m.row["model_id"]: m.row["revision"] for m in models},
        }
        # The last file: with it, the dataset is complete.
        work.write_json(work.output / REPORT_FILE, report)
        _remove_leftovers(work)
    if not counted["accepted"]:
        table = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        raise TokenizeError(
            f"None of the {len(models)} models was accepted: {table}. {work.output} lists all of them with the "
            "reasons (config `models`, split `refused`). Ask for other models, into another folder."
        )
    return CollectReport(work.output, False, outcomes, counted)


def refuse_copies(models: Sequence[AssembledModel]) -> None:
    """Makes exact copies of a model before them refused ones, in the order of the listing."""
    first: dict[str, str] = {}
    for model in models:
        if not model.accepted:
            continue
        original = first.setdefault(model.row["weights_sha256"], model.row["model_id"])
        if original != model.row["model_id"]:
            model.row |= {
                **NOTHING_STORED,
                "status": REFUSED,
                "outcome": "duplicate",
                "duplicate_group": original,
                "reason": f"has the weights of {original}, bit for bit.",
            }


def _draw_splits(models: Sequence[AssembledModel], config: CollectConfig) -> None:
    items = find_groups(models)
    # With fewer models than asked for, validation gets its share of those that there are.
    validation = min(config.num_validation, len(items) * config.num_validation // config.num_models)
    drawn = assign_splits_by_count(items, split_by=config.split_by, validation_models=validation, seed=config.seed)
    for model, split in zip((m for m in models if m.accepted), drawn, strict=True):
        model.row["split"] = split
    if (given := drawn.count(VALIDATION)) < validation:
        logger.warning(
            "%d validation models instead of %d: owners and near copies tie the others together. Collect with "
            "split_by model to let owners part.",
            given,
            validation,
        )


def _remove_leftovers(work: WorkFolder) -> None:
    work.remove()
    remove_from_memory(work)


def remove_from_memory(work: WorkFolder) -> None:
    """Lets go of weight files in memory; no worker of the run may be reading them."""
    if memory := memory_folder(work.output):
        shutil.rmtree(memory, ignore_errors=True)
