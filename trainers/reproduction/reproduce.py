"""`hf-wsl reproduce`: the paper's tables and figures at a scale, with every control."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from hf_wsl.options import ConfigError
from hf_wsl.workers import run_tasks

from .paper_tables import load_tables
from .plan import BACKBONE, EVALUATION, FOLDERS, MODEL, Entry, Given, Planner, Step, ordered_steps
from .results import table_result
from .scale import load_scale
from .steps import OWN_WORKERS, StepTask, check_data, is_done, run_step_task, step_config, work_folder


logger = logging.getLogger(__name__)


def reproduce(
    names: Sequence[str],
    scale: str = "small",
    given: Given | None = None,
    work_dir: str | Path = "reproduce",
    results_dir: str | Path = "results",
    num_workers: int = 1,
) -> list[Path]:
    """Runs what is missing for the tables, and writes a result of each.

    Args:
        names: of `paper_tables.NAMES`, or "all".
        scale: "paper", "small", or a YAML file as those in `tables/scales`.
        given: where the user's images, texts and models lie.
        work_dir: gets `models/`, `tokens/`, `backbones/`, `evaluations/`: a folder a step, shared by the tables. What
            has a record there is not done again; a step with other settings gets another folder.
        results_dir: gets `<table>_<scale>.json`, and `.png` for figures.
        num_workers: processes; with a GPU, 1.

    Returns:
        The JSON files.

    Raises:
        ConfigError: before any work: an unknown table or scale, data that were not given, an option that cannot be.
    """
    at_scale, work_dir = load_scale(scale), Path(work_dir).absolute()
    tables = load_tables(list(names))
    planner = Planner(at_scale, given or Given())
    entries = {table.name: planner.entries(table) for table in tables}
    planner.require_given()
    steps = ordered_steps([entry for own in entries.values() for entry in own])
    _check_options(steps, work_dir)
    missing = [step for step in steps if not is_done(step, work_dir)]
    check_data(missing)
    if missing:
        with work_folder(work_dir).open({}, ours=[*FOLDERS.values(), "cache"]):
            _run_steps(missing, len(steps), work_dir, num_workers)
    return [table_result(table, at_scale, entries[table.name], work_dir, Path(results_dir)) for table in tables]


def _run_steps(missing: Sequence[Step], total: int, work_dir: Path, num_workers: int) -> None:
    hidden = not is_progress_bar_enabled()
    with tqdm(total=total, initial=total - len(missing), desc="reproduce", unit="step", disable=hidden) as bar:
        for kind in FOLDERS:  # steps of one kind do not need each other
            tasks = [StepTask(step, work_dir, num_workers) for step in missing if step.kind == kind]
            workers = 1 if kind in OWN_WORKERS else num_workers
            for name in run_tasks(run_step_task, tasks, workers, preload=run_step_task.__module__):
                logger.info("%s %s", kind, name)
                bar.set_postfix_str(name)
                bar.update()


def parse_given(images: Sequence[str], text: Sequence[str], models: Sequence[str]) -> Given:
    """Reads `NAME=PATH` of the command line. Raises ConfigError on anything else."""
    parsed = {"images": images, "text": text, "models": models}
    for kind, values in parsed.items():
        pairs = {}
        for value in values:
            name, equals, path = value.partition("=")
            if not (name and equals and path):
                raise ConfigError(f"--{kind} takes NAME=PATH, not '{value}'")
            pairs[name] = path
        parsed[kind] = pairs
    return Given(**parsed)


def plan_lines(names: Sequence[str], scale: str, given: Given | None, work_dir: str | Path) -> list[str]:
    """The plan of `reproduce`, as lines of text; data that are missing are named.

    Raises:
        ConfigError: as `reproduce`, but for missing data.
    """
    at_scale, work_dir = load_scale(scale), Path(work_dir).absolute()
    planner = Planner(at_scale, given or Given())
    lines, all_entries = [f"scale {at_scale.name}: {at_scale.about}"], []
    for table in load_tables(list(names)):
        entries = planner.entries(table)
        all_entries += entries
        lines.append(f"{table.heading}: {table.title}")
        lines.append(f"  {_count(entries)}")
    steps = ordered_steps(all_entries)
    _check_options(steps, work_dir)
    for kind in FOLDERS:
        of_kind = [step for step in steps if step.kind == kind]
        if of_kind:
            done = sum(is_done(step, work_dir) for step in of_kind)
            runs = f", {sum(step.num_runs for step in of_kind)} runs" if kind == EVALUATION else ""
            lines.append(f"{kind}: {len(of_kind)} steps{runs}, {done} done")
            lines += [f"  {'done' if is_done(step, work_dir) else 'to do'}  {step.folder}" for step in of_kind]
    lines += [f"not given: {option} ({why})" for option, why in planner.missing.items()]
    return lines


def _count(entries: Sequence[Entry]) -> str:
    counted = {"rows": "row", "backbones": "backbone", "architectures": "architecture", "data sets": "dataset"}
    if entries and entries[0].architecture is None:
        del counted["architectures"]
    return ", ".join(f"{len(Counter(getattr(e, name) for e in entries))} {what}" for what, name in counted.items())


def _check_options(steps: Sequence[Step], work_dir: Path) -> None:
    """Builds the options of every step, so that a wrong one is met before any work."""
    used: dict[str, dict[Any, str]] = {"precision": {}, "use_cpu": {}}
    for step in steps:
        config = step_config(step, work_dir)
        if step.kind == EVALUATION:
            config = config.finetune_config
        if step.kind in (MODEL, BACKBONE, EVALUATION):
            for option in used if step.kind != BACKBONE else ("use_cpu",):  # a backbone's run has its own precision
                used[option].setdefault(getattr(config, option), step.name)
    for option, values in used.items():
        if len(values) > 1:
            named = " and ".join(f"'{value}' ({name})" for value, name in values.items())
            raise ConfigError(
                f"the scale mixes values of {option}: {named}; what its steps train is compared. Set {option} alike "
                "in `training`, `protocols` and the options of `backbones`"
            )
