"""`hf-wsl tokenize`: trained models to a Parquet dataset of their weights.

Two passes. First every model on its own: its windows go to a part file, its facts or the reason for its refusal to a
record (`model_task`). Then, when the hashes and owners of all are known, the splits are drawn and the parts are
assembled into Parquet files (`assembly`). Both passes run in parallel and can be killed at any moment: the same
command then goes on, and ends with the same bytes as an uninterrupted run (`work_folder`).
"""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path

import pyarrow as pa

from .assembly import AssembledModel, DatasetReport, dataset_report, draw_splits, finish_dataset, read_models
from .model_task import ModelTask, deal_with
from .schema import PROPERTIES, VALIDATION
from .sources import ModelSource, expand_sources
from .splits import assign_splits, check_properties, given_splits, properties_digest
from .tokenize_config import TokenizeConfig, TokenizeError
from .work_folder import WorkFolder, run_settings


logger = logging.getLogger(__name__)


def tokenize(
    sources: Iterable[str | PathLike] | str | PathLike,
    output: str | PathLike,
    config: TokenizeConfig | None = None,
    *,
    properties: pa.Table | None = None,
    overwrite: bool = False,
) -> DatasetReport:
    """Makes a dataset of the weights of models, or finishes one that was interrupted, or recognizes a finished one.

    A model that cannot be read safely, or whose weights are not finite or larger than the payload's dtype holds, is
    refused: a row of `models` with the reason. It never stops the run.

    Args:
        sources: as for `sources.expand_sources`: models, folders of models, Hub ids, lists of these.
        output: a new or empty folder, or that of an earlier run: with the same sources and settings, or one that
            refused every model, whose files are then replaced.
        config: the settings; with `num_workers` above 1, the caller's main module is imported by the workers, as
            always with multiprocessing, and must not tokenize at import.
        properties: what is known of every model, a row each, with `model_id` and the `split` that it is to be in
            ("train", "validation" or "test"); becomes the config `properties`. None: splits are drawn.
        overwrite: delete the dataset that is there, finished or not, and begin anew.

    Raises:
        TokenizeError: sources that name nothing, every model refused (the split `refused` of the config `models` then
            has the reasons), or models on the Hub that could not be reached (the others are done; run it again).
        RunFolderError: an output that holds something else or was made with other settings or from models that changed
            since.
        WorkerError: a worker process died; what is done is kept.
        OSError: the output cannot be written.
    """
    config = config or TokenizeConfig()
    work = WorkFolder(Path(output).absolute())
    models = expand_sources([sources] if isinstance(sources, str | PathLike) else sources)
    fingerprints = {model.model_id: model.fingerprint() for model in models}
    settings = config.settings()
    if properties is not None:
        check_properties(properties, list(fingerprints))
        settings[PROPERTIES] = properties_digest(properties)
    belonging = run_settings(settings, list(fingerprints))
    if not overwrite and (report := work.finished(belonging, fingerprints)):
        return dataset_report(work.output, report, already_complete=True)
    with work.open(belonging, overwrite=overwrite):
        _tokenize_models(work, models, list(fingerprints.values()), config)
        assembled = read_models(work, range(len(models)))
        _draw_splits(assembled, config, properties)
        return finish_dataset(work, assembled, config, settings, properties=properties)


def _tokenize_models(
    work: WorkFolder, models: Sequence[ModelSource], fingerprints: Sequence[str], config: TokenizeConfig
) -> None:
    """The first pass: every model that has no record of its present state."""
    tasks = [ModelTask(i, models[i], fingerprints[i], config, work.output) for i in work.pending(fingerprints)]
    outcomes = deal_with(tasks, config.num_workers, "Tokenizing", len(models), len(models) - len(tasks))
    unreachable = [outcome for outcome in outcomes if outcome.outcome == "network"]
    if unreachable:
        first = f"{unreachable[0].model_id}: {unreachable[0].reason}"
        raise TokenizeError(
            f"{len(unreachable)} models could not be fetched, the first, {first} The others are done: run the same "
            "command again."
        )


def _draw_splits(models: Sequence[AssembledModel], config: TokenizeConfig, properties: pa.Table | None) -> None:
    """Writes groups and splits into the rows of the accepted models; splits are those of the properties, if any."""
    if properties is not None:
        draw_splits(models, partial(given_splits, properties=properties))
        return
    options = {"validation_fraction": config.validation_fraction, "seed": config.seed}
    drawn = draw_splits(models, partial(assign_splits, split_by=config.split_by, **options))
    nameless = sum(model.accepted and model.row["owner"] is None for model in models)
    if config.split_by == "owner" and nameless:
        logger.warning("%d models name no owner; each is split as if it had one of its own", nameless)
    if drawn and config.validation_fraction and VALIDATION not in drawn:
        logger.warning(
            "There is no validation split: all models belong together. Tokenize with split_by model to divide them."
        )
