"""From which distance on two embeddings of a table are those of copies: measured on copies planted into it."""

import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from hf_wsl.files import write_json
from hf_wsl.options import ConfigError
from hf_wsl.options import nearest as nearest_name

from ..embedding import EmbeddingTable, embed_like
from ..sources import ModelSource
from .nearest import FeatureSpace, check_finite, nearest, nearest_of_other_groups
from .planted_copies import CAST, EXACT, NOISE, PlantedCopy, plant_copies
from .search_config import METRICS
from .weight_relations import open_source, related_groups, stated_parents


logger = logging.getLogger(__name__)
FINE_TUNE = "fine-tune"
# What rounding alone makes of the distance of two embeddings of the same weights, in standardized features.
SAME_EMBEDDING = {"cosine": 1e-10, "euclidean": 1e-4}
SLIGHT_NOISE = 0.01  # copies with at most this much noise are near duplicates


@dataclass(frozen=True)
class Calibration:
    """Distances that tell copies from strangers, for tables of one method.

    Attributes:
        made_by: metadata of the table.
        standardize, center, scale: the features that distances are of (see `FeatureSpace`).
        metrics: metric -> `exact`, `near`, `threshold` (distances up to which two models count as exact copies,
            near duplicates, copies at all), `false_positive_rate` (`held_out_rate`; None with too few
            unrelated groups), `strangers` (their number) and `kinds`: kind of copy -> `copies`, `recall`, `precision`
            (among as many copies as strangers, by the held-out rate; None where that is, or nothing was found),
            `auc`, `distances` (least, median, largest) and `found_first` (rate of copies to which no model of the
            table is nearer than the original).
        settings: what was measured: counts, seed, rates.
    """

    made_by: Mapping[str, str]
    standardize: bool
    center: list[float]
    scale: list[float]
    metrics: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]

    def space(self, metric: str) -> FeatureSpace:
        return FeatureSpace(metric, np.array(self.center), np.array(self.scale))

    def check(self, table: EmbeddingTable) -> None:
        """Raises ConfigError where the table was made by another method than this is of."""
        for name in {**self.made_by, **table.made_by}:
            if self.made_by.get(name) != table.made_by.get(name):
                raise ConfigError(
                    f"the calibration is of tables made with {name}={self.made_by.get(name)}, this one has "
                    f"{table.made_by.get(name)}. Calibrate on this table"
                )
        if len(self.center) != table.embeddings.shape[1]:
            raise ConfigError(
                f"the calibration is of embeddings of {len(self.center)} numbers, this table's have "
                f"{table.embeddings.shape[1]}. Calibrate on this table"
            )

    def write(self, path: str | PathLike) -> None:
        write_json(Path(path), asdict(self))

    @classmethod
    def read(cls, path: str | PathLike) -> "Calibration":
        """Raises ConfigError where the file is missing or none of these."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} is no calibration ({error}). `hf-wsl search --calibrate` writes one") from error


def calibrate(
    table: EmbeddingTable,
    models: Sequence[ModelSource],
    *,
    noises: Sequence[float] = (0.001, 0.01, 0.1, 0.3),
    sample: int = 100,
    max_parameters: int = 0,
    false_positive_rate: float = 0.01,
    standardize: bool = True,
    fine_tunes: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    work_dir: str | PathLike | None = None,
) -> Calibration:
    """Plants copies of models, embeds them as the table was made, and compares them with strangers.

    A stranger of a model is one that `related_groups` puts into another group. For each model its nearest stranger
    counts, as a search would find it. The threshold is the largest distance within which at most
    `false_positive_rate` of the models have a stranger. Strangers are sought among the models at hand only: a larger
    table has nearer ones, and more false positives.

    Args:
        table: made by `hf-wsl embed`.
        models: those of the table whose weights are at hand.
        noises: relative sizes of the noise on copies.
        sample: models to plant copies of, drawn by the seed.
        max_parameters: plant no copies of models with more entries; 0: of any.
        fine_tunes: (parent, child) model ids of the table, beside those that models state (`parent` of a zoo).
        seed: of the sample and of the copies.
        work_dir: folder for the copies' weights while this runs; by default that for temporary files.

    Raises:
        ConfigError: a rate or a noise out of range, or a fine-tune that the table does not hold.
        ValueError: the table holds too few of the models, only related ones, or was not made of these weights.
    """
    if not 0 <= false_positive_rate < 1:
        raise ConfigError(f"the false-positive rate is {false_positive_rate}; it lies in [0, 1)")
    if sample < 1 or not all(0 < size < math.inf for size in noises):
        raise ConfigError("the sample is at least 1 model, and the noise on copies is finite and greater than 0")
    for name in (name for pair in fine_tunes for name in pair):
        if name not in table.model_ids:
            raise ConfigError(
                f"the fine-tunes name {name}, which is no row of the table.{nearest_name(name, table.model_ids)}"
            )
    check_finite(table)
    held = [model for model in models if model.model_id in set(table.model_ids)]
    own = table.select([model.model_id for model in held])
    groups = related_groups(held) if held else []
    if len(set(groups)) < 2:
        raise ValueError(
            f"{len(held)} of the {len(models)} models are in the table, and they are of {len(set(groups))} unrelated "
            "groups (owners, zoo members). Calibration needs at least 2: name more models, and embed them."
        )
    small = [i for i, model in enumerate(held) if not max_parameters or _entries(model) <= max_parameters]
    if not small:
        raise ValueError(f"All {len(held)} models have more than {max_parameters:,} entries. Raise max_parameters.")
    if len(held) < len(table):
        logger.warning(
            "%d of the table's %d models are at hand: strangers are sought among these only", len(held), len(table)
        )
    chosen = sorted(np.random.default_rng(seed).permutation(small)[:sample].tolist())
    logger.info("planting copies of %d models among %d", len(chosen), len(held))
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        planted = plant_copies([held[i] for i in chosen], Path(folder), noises, seed)
        copies, refused = embed_like(table, [folder], models)
    planted = [copy for copy in planted if copy.model_id not in refused]
    pairs = [*fine_tunes, *((parent, child) for child, parent in stated_parents(held).items())]
    planted += [PlantedCopy(child, parent, FINE_TUNE) for parent, child in pairs]
    children = table.select(list(dict.fromkeys(child for _, child in pairs)))
    of = dict(zip([*copies.model_ids, *children.model_ids], [*copies.embeddings, *children.embeddings], strict=True))
    embeddings = np.stack([of[copy.model_id] for copy in planted])
    _check_same(table, planted, embeddings)
    metrics = {
        metric: _measure(table, own, groups, planted, embeddings, metric, standardize, false_positive_rate, seed)
        for metric in METRICS
    }
    space = FeatureSpace.of(table.embeddings, METRICS[0], standardize)
    return Calibration(
        dict(table.made_by),
        standardize,
        space.center.tolist(),
        space.scale.tolist(),
        metrics,
        {
            "models_in_table": len(table),
            "models_at_hand": len(held),
            "unrelated_groups": len(set(groups)),
            "models_copied": len(chosen),
            "max_parameters": max_parameters,
            "noises": list(noises),
            "false_positive_rate": false_positive_rate,
            "seed": seed,
        },
    )


def _entries(model: ModelSource) -> int:
    with open_source(model) as checkpoint:
        return checkpoint.num_parameters


def _check_same(table: EmbeddingTable, planted: Sequence[PlantedCopy], embeddings: np.ndarray) -> None:
    """Refuses a table whose rows are not what the models give now."""
    exact = [i for i, copy in enumerate(planted) if copy.kind == EXACT]
    rows = table.select(list(dict.fromkeys(planted[i].original for i in exact))).embeddings
    error = np.abs(embeddings[exact] - rows).max(1)
    scale = np.abs(rows).max(1) + np.abs(table.embeddings).max() * 1e-6
    if (error > 1e-2 * scale).any():
        worst = planted[exact[int((error / scale).argmax())]].original
        raise ValueError(
            f"The table's row of {worst} is not what its weights give by the same method: they changed, or the table "
            "was made with other settings than it tells. Embed the models again."
        )


def _measure(
    table: EmbeddingTable,
    own: EmbeddingTable,
    groups: Sequence[int],
    planted: Sequence[PlantedCopy],
    embeddings: np.ndarray,
    metric: str,
    standardize: bool,
    rate: float,
    seed: int,
) -> dict[str, Any]:
    space = FeatureSpace.of(table.embeddings, metric, standardize)
    features = space.features(own.embeddings)
    strangers = space.distance(nearest_of_other_groups(features, groups))
    threshold = threshold_at(strangers, rate)
    false_positives = held_out_rate(space, features, groups, rate, seed)
    row = {name: i for i, name in enumerate(table.model_ids)}
    originals = np.array([row[copy.original] for copy in planted])
    difference = space.features(embeddings) - space.features(table.embeddings)[originals]
    distances = space.distance(np.square(difference).sum(1))
    itself = np.array([row.get(copy.model_id, -1) for copy in planted])  # a fine-tune is in the table
    _, first = nearest(table, embeddings, 1, metric, standardize=standardize, exclude=itself)
    is_first = np.float32(distances) <= first[:, 0]
    kinds = np.array([copy.kind for copy in planted])
    exact = max(SAME_EMBEDDING[metric], distances[kinds == EXACT].max())
    slight = [i for i, copy in enumerate(planted) if _is_slight(copy.kind)]
    near = np.quantile(distances[slight], 0.95) if slight else exact
    return {
        "exact": min(float(exact), threshold),
        "near": min(float(max(near, exact)), threshold),
        "threshold": threshold,
        "false_positive_rate": false_positives,
        "strangers": len(strangers),
        "kinds": {
            kind: _rates(distances[kinds == kind], strangers, threshold, false_positives)
            | {"found_first": float(is_first[kinds == kind].mean())}
            for kind in dict.fromkeys(kinds.tolist())
        },
    }


def threshold_at(strangers: np.ndarray, rate: float) -> float:
    """The largest distance within which at most that share of the strangers' distances `[n]` lies."""
    allowed = int(np.floor(rate * len(strangers)))
    return float(np.nextafter(np.sort(strangers)[allowed], -np.inf))


def held_out_rate(
    space: FeatureSpace, features: np.ndarray, groups: Sequence[int], rate: float, seed: int
) -> float | None:
    """The share of models that have a stranger within a threshold which other models gave.

    The groups are drawn into two halves of about as many models (among more models strangers are nearer). The
    threshold at `rate` of each half, of its own models and their nearest strangers in it, is applied to the other
    half: two models that are near each other never count on both sides.

    Args:
        space: of the features `[n, d]`.
        groups: of the n models; strangers are of different ones.
        rate: see `threshold_at`.
        seed: of the halves.

    Returns:
        The rate over all n models; None where a half has no strangers: with fewer than four groups, or one that is
        as large as all others together.
    """
    names, group = np.unique(groups, return_inverse=True)
    models = np.bincount(group)
    drawn = np.random.default_rng(seed).permutation(len(names))
    halves: tuple[list[int], list[int]] = ([], [])
    for number in drawn[np.argsort(-models[drawn], kind="stable")]:
        min(halves, key=lambda half: models[half].sum()).append(number)
    if min(map(len, halves)) < 2:
        return None
    first, second = (
        space.distance(nearest_of_other_groups(features[members], group[members]))
        for members in (np.isin(group, half) for half in halves)
    )
    within = [first <= threshold_at(second, rate), second <= threshold_at(first, rate)]
    return float(np.concatenate(within).mean())


def _is_slight(kind: str) -> bool:
    name, _, size = kind.partition(" ")
    return kind == CAST or (name == NOISE and float(size) <= SLIGHT_NOISE)


def _rates(
    distances: np.ndarray, strangers: np.ndarray, threshold: float, false_positives: float | None
) -> dict[str, Any]:
    recall = float((distances <= threshold).mean())
    is_copy = np.repeat([1, 0], [len(distances), len(strangers)])
    known = false_positives is not None and recall + false_positives > 0
    return {
        "copies": len(distances),
        "recall": recall,
        "precision": recall / (recall + false_positives) if known else None,
        "auc": float(roc_auc_score(is_copy, -np.concatenate([distances, strangers]))),
        "distances": np.quantile(distances, [0, 0.5, 1]).tolist(),
    }
