"""Runs the arms of a comparison, each in a process that may be stopped at any time, and sums up their outcomes."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from hf_wsl.errors import one_line
from hf_wsl.run_folder import RunFolder
from hf_wsl.workers import one_thread, run_tasks
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.generation.generated_model import GeneratedModel
from modeling_wsl.generation.ranking import Ensemble

from ..finetuning.finetune_trainer import DivergedError, Measurement, finetune
from ..finetuning.tasks import IMAGE_CLASSIFICATION
from .comparison import AGREEMENT_EXAMPLES, Comparison
from .evaluate_config import ARMS, DONOR_ARMS
from .initial_weights import FROM_GENERATED, InitialWeights, Reference, initial_weights, reference_of
from .weight_comparison import compare_weights, function_agreement


logger = logging.getLogger(__name__)
MODELS = "models"  # folder of an evaluation's generated models


class Opener(Protocol):
    """Opens a comparison in whatever process works on it; hashable, so that each process opens it once."""

    def open(self) -> Comparison: ...


@dataclass(frozen=True)
class ArmTask:
    """Arms of one seed that are worked on one after the other, because they need each other's weights."""

    opener: Opener
    run: RunFolder
    arms: tuple[str, ...]
    seed: int
    keep_models: bool = False

    def name(self, arm: str) -> str:
        """Of the record of an arm."""
        return f"{slug(arm)}-{self.seed}"


def slug(arm: str) -> str:
    """An arm's name as a file name has it."""
    return arm.replace(" + ", "_plus_").replace(" ", "_")


def run_arms(
    opener: Opener,
    run: RunFolder,
    arms: Sequence[str],
    seeds: Sequence[int],
    metric: str,
    num_workers: int = 1,
    keep_models: bool = False,
) -> dict[str, Any]:
    """Runs all arms for every seed; what an earlier call finished is taken from its record.

    Args:
        opener: opens the comparison, in worker processes too.
        run: open; gets a record `<arm>-<seed>`, and `models/` where they are kept.
        arms: of `ARMS`, those that can be run.
        seeds: of the draws and of the data order; all arms of a seed see the same images in the same order.
        metric: that the summary is about.
        num_workers: processes, each on one thread; the results do not depend on their number.
        keep_models: save what the backbone generated, as its own library loads it.

    Returns:
        `arms`: arm -> `about`, `runs`, `summary`, `ensembles` where several models of a seed are kept, and `failed`
        (seed, why) where seeds diverged;
        `skipped`: arm -> why; `weights`: arm -> how far each model is from its anchor.
    """
    together = tuple(arm for arm in arms if arm in FROM_GENERATED)
    groups = [together] if together else []
    groups += [(arm,) for arm in arms if arm not in FROM_GENERATED]
    # The longest first, so that no process is left alone with them at the end.
    tasks = [ArmTask(opener, run, group, seed, keep_models) for group in groups for seed in seeds]
    missing = [task for task in tasks if not all(run.is_done(task.name(arm)) for arm in task.arms)]
    total, to_do = (sum(len(task.arms) for task in some) for some in (tasks, missing))
    hidden = not is_progress_bar_enabled()
    try:
        with tqdm(total=total, initial=total - to_do, desc="arms", unit="run", disable=hidden) as bar:
            for task in run_tasks(_run_task, missing, num_workers, preload=__name__):
                bar.set_postfix_str(task.arms[-1])
                bar.update(len(task.arms))
    finally:
        _opened.cache_clear()
    return _collect(tasks, arms, metric)


@lru_cache(maxsize=1)
def _opened(opener: Opener) -> Comparison:
    return opener.open()


def _run_task(task: ArmTask) -> ArmTask:
    """Makes the weights of the task's arms, trains and measures them, and writes an outcome for each arm."""
    comparison, run = _opened(task.opener), task.run
    saved = run.output / "weights" / f"generated-{task.seed}.safetensors"
    generated: list[InitialWeights] = []

    def draw() -> list[InitialWeights]:
        if not generated:
            generated.extend(initial_weights(comparison, "generated", task.seed, reference))
            _save_reference(run, saved, reference_of(comparison, generated[0]))
        return generated

    def reference() -> Reference:
        if not saved.is_file():
            draw()
        return _load_reference(saved)

    with one_thread():
        for arm in task.arms:
            if run.is_done(task.name(arm)):
                continue
            initial = draw() if arm == "generated" else initial_weights(comparison, arm, task.seed, reference)
            try:
                outcome = _run(comparison, task, arm, initial)
            except DivergedError as error:  # a finding about this arm, and no reason to lose the others
                logger.warning("%s, seed %d: %s", arm, task.seed, error)
                outcome = {"skipped": one_line(error)}
            run.write_record(task.name(arm), outcome)
    if task.arms[0] in FROM_GENERATED:  # another process works on the other arms of this seed
        saved.unlink(missing_ok=True)
    return task


def _run(comparison: Comparison, task: ArmTask, arm: str, initial: Sequence[InitialWeights]) -> dict[str, Any]:
    """The outcome of an arm and seed."""
    if not initial:
        return {"skipped": "generation took nothing from the anchor untouched"}
    runs, weights, modules = [], [], []
    for number, start in enumerate(initial):
        module = comparison.module(start.state)
        if start.anchor is not None and arm != "anchor":
            weights.append({"seed": task.seed, "model": number, **_distance(comparison, start, module, task.seed)})
        if task.keep_models and start.model is not None:
            _save_model(start.model, task.run.output / MODELS / f"{task.name(arm)}-{number}")
        if comparison.protocol.finetune is None:
            history = [Measurement(0, 0.0, 0, None, comparison.measure_validation(module))]
        else:
            config = replace(comparison.protocol.finetune, seed=task.seed)
            if "learning_rate" in start.facts:
                config = replace(config, learning_rate=start.facts["learning_rate"])
            data = comparison.splits.train, comparison.validation_examples
            history = finetune(module, *data, config, progress=False, task=comparison.task)
        test = comparison.measure_test(module)
        runs.append(
            {
                "seed": task.seed,
                "model": number,
                "anchor": start.anchor,
                **start.facts,
                "history": [asdict(point) for point in history],
                "test": test,
            }
        )
        if comparison.protocol.finetune is None and comparison.task.name == IMAGE_CLASSIFICATION.name:
            modules.append(module)
    outcome = {"runs": runs, "weights": weights}
    if len(modules) > 1:
        outcome["ensemble"] = {"seed": task.seed, "test": comparison.measure_test(Ensemble(modules))}
    return outcome


def _save_model(model: GeneratedModel, folder: Path) -> None:
    """Saves a generated model and makes sure that every bit of it is there."""
    model.save_pretrained(folder)
    with open_checkpoint(folder, allow_nonfinite=True) as saved:
        for name in model.target.tensors:
            if not torch.allclose(saved.read(name), model.state_dict[name], rtol=0, atol=0, equal_nan=True):
                raise RuntimeError(f"{folder}: tensor {name} is not what was saved. Is the disk full?")


def _distance(comparison: Comparison, start: InitialWeights, module: torch.nn.Module, seed: int) -> dict[str, Any]:
    anchor = comparison.anchor(start.anchor, seed)
    agreement = {}
    if not comparison.has_new_head:  # else both answer at random
        data = comparison.validation_examples, comparison.task
        agreement = function_agreement(module, comparison.module(anchor), *data, AGREEMENT_EXAMPLES)
    compared = compare_weights(module, start.state, anchor, comparison.sampled)
    return {"anchor": start.anchor, **compared, "agreement": agreement}


def _save_reference(run: RunFolder, path: Path, reference: Reference) -> None:
    facts = {"anchor": str(reference.anchor), "origins": json.dumps(reference.origins)}
    with run.replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in reference.state.items()}, temporary, metadata=facts)


def _load_reference(path: Path) -> Reference:
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return Reference(state, int(facts["anchor"]), json.loads(facts["origins"]))


def _collect(tasks: Sequence[ArmTask], arms: Sequence[str], metric: str) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}
    skipped, weights = {}, {}
    for arm in (arm for arm in {**ARMS, **DONOR_ARMS} if arm in arms):
        outcomes = {task.seed: task.run.read_record(task.name(arm)) for task in tasks if arm in task.arms}
        done = [outcome for outcome in outcomes.values() if "runs" in outcome]
        failed = [{"seed": seed, "why": o["skipped"]} for seed, o in outcomes.items() if "skipped" in o]
        if not done:
            skipped[arm] = failed[0]["why"]
            continue
        runs = [run for outcome in done for run in outcome["runs"]]
        results[arm] = {"about": {**DONOR_ARMS, **ARMS}[arm], "runs": runs, "summary": summarize(runs, metric)}
        if ensembles := [outcome["ensemble"] for outcome in done if "ensemble" in outcome]:
            results[arm]["ensembles"] = ensembles
        if failed:
            results[arm]["failed"] = failed
        if distances := [entry for outcome in done for entry in outcome["weights"]]:
            weights[arm] = distances
    return {"arms": results, "skipped": skipped, "weights": weights}


def summarize(runs: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Mean and sample standard deviation over runs (None for a single one) of a metric and of all others.

    Returns:
        `by_epoch`: for every measurement `step`, `epoch`, `examples`, `mean`, `std` of `metric` and `metrics`: name ->
        mean and std; `test`: the same at the end.
    """
    by_epoch = [
        {**{key: points[0][key] for key in ("step", "epoch", "examples")}, **_statistics(points, "metrics", metric)}
        for points in zip(*(run["history"] for run in runs), strict=True)
    ]
    return {"by_epoch": by_epoch, "test": _statistics(runs, "test", metric)}


def _statistics(records: Sequence[dict[str, Any]], key: str, metric: str) -> dict[str, Any]:
    metrics = {}
    for name in records[0][key]:
        values = [record[key][name] for record in records]
        metrics[name] = {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}
    return {**metrics[metric], "metrics": metrics}
