"""`hf-wsl tokenize`: trained models to a Parquet dataset of their weights.

Two passes. First every model on its own: its windows go to a part file, its facts or the reason for its refusal to a
record (`model_task`). Then, when the hashes and owners of all are known, the splits are drawn and the parts are
assembled into Parquet files (`assembly`). Both passes run in parallel and can be killed at any moment: the same
command then goes on, and ends with the same bytes as an uninterrupted run (`work_folder`).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets.utils import tqdm  # tqdm.auto that heeds HF_DATASETS_DISABLE_PROGRESS_BARS and disable_progress_bars()

from hf_wsl.workers import one_thread, run_tasks
from modeling_wsl.checkpoints.errors import shorten

from .assembly import AssembledModel, counts, find_groups, read_models, write_dataset
from .model_properties import check_properties, give_splits, properties_digest
from .model_task import UNREACHABLE, ModelTask, tokenize_model
from .schema import FORMAT_VERSION, REFUSED, REPORT_FILE, VALIDATION
from .sources import ModelSource, expand_sources
from .splits import assign_splits
from .tokenize_config import TokenizeConfig, TokenizeError
from .work_folder import WorkFolder, compare_runs, finished_run, remove_refusals


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizeReport:
    """What a run made.

    Attributes:
        output: the dataset's folder.
        already_complete: an earlier run had made it; nothing was written.
        accepted, refused: numbers of models.
        num_parameters, num_tokens, num_windows: of the accepted ones.
        padding: share of all token entries that hold no weight.
        tokens_by_split: e.g. `{"train": 110_000, "validation": 27_000}`.
    """

    output: Path
    already_complete: bool
    accepted: int
    refused: int
    num_parameters: int
    num_tokens: int
    num_windows: int
    padding: float
    tokens_by_split: Mapping[str, int]


def tokenize(
    sources: Iterable[str | PathLike] | str | PathLike,
    output: str | PathLike,
    config: TokenizeConfig | None = None,
    *,
    properties: pa.Table | None = None,
) -> TokenizeReport:
    """Makes a dataset of the weights of models, or finishes one that was interrupted, or recognizes a finished one.

    A model that cannot be read safely, or whose weights are not finite or larger than the payload's dtype holds, is
    refused: a row of `models` with the reason. It never stops the run.

    Args:
        sources: what `sources.expand_sources` takes: models, folders of models, Hub ids, lists of these.
        output: a new or empty folder, or that of an earlier run: with the same sources and settings, or one that
            refused every model, whose files are then replaced.
        config: the settings; with `num_workers` above 1, the caller's main module is imported by the workers, as
            always with multiprocessing, and must not tokenize at import.
        properties: what is known of every model, a row each, with `model_id` and the `split` that it is to be in
            ("train", "validation" or "test"); becomes the config `properties`. None: splits are drawn.

    Raises:
        TokenizeError: sources that name nothing, an output that holds something else or was made with other settings
            or from models that changed since, every model refused (the split `refused` of the config `models` then has
            the reasons), or models on the Hub that could not be reached (the others are done; run it again).
        WorkerError: a worker process died; what is done is kept.
        OSError: the output cannot be written.
    """
    config = config or TokenizeConfig()
    output = Path(output).absolute()
    models = expand_sources([sources] if isinstance(sources, str | PathLike) else sources)
    fingerprints = [model.fingerprint() for model in models]
    settings = config.settings()
    if properties is not None:
        check_properties(properties, [model.model_id for model in models])
        settings["properties"] = properties_digest(properties)
    work = WorkFolder(output)
    report = finished_run(output)
    if report and not report["counts"]["accepted"]:
        logger.info("%s holds refused models only; it is made anew", output)
        remove_refusals(output)
    elif report:
        now = dict(zip((m.model_id for m in models), fingerprints, strict=True))
        _check_finished(output, report, {"format": FORMAT_VERSION, "settings": settings, "models": now})
        work.remove()  # of a run that was killed between its last file and this line
        logger.info("%s is complete; nothing was done", output)
        return _report(output, report["counts"], already_complete=True)
    with work.open(settings, models):
        _tokenize_models(work, models, fingerprints, config)
        assembled = read_models(work, range(len(models)))
        _draw_splits(assembled, config, properties)
        write_dataset(work, assembled, config, worker_module=tokenize_model.__module__, properties=properties)
        # The last file: with it, the dataset is complete.
        now = dict(zip((m.model_id for m in models), fingerprints, strict=True))
        counted = counts(assembled, config)
        report = {"format": FORMAT_VERSION, "counts": counted, "settings": settings, "models": now}
        work.write_json(output / REPORT_FILE, report)
        work.remove()
    if not counted["accepted"]:
        first = "; ".join(f"{m.row['model_id']} {shorten(m.row['reason'])}" for m in assembled[:3])
        raise TokenizeError(
            f"None of the {len(assembled)} models can be tokenized. The first: {first}. {output} lists all of them "
            "with the reasons: config `models`, split `refused`. Run it again with other sources or settings."
        )
    return _report(output, counted, already_complete=False)


def _check_finished(output: Path, report: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = compare_runs(report, now)
    changed = [m for m, fingerprint in now["models"].items() if report["models"].get(m, fingerprint) != fingerprint]
    if changed:
        listed = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        differences = "; ".join(filter(None, [differences, f"{len(changed)} models changed since ({listed})"]))
    if differences:
        raise TokenizeError(
            f"{output} holds a finished dataset that differs: {differences}. Name another folder, or delete this one "
            "to make it anew."
        )


def _tokenize_models(
    work: WorkFolder, models: Sequence[ModelSource], fingerprints: Sequence[str], config: TokenizeConfig
) -> None:
    """The first pass: every model that has no record of its present state."""
    tasks = []
    for index, (model, fingerprint) in enumerate(zip(models, fingerprints, strict=True)):
        record = work.read_record(index)
        if record is not None and record.fingerprint == fingerprint:
            continue
        if record is not None:
            logger.warning("%s changed since it was tokenized; it is read again", model.model_id)
            work.forget(index)
        tasks.append(ModelTask(index, model, fingerprint, config, work.output))
    if done := len(models) - len(tasks):
        logger.info("%d of %d models were done before", done, len(models))
    refused, unreachable = 0, []
    with one_thread(), tqdm(total=len(models), initial=done, desc="Tokenizing", unit="model") as bar:
        for outcome in run_tasks(tokenize_model, tasks, config.num_workers, tokenize_model.__module__):
            if outcome.status == UNREACHABLE:
                unreachable.append(outcome)
            elif outcome.status == REFUSED:
                refused += 1
                bar.set_postfix(refused=refused)
                logger.warning("refused %s: %s", outcome.model_id, outcome.reason)
            bar.update()
    if unreachable:
        raise TokenizeError(
            f"{len(unreachable)} models could not be fetched, the first: {unreachable[0].reason} The others are done: "
            "run the same command again."
        )


def _draw_splits(models: Sequence[AssembledModel], config: TokenizeConfig, properties: pa.Table | None = None) -> None:
    """Writes groups and splits into the rows of the accepted models; splits are those of the properties, if any."""
    items = find_groups(models)
    if properties is not None:
        give_splits([model.row for model in models if model.accepted], properties)
        return
    drawn = assign_splits(
        items, split_by=config.split_by, validation_fraction=config.validation_fraction, seed=config.seed
    )
    for model, split in zip((m for m in models if m.accepted), drawn, strict=True):
        model.row["split"] = split
    nameless = sum(item.owner is None for item in items)
    if config.split_by == "owner" and nameless:
        logger.warning("%d models name no owner; each is split as if it had one of its own", nameless)
    if items and config.validation_fraction and VALIDATION not in drawn:
        logger.warning(
            "There is no validation split: all models belong together. Tokenize with split_by model to divide them."
        )


def _report(output: Path, counts: Mapping[str, Any], *, already_complete: bool) -> TokenizeReport:
    return TokenizeReport(output, already_complete, **counts)
