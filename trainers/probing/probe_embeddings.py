"""Probes on one set of embeddings for one target, with intervals: functions of arrays alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.preprocessing import StandardScaler

from hf_wsl.workers import one_thread

from ..finetuning.metrics import accuracy_and_macro_f1, regression_scores
from .group_folds import Fold, folds_of_splits, leave_group_out_folds
from .probes import PROBES


REGRESSION, CLASSIFICATION = "regression", "classification"


@dataclass(frozen=True)
class ProbeTask:
    """A target made ready, the same for every embedding.

    Attributes:
        classes: names of the classes; empty for a regression.
        values: `[n, k]` float64: the numbers (k = 1) or one-hot classes.
        groups: `[n]`.
        folds: their test rows are all that is measured; each is in one fold.
        unseen: rows that no fold tests, for their class is not among what it trains on.
    """

    classes: list[str]
    values: np.ndarray
    groups: np.ndarray
    folds: list[Fold]
    unseen: np.ndarray

    @property
    def kind(self) -> str:
        return CLASSIFICATION if self.classes else REGRESSION

    @property
    def test(self) -> np.ndarray:
        """Rows that are measured, in the order of the folds."""
        return np.concatenate([fold.test for fold in self.folds])


def prepare_task(
    target: np.ndarray, groups: np.ndarray, splits: np.ndarray | None = None, num_folds: int = 0
) -> ProbeTask:
    """Divides the rows and encodes the target.

    Args:
        target: `[n]`: numbers are regressed, anything else (text, booleans) is classes. Without missing values.
        groups: `[n]` labels; rows of one group are never trained and tested on at once.
        splits: `[n]` of "train", "validation", "test"; None leaves each group out in turn.
        num_folds: without splits, the groups are left out in so many parts; 0: one a group.

    Raises:
        ValueError: the target does not vary, is not finite, or the groups cannot be divided so.
    """
    target, groups = np.asarray(target), np.asarray(groups)
    folds = leave_group_out_folds(groups, num_folds) if splits is None else folds_of_splits(groups, np.asarray(splits))
    if len(np.unique(target)) < 2:
        raise ValueError(f"The target is {target[0]} for all {len(target)} models: there is nothing to predict.")
    if np.issubdtype(target.dtype, np.number):
        values = target.astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"{(~np.isfinite(values)).sum()} values of the target are not finite. Leave them out.")
        return ProbeTask([], values[:, None], groups, folds, np.array([], np.int64))
    classes, codes = np.unique(target.astype(str), return_inverse=True)
    known = [np.isin(codes[fold.test], codes[fold.train]) for fold in folds]
    unseen = np.concatenate([fold.test[~seen] for fold, seen in zip(folds, known, strict=True)])
    folds = [
        Fold(fold.train, fold.choices, fold.test[seen]) for fold, seen in zip(folds, known, strict=True) if seen.any()
    ]
    if not folds:
        raise ValueError(
            f"No class of the {len(unseen)} test models occurs among the training models of other groups: classes and "
            "groups are the same. Choose another --group."
        )
    return ProbeTask(classes.tolist(), np.eye(len(classes))[codes], groups, folds, unseen)


def probe_embeddings(
    embeddings: np.ndarray,
    target: np.ndarray,
    groups: np.ndarray,
    splits: np.ndarray | None = None,
    *,
    num_folds: int = 0,
    probes: Sequence[str] = tuple(PROBES),
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Measures how well probes read a property off embeddings (paper, Table 9 and appendix D.2).

    Args:
        embeddings: float `[n, d]`, one row a model.
        target, groups, splits, num_folds: see `prepare_task`.
        probes: of "ridge" and "mlp".
        bootstrap: resamples of the test groups that intervals are made of; 0: none.
        confidence: of the intervals.
        seed: of the network and the resampling. The resamples do not depend on the embeddings.

    Returns:
        For each probe `metrics` (r2, spearman, mae; or accuracy, macro_f1; None where undefined), `intervals`
        (percentiles; None for a single group) and `hyperparameters` (a list where there are several folds).

    Raises:
        ValueError: see `prepare_task`; embeddings of another length, or not finite.
    """
    task = prepare_task(target, groups, splits, num_folds)
    return run_probes(embeddings, task, probes, bootstrap=bootstrap, confidence=confidence, seed=seed)


def run_probes(
    embeddings: np.ndarray,
    task: ProbeTask,
    probes: Sequence[str],
    *,
    bootstrap: int,
    confidence: float,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """`probe_embeddings` of a target made ready."""
    features = np.asarray(embeddings, dtype=np.float64)
    if features.shape[:1] != task.groups.shape:
        raise ValueError(f"{len(features)} embeddings do not fit {len(task.groups)} models.")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(1)).sum())
        raise ValueError(f"{bad} of {len(features)} embeddings are not finite. Leave these models out.")
    results = {}
    with one_thread():  # sums in an order that does not depend on the number of cores
        for name in probes:
            fits = [PROBES[name](features, task.values, fold, seed) for fold in task.folds]
            settings = [chosen for _, chosen in fits]
            results[name] = {
                **_measured(task, np.concatenate([predicted for predicted, _ in fits]), bootstrap, confidence, seed),
                "hyperparameters": {
                    key: settings[0][key] if len(settings) == 1 else [chosen[key] for chosen in settings]
                    for key in settings[0]
                },
            }
    return results


@dataclass(frozen=True)
class ProbeFit:
    """One set of embeddings and one target: what a worker process does, which need not import more than this file.

    Attributes:
        target, name: of the target and the embeddings.
        embeddings, task, probes, options: see `run_probes`.
    """

    target: str
    name: str
    embeddings: np.ndarray
    task: ProbeTask
    probes: Sequence[str]
    options: Mapping[str, Any]

    def run(self) -> tuple[str, str, dict[str, dict[str, Any]]]:
        try:
            results = run_probes(self.embeddings, self.task, self.probes, **self.options)
        except ValueError as error:
            raise ValueError(f"{self.name}, target '{self.target}': {error}") from error
        return self.target, self.name, results


def constant_prediction(task: ProbeTask, *, bootstrap: int, confidence: float, seed: int) -> dict[str, Any]:
    """The answer without any embedding: the mean, or the most frequent class, of each fold's training rows."""
    predicted = [np.repeat(task.values[f.train].mean(0, keepdims=True), len(f.test), 0) for f in task.folds]
    return {**_measured(task, np.concatenate(predicted), bootstrap, confidence, seed), "hyperparameters": {}}


def _measured(task: ProbeTask, predicted: np.ndarray, rounds: int, confidence: float, seed: int) -> dict[str, Any]:
    wanted = task.values[task.test]
    if task.kind == REGRESSION:
        pair, score = (predicted[:, 0], wanted[:, 0]), regression_scores
    else:
        pair, score = (predicted.argmax(1), wanted.argmax(1)), _class_scores
    metrics = score(*pair)
    return {
        "metrics": {name: _or_none(value) for name, value in metrics.items()},
        "intervals": bootstrap_intervals(score, *pair, task.groups[task.test], rounds, confidence, seed),
    }


def _class_scores(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    scores = accuracy_and_macro_f1(predictions, references)
    return {"accuracy": scores["accuracy"], "macro_f1": scores["f1"]}


def bootstrap_intervals(
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    predictions: np.ndarray,
    references: np.ndarray,
    groups: np.ndarray,
    rounds: int,
    confidence: float,
    seed: int,
) -> dict[str, list[float] | None]:
    """Percentile intervals over resamples of whole groups: checkpoints of one run are not independent.

    Args:
        score: of predictions and references.
        predictions, references, groups: `[m]`.

    Returns:
        [low, high] for each metric; None where there is one group, no round, or no round with a value.
    """
    names, codes = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(codes == code) for code in range(len(names))]
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in score(predictions, references)}
    for _ in range(rounds if len(names) > 1 else 0):
        rows = np.concatenate([members[code] for code in generator.integers(len(names), size=len(names))])
        for name, value in score(predictions[rows], references[rows]).items():
            drawn[name].append(value)
    tail = 50 * (1 - confidence)
    intervals: dict[str, list[float] | None] = {}
    for name, values in drawn.items():
        finite = np.array(values)[np.isfinite(values)] if values else np.array([])
        intervals[name] = np.percentile(finite, [tail, 100 - tail]).tolist() if len(finite) else None
    return intervals


def families_across_owners(
    owners: np.ndarray,
    families: np.ndarray,
    embeddings: Mapping[str, np.ndarray],
    *,
    bootstrap: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """How often the nearest model of another owner is of the same family, among models that have such a relative.

    Distances are L1 of z-scores, cut at 3 deviations: columns are of unlike scale, and some have far outliers.

    Args:
        owners, families: `[n]` text; "" for unknown, such models are left out.
        embeddings: name -> `[n, d]`.

    Returns:
        {} where no model has a relative; else `count` and `owners` of those that have, and `results`: embedding ->
        `metrics` and `intervals` of the `share`.
    """
    known = (owners != "") & (families != "")
    owners, families = owners[known], families[known]
    stranger = owners[:, None] != owners
    asked = (stranger & (families[:, None] == families)).any(1)
    if not asked.any():
        return {}
    results = {}
    for name, rows in embeddings.items():
        scores = StandardScaler().fit_transform(rows[known].astype(np.float64)).clip(-3, 3)
        nearest = np.where(stranger, cdist(scores, scores, "cityblock"), np.inf).argmin(1)
        hits = (families[nearest] == families)[asked].astype(float)
        resampling = (owners[asked], bootstrap, confidence, seed)
        intervals = bootstrap_intervals(lambda hit, _: {"share": float(hit.mean())}, hits, hits, *resampling)
        results[name] = {"metrics": {"share": float(hits.mean())}, "intervals": intervals}
    return {"count": int(asked.sum()), "owners": len(np.unique(owners[asked])), "results": results}


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
