"""Whether embeddings find what belongs together: neighbors of public models, and copies planted among them.

    python benchmarks/search_public_models.py MODELS --output results/search_public_models.json

MODELS is a folder of model folders with `model.json` (`repo`, `family`, `task`). For every method that needs no
backbone: how often a model's nearest neighbor is of its repository, family and task, beside chance. For the
fingerprints: the share of planted copies that the rule of `fingerprints.py` finds, of strangers that it takes for
copies, and what the weights say of the copies (`judge`). Intervals: 95 %, owners resampled.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, parser_of, publish
from planted_copies import plant_copies

from datasets_scripts.embedding import METHODS, EmbedConfig, EmbeddingTable
from datasets_scripts.embedding.embed_models import embed_models
from datasets_scripts.search.compare import STRANGERS, judge
from datasets_scripts.search.fingerprints import FingerprintSpace
from datasets_scripts.search.nearest import nearest
from datasets_scripts.search.weight_relations import open_source
from datasets_scripts.sources import ModelSource, expand_sources


FACTS = {"repository": "repo", "family": "family", "task": "task"}
UNLIKE = [method for method in METHODS if method != "statistics"]  # which takes models of one architecture only
BOOTSTRAP = 1000


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help=f"By default {', '.join(UNLIKE)}.")
    parser.add_argument("--sample", type=int, default=100, help="Models to plant copies of.")
    parser.add_argument("--max_parameters", type=int, default=200_000, help="Of models that copies are planted of.")
    parser.add_argument("--noises", nargs="+", type=float, default=[0.1, 0.3, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    public = expand_sources([arguments.models])
    facts = {model.model_id: json.loads((model.path / "model.json").read_text()) for model in public}
    report: dict[str, Any] = {**machine(), "models": len(public), "embeddings": {}}
    for method in arguments.methods or UNLIKE:
        config = EmbedConfig(fit_on=[str(arguments.models)] if method == "pca" else [], seed=arguments.seed)
        began = time.process_time()
        table, _ = embed_models(method, [arguments.models], config)
        seconds = time.process_time() - began
        rates = neighbor_rates(table, facts, "cosine", arguments.seed)
        report["embeddings"][method] = {"cpu_seconds": round(seconds, 1), "neighbors": rates}
        if table.fingerprints:
            report["strangers"] = stranger_rate(table, facts)
            report["copies"] = copies_found(arguments, table, public)
    publish(report, arguments.output)


def stranger_rate(table: EmbeddingTable, facts: dict[str, dict]) -> dict[str, Any]:
    """The share of models that the rule takes for copies of a model of another owner.

    Names of both are given, for some of them are copies in truth.
    """
    owners = [facts[name]["repo"].partition("/")[0] for name in table.model_ids]
    pairs = [(i, j, c) for i, j, c in FingerprintSpace(table).close_pairs() if owners[i] != owners[j]]
    names = table.model_ids
    return {
        "rate": len({row for i, j, _ in pairs for row in (i, j)}) / len(table),
        "pairs": [[names[i], names[j], closeness.kind] for i, j, closeness in pairs],
    }


def copies_found(arguments: Any, table: EmbeddingTable, models: Sequence[ModelSource]) -> dict[str, Any]:
    """Kind of copy -> the share that fingerprints find, and that the weights say are copies."""
    small = []
    for model in models:
        with open_source(model) as checkpoint:
            small += [model] * (checkpoint.num_parameters <= arguments.max_parameters)
    chosen = np.random.default_rng(arguments.seed).permutation(len(small))[: arguments.sample]
    originals = {small[i].model_id: small[i] for i in chosen}
    space, rows = FingerprintSpace(table), {name: i for i, name in enumerate(table.model_ids)}
    kinds: dict[str, list[tuple[bool, bool]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        planted = plant_copies(list(originals.values()), Path(folder), arguments.noises, arguments.seed)
        copies = {model.model_id: model for model in expand_sources([folder])}
        found, _ = embed_models("profile", [folder], EmbedConfig())
        near = dict(zip(found.model_ids, range(len(found)), strict=True))
        for copy in planted:
            at = near[copy.model_id]
            closeness = space.near(found, at, rows[copy.original])
            with open_source(originals[copy.original]) as first, open_source(copies[copy.model_id]) as second:
                verdict = judge(first, second, closeness).verdict
            kinds.setdefault(copy.kind, []).append((closeness.kind is not None, verdict not in STRANGERS))
    shares = {
        kind: {"copies": len(told), **dict(zip(("fingerprints", "weights"), np.mean(told, 0).tolist(), strict=True))}
        for kind, told in kinds.items()
    }
    return {"models": len(originals), "kinds": shares}


def neighbor_rates(table: EmbeddingTable, facts: dict[str, dict], metric: str, seed: int) -> dict[str, Any]:
    """Fact -> rate of models whose nearest neighbor shares it, its interval, and the rate of a random neighbor; over
    models that share it with another one. `.. elsewhere`: the nearest neighbor of another repository.
    """
    order, _ = nearest(table, table.embeddings, len(table), metric, exclude=np.arange(len(table)))
    values = {name: np.array([str(facts[m][key]) for m in table.model_ids]) for name, key in FACTS.items()}
    repository = values["repository"]
    same_repository = repository[:, None] == repository
    rates = {}
    for name, value in values.items():
        same = value[:, None] == value
        rates[name] = rate_of(order, same, ~np.eye(len(table), dtype=bool), repository, seed)
        if name != "repository":
            rates[f"{name} elsewhere"] = rate_of(order, same, ~same_repository, repository, seed)
    return rates


def rate_of(order: np.ndarray, same: np.ndarray, allowed: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, Any]:
    """The rate at which the first allowed neighbor is the same; only `models`, 0, where none can be.

    Args:
        order: int `[n, n - 1]`, rows from near to far.
        same, allowed: bool `[n, n]`.
        groups: of the n models, resampled for the interval.
    """
    rows = np.flatnonzero((same & allowed).any(1))
    if not len(rows):
        return {"models": 0}
    first = np.array([next(j for j in order[i] if allowed[i, j]) for i in rows])
    hits = same[rows, first].astype(float)
    chance = (same & allowed)[rows].sum(1) / allowed[rows].sum(1)
    names, group = np.unique(groups[rows], return_inverse=True)
    draw = np.random.default_rng(seed)
    sums, counts = np.bincount(group, hits), np.bincount(group)
    chosen = draw.integers(len(names), size=(BOOTSTRAP, len(names)))
    low, high = np.quantile(sums[chosen].sum(1) / counts[chosen].sum(1), [0.025, 0.975])
    return {
        "models": len(rows),
        "rate": float(hits.mean()),
        "interval": [float(low), float(high)],
        "chance": float(chance.mean()),
    }


if __name__ == "__main__":
    main()
