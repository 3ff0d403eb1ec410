"""`hf-wsl collect`: the paper's collection of Hub models (section 2) as a tokenized dataset.

The listing is fixed first. Then each model, in its order, is examined, fetched, tokenized and let go of (`task`), by
several workers or by the ranks of `ranks`, until enough are accepted. At the end the models are gone through in the
order of the listing, so that neither workers nor interruptions change the result.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from hf_wsl.errors import RunError

from ..assembly import AssembledModel, DatasetReport, dataset_report, draw_splits, finish_dataset, read_models
from ..card.dataset_card import Collection
from ..model_task import ModelOutcome, deal_with
from ..schema import ACCEPTED, VALIDATION
from ..sources import expand_sources
from ..splits import assign_splits
from ..work_folder import WorkFolder, run_settings
from .config import CollectConfig
from .hub_listing import Candidate, Listing, list_candidates, named_candidates
from .task import hub_task, new_reader


logger = logging.getLogger(__name__)
LISTING_FILE = "listing.json"


def collect(
    output: str | PathLike,
    config: CollectConfig | None = None,
    models: Iterable[str | PathLike] = (),
    *,
    overwrite: bool = False,
) -> DatasetReport:
    """Collects models of the Hub into a tokenized dataset, or goes on with a collection that was interrupted.

    Args:
        output: a new or empty folder, or that of an earlier run with the same settings.
        config: of the collection.
        models: Hub ids (`org/name@revision`) or lists of them, instead of the Hub's listing.
        overwrite: delete the dataset that is there, finished or not, and begin anew.

    Raises:
        TokenizeError: the Hub lists nothing; no model at all was accepted.
        RunFolderError: the output holds something else, or a run with other settings.
        RunError: the Hub does not list models, or stopped answering; what is done is kept.
        WorkerError: a worker process died; what is done is kept.
        OSError: the output cannot be written.
    """
    config = config or CollectConfig()
    work = WorkFolder(Path(output).absolute())
    named = [str(model) for model in models]
    if not overwrite and (report := finished_collection(work, config, named)):
        return report
    with work.open(belonging(config, named), overwrite=overwrite):
        listing = fix_listing(work, config, named)
        _collect_models(work, listing.candidates, config)
        return finish(work, config, named)


def settings_of(config: CollectConfig, named: Sequence[str]) -> dict[str, Any]:
    """All that decides the result."""
    return {**config.settings(), "models": list(named), "endpoint": constants.ENDPOINT}


def belonging(config: CollectConfig, named: Sequence[str]) -> dict[str, Any]:
    """The settings that the output folder is claimed for."""
    return run_settings(settings_of(config, named), named)


def finished_collection(work: WorkFolder, config: CollectConfig, named: Sequence[str]) -> DatasetReport | None:
    """The report of an earlier run that came to its end with the same settings; None if there is none.

    Raises:
        RunFolderError: the folder holds a finished dataset of other settings.
    """
    report = work.finished(belonging(config, named))
    return report and dataset_report(work.output, report, already_complete=True)


def is_prepared(work: WorkFolder) -> bool:
    """Whether the candidates of a run are fixed."""
    return (work.root / LISTING_FILE).is_file()


def fix_listing(work: WorkFolder, config: CollectConfig, named: Sequence[str]) -> Listing:
    """The candidates of an open run, fixed once: one that goes on has the same, whatever the Hub lists by now."""
    if not is_prepared(work):
        hub = new_reader(work, config)
        listing = named_candidates(expand_sources(named), hub) if named else list_candidates(config, hub)
        logger.info("%d models are listed", listing.num_listed)
        work.write_json(work.root / LISTING_FILE, asdict(listing))
    return read_listing(work)


def read_listing(work: WorkFolder) -> Listing:
    """The candidates that are fixed."""
    content = json.loads((work.root / LISTING_FILE).read_text(encoding="utf-8"))
    return Listing(**{**content, "candidates": [Candidate(**entry) for entry in content["candidates"]]})


class Progress:
    """Follows the models in the order of the listing, which alone tells whether there are enough.

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
            record = self._work.read_model(self.seen)
            if record is None:
                return False
            if record.row["status"] == ACCEPTED:
                self._accepted.add(record.row["weights_sha256"])
            self.seen += 1
        return True

    @property
    def num_accepted(self) -> int:
        return len(self._accepted)


def _collect_models(work: WorkFolder, candidates: Sequence[Candidate], config: CollectConfig) -> None:
    """The first pass: models in the order of the listing until enough are accepted."""
    progress = Progress(work, len(candidates), config.num_models)
    if not progress.is_settled():
        _run(work, candidates, config, work.pending([candidate.commit for candidate in candidates]), progress)


def _run(
    work: WorkFolder,
    candidates: Sequence[Candidate],
    config: CollectConfig,
    indices: Sequence[int],
    progress: Progress,
) -> None:
    """Deals with models, in order; those that are not begun when there are enough are left alone."""
    tasks = [hub_task(index, candidates[index], config, work.output, config.num_workers) for index in indices]
    repeating = progress.is_settled()  # then all of them are wanted
    wanted = min(config.num_models, len(candidates))
    for outcome in deal_with(
        tasks, config.num_workers, "Collecting", wanted, progress.num_accepted, accepted_only=True
    ):
        stop_if_unreachable(work, config, outcome)
        if progress.is_settled() and not repeating:
            break


def stop_if_unreachable(work: WorkFolder, config: CollectConfig, outcome: ModelOutcome) -> None:
    """Ends a run whose Hub is gone, which else would refuse all models for the network's sake.

    Raises:
        RunError: a model could not be fetched, and the Hub does not answer a listing either.
    """
    if outcome.outcome == "network" and not new_reader(work, config).is_answering():
        raise RunError(
            f"The Hub at {constants.ENDPOINT} stopped answering, at {outcome.model_id}: {outcome.reason} What is done "
            "is kept: run the same command again."
        )


def finish(work: WorkFolder, config: CollectConfig, named: Sequence[str]) -> DatasetReport:
    """Tries once more what could not be fetched, as the fault may have passed; then the second pass of an open run.

    Raises:
        RunError: some models have no record yet.
        TokenizeError: none was accepted; the folder lists all with the reasons.
    """
    listing = read_listing(work)
    candidates = listing.candidates
    progress = Progress(work, len(candidates), config.num_models)
    progress.is_settled()
    if again := work.pending([candidate.commit for candidate in candidates[: progress.seen]]):
        logger.info("%d models that could not be fetched are tried again", len(again))
        _run(work, candidates, config, again, progress)
        progress = Progress(work, len(candidates), config.num_models)  # with these, fewer may be enough
    if not progress.is_settled():
        missing = candidates[progress.seen].repo_id
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
    return finish_dataset(work, models, config, settings_of(config, named), collected=collected)


def refuse_copies(models: Sequence[AssembledModel]) -> None:
    """Makes exact copies of a model before them refused ones, in the order of the listing."""
    first: dict[str, str] = {}
    for model in models:
        if not model.accepted:
            continue
        original = first.setdefault(model.row["weights_sha256"], model.row["model_id"])
        if original != model.row["model_id"]:
            model.refuse("duplicate", f"has the weights of {original}, bit for bit.")
            model.row["duplicate_group"] = original


def _draw_splits(models: Sequence[AssembledModel], config: CollectConfig) -> None:
    # With fewer models than asked for, validation gets its share of those that there are.
    accepted = sum(model.accepted for model in models)
    validation = min(config.num_validation, accepted * config.num_validation // config.num_models)
    options = {"split_by": config.split_by, "validation_models": validation, "seed": config.seed}
    drawn = draw_splits(models, partial(assign_splits, **options))
    if (given := drawn.count(VALIDATION)) < validation:
        logger.warning(
            "%d validation models instead of %d: owners and near copies tie the others together. Collect with "
            "split_by model to let owners part.",
            given,
            validation,
        )
