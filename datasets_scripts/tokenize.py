"""`hf-wsl tokenize`: trained models to a Parquet dataset of their weights.

Two passes. First every model on its own: its windows go to a part file, its facts or the reason for its refusal to a
record (`model_task`). Then, when the hashes and owners of all are known, the splits are drawn and the parts are
assembled into Parquet files (`dataset_writer`). Both passes run in parallel and can be killed at any moment: the same
command then goes on, and ends with the same bytes as an uninterrupted run (`work_folder`).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from datasets.utils import tqdm  # tqdm.auto that heeds HF_DATASETS_DISABLE_PROGRESS_BARS and disable_progress_bars()

from modeling_wsl.checkpoint_errors import shorten

from .dataset_card import CardFacts, dataset_card
from .dataset_writer import PlannedModel, ShardTask, plan_shards, write_shard
from .model_task import UNREACHABLE, ModelTask, feature_extractor, tokenize_model
from .schema import (
    ACCEPTED,
    CARD_FILE,
    EXTRACTOR_FILE,
    FORMAT_VERSION,
    MODELS,
    REFUSED,
    REPORT_FILE,
    TRAIN,
    VALIDATION,
    WINDOWS,
)
from .sources import ModelSource, expand_sources
from .splits import SplitItem, assign_splits, duplicate_groups
from .tokenize_config import TokenizeConfig, TokenizeError
from .work_folder import WorkFolder, compare_runs, finished_run, remove_refusals
from .worker_pool import one_thread, run_tasks


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
    sources: Iterable[str | PathLike] | str | PathLike, output: str | PathLike, config: TokenizeConfig | None = None
) -> TokenizeReport:
    """Makes a dataset of the weights of models, or finishes one that was interrupted, or recognises a finished one.

    A model that cannot be read safely, or whose weights are not finite or larger than the payload's dtype holds, is
    refused: a row of `models` with the reason. It never stops the run.

    Args:
        sources: what `sources.expand_sources` takes: models, folders of models, Hub ids, lists of these.
        output: a new or empty folder, or that of an earlier run: with the same sources and settings, or one that
            refused every model, whose files are then replaced.
        config: the settings; with `num_workers` above 1, the caller's main module is imported by the workers, as
            always with multiprocessing, and must not tokenize at import.

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
    work = WorkFolder(output)
    report = finished_run(output)
    if report and not report["counts"]["accepted"]:
        logger.info("%s holds refused models only; it is made anew", output)
        remove_refusals(output)
    elif report:
        now = dict(zip((m.model_id for m in models), fingerprints, strict=True))
        _check_finished(output, report, {"format": FORMAT_VERSION, "settings": config.settings(), "models": now})
        work.remove()  # of a run that was killed between its last file and this line
        logger.info("%s is complete; nothing was done", output)
        return _report(output, report["counts"], already_complete=True)
    with work.open(config.settings(), models):
        _tokenize_models(work, models, fingerprints, config)
        planned, facts = _plan(work, models, config)
        counts = _counts(facts, config.token_size)
        _assemble(work, planned, config)
        # Not save_pretrained: it adds the library's code, which a dataset has no use for.
        work.write_text(output / EXTRACTOR_FILE, feature_extractor(config).to_json_string())
        work.write_text(output / CARD_FILE, dataset_card(facts, config))
        # The last file: with it, the dataset is complete.
        now = dict(zip((m.model_id for m in models), fingerprints, strict=True))
        report = {"format": FORMAT_VERSION, "counts": counts, "settings": config.settings(), "models": now}
        work.write_json(output / REPORT_FILE, report)
        work.remove()
    if not counts["accepted"]:
        first = "; ".join(f"{m.row['model_id']} {shorten(m.row['reason'])}" for m in facts[:3])
        raise TokenizeError(
            f"None of the {len(facts)} models can be tokenized. The first: {first}. {output} lists all of them with "
            "the reasons: config `models`, split `refused`. Run it again with other sources or settings."
        )
    return _report(output, counts, already_complete=False)


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


def _plan(
    work: WorkFolder, models: Sequence[ModelSource], config: TokenizeConfig
) -> tuple[list[PlannedModel], list[CardFacts]]:
    """Duplicates and splits, and what the card and the layout of the files need of every model."""
    rows = []
    for index in range(len(models)):
        row = dict(work.read_record(index).row)
        del row["manifest"]  # the one long column: it stays on the disk
        rows.append(row)
    accepted = [row for row in rows if row["status"] == ACCEPTED]
    items = [SplitItem(r["model_id"], r["owner"], r["weights_sha256"], r["num_tokens"]) for r in accepted]
    groups = dict(zip((i.model_id for i in items), duplicate_groups(items), strict=True))
    drawn = assign_splits(
        items, split_by=config.split_by, validation_fraction=config.validation_fraction, seed=config.seed
    )
    splits = dict(zip((i.model_id for i in items), drawn, strict=True))
    _warn_of_splits(items, drawn, config)
    planned, facts = [], []
    for index, row in enumerate(rows):
        split, group = splits.get(row["model_id"], REFUSED), groups.get(row["model_id"])
        starts = range(0, row["num_tokens"], config.window_size)
        row_bytes = tuple(min(config.window_size, row["num_tokens"] - start) * config.token_bytes for start in starts)
        planned.append(PlannedModel(index, split, row_bytes, work.record(index).stat().st_size, group))
        facts.append(CardFacts(row, split, group))
    return planned, facts


def _warn_of_splits(items: Sequence[SplitItem], drawn: Sequence[str], config: TokenizeConfig) -> None:
    nameless = sum(item.owner is None for item in items)
    if config.split_by == "owner" and nameless:
        logger.warning("%d models name no owner; each is split as if it had one of its own", nameless)
    if items and config.validation_fraction and VALIDATION not in drawn:
        logger.warning(
            "There is no validation split: all models belong together. Tokenize with split_by model to divide them."
        )


def _assemble(work: WorkFolder, planned: Sequence[PlannedModel], config: TokenizeConfig) -> None:
    """The second pass: parts and records to Parquet files."""
    work.begin_assembly(len(planned), (WINDOWS, MODELS))
    shards = plan_shards(planned, config.shard_bytes)
    tasks = [
        ShardTask(shard, tuple(planned[run.model] for run in shard.runs), config, work.output) for shard in shards
    ]
    with tqdm(total=len(tasks), desc="Assembling", unit="file") as bar:
        for _ in run_tasks(write_shard, tasks, config.num_workers, tokenize_model.__module__):
            bar.update()


def _counts(facts: Sequence[CardFacts], token_size: int) -> dict[str, Any]:
    accepted = [m for m in facts if m.row["status"] == ACCEPTED]
    totals = {key: sum(m.row[key] for m in accepted) for key in ("num_parameters", "num_tokens", "num_windows")}
    by_split = {s: sum(m.row["num_tokens"] for m in accepted if m.split == s) for s in (TRAIN, VALIDATION)}
    padding = 1 - totals["num_parameters"] / (totals["num_tokens"] * token_size) if accepted else 0.0
    refused = len(facts) - len(accepted)
    return {"accepted": len(accepted), "refused": refused, **totals, "padding": padding, "tokens_by_split": by_split}


def _report(output: Path, counts: Mapping[str, Any], *, already_complete: bool) -> TokenizeReport:
    return TokenizeReport(output, already_complete, **counts)
