"""Whether embeddings find what belongs together: neighbors of public models, and copies planted among them.

    python benchmarks/search_public_models.py MODELS BACKBONE --output results/search.json

MODELS is a folder of model folders with `model.json` (`repo`, `family`, `task`). For the backbone, the same with fresh
weights, and every method without one, by both metrics: how often a model's nearest neighbor is of its repository,
family and task, beside chance; and how well planted copies are told from strangers. What the weights themselves say of
the copies stands beside it. Intervals: 95 %, repositories resampled.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, parser_of, publish

from datasets_scripts.embedding import METHODS, EmbedConfig, EmbeddingTable
from datasets_scripts.embedding.embed_models import embed_models
from datasets_scripts.near_copies import NearCopyItem, fingerprint, near_copy_groups
from datasets_scripts.search.calibration import calibrate
from datasets_scripts.search.nearest import nearest
from datasets_scripts.search.planted_copies import plant_copies
from datasets_scripts.search.search_config import METRICS
from datasets_scripts.search.weight_relations import open_source, sorted_hash, stated_parents
from datasets_scripts.sources import ModelSource, expand_sources


FACTS = {"repository": "repo", "family": "family", "task": "task"}
BOOTSTRAP = 1000
# What is compared by default; ", moments" names the pooling of its tokens.
EMBEDDINGS = (
    "backbone",
    "backbone, moments",
    "untrained",
    "untrained, moments",
    *METHODS[1:],
    *(f"{m}, moments" for m in METHODS[3:]),
)


METHODS_HELP = f"Of: {'; '.join(EMBEDDINGS)}. By default all."


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("backbone")
    parser.add_argument("--methods", nargs="+", choices=EMBEDDINGS, metavar="NAME", help=METHODS_HELP)
    parser.add_argument("--zoo", type=Path, help="Zoo made with `parents` that is searched for fine-tunes too.")
    parser.add_argument("--finetunes", nargs="*", default=[], metavar="PARENT=CHILD", help="Folders of two models.")
    parser.add_argument("--sample", type=int, default=100, help="Models to plant copies of.")
    parser.add_argument("--max-parameters", type=int, default=200_000, help="Of models that copies are planted of.")
    parser.add_argument("--noises", nargs="+", type=float, default=[0.001, 0.01, 0.1, 0.3, 1.0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    public = expand_sources([arguments.models])
    facts = {model.model_id: json.loads((model.path / "model.json").read_text()) for model in public}
    report: dict[str, Any] = {**machine(), "models": len(public), "embeddings": {}}
    with tempfile.TemporaryDirectory() as folder:
        listed, pairs = list_sources(arguments, Path(folder))
        everything = expand_sources(listed)
        options = {
            "noises": arguments.noises,
            "sample": arguments.sample,
            "max_parameters": arguments.max_parameters,
            "seed": arguments.seed,
        }
        for name in arguments.methods or EMBEDDINGS:
            method, _, pooling = name.partition(", ")
            is_backbone = method in ("backbone", "untrained")
            config = EmbedConfig(
                untrained=method == "untrained",
                pooling=pooling or "mean",
                fit_on=[str(arguments.models)] if method == "pca" else [],
                batch_size=arguments.batch_size,
                seed=arguments.seed,
            )
            table, _ = embed_models(arguments.backbone if is_backbone else method, listed, config)
            held = table.select([model.model_id for model in public])
            copies = calibrate(table, everything, fine_tunes=pairs, **options)
            report["embeddings"][name] = {
                "neighbors": {metric: neighbor_rates(held, facts, metric, arguments.seed) for metric in METRICS},
                "copies": copies.metrics,
            }
            report["copies_of"] = copies.settings
        report["weights"] = weight_verdicts(everything, origins_of(everything, facts, pairs), arguments)
    publish(report, arguments.output)


def list_sources(arguments: argparse.Namespace, folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """What is embedded, and the (parent, child) ids of fine-tunes; the models beside the public ones get ids here."""
    paths, pairs = {}, []
    for pair in arguments.finetunes:
        ends = [Path(end).absolute() for end in pair.split("=")]
        paths |= {f"finetunes/{path.name}": path for path in ends}
        pairs.append(tuple(f"finetunes/{path.name}" for path in ends))
    if arguments.zoo:
        parents = json.loads((arguments.zoo / "settings.json").read_text()).get("parents")
        for zoo in [arguments.zoo, *([Path(parents)] if parents else [])]:
            paths |= {f"{zoo.name}/{m.model_id}": m.path for m in expand_sources([zoo / "models"])}
    if not paths:
        return [str(arguments.models)], pairs
    extra = folder / "extra.json"
    extra.write_text(json.dumps([{"source": str(path), "model_id": name} for name, path in paths.items()]))
    return [str(arguments.models), str(extra)], pairs


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


def origins_of(
    models: Sequence[ModelSource], facts: dict[str, dict], pairs: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Model id -> where it is from, by what is stated alone: owner of the repository, zoo member, and of a fine-tune
    the origin of its parent. No weights are read: they are what is judged by it.
    """
    parents = {child: parent for parent, child in pairs} | stated_parents(models)
    own = {}
    for model in models:
        name = model.model_id
        stated = facts[name]["repo"].partition("/")[0] if name in facts else None
        is_checkpoint = (model.path / "properties.json").is_file()  # of a member of a zoo
        own[name] = stated or (str(model.path.parent) if is_checkpoint else name)
    origins = {}
    for name in own:
        first = name
        while first in parents:
            first = parents[first]
        origins[name] = own[first]
    return origins


def weight_verdicts(
    models: Sequence[ModelSource], origins: dict[str, str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Kind of copy -> rate found by sampled weights (`near_copy_groups`), and by hashes of sorted entries; and how
    many groups of copies hold models of several origins (`origins_of`).
    """
    limit = arguments.max_parameters
    small = []
    for model in models:
        with open_source(model) as checkpoint:
            small += [model] * (checkpoint.num_parameters <= limit)
    chosen = np.random.default_rng(arguments.seed).permutation(len(small))[: arguments.sample]
    with tempfile.TemporaryDirectory() as folder:
        planted = plant_copies([small[i] for i in sorted(chosen)], Path(folder), arguments.noises, arguments.seed)
        everything = [*models, *expand_sources([folder])]
        items, hashes = [], {}
        for model in everything:
            with open_source(model) as checkpoint:
                items.append(NearCopyItem(model.model_id, fingerprint(checkpoint)))
                hashes[model.model_id] = sorted_hash(checkpoint)
    group = {item.model_id: found for item, found in zip(items, near_copy_groups(items), strict=True)}
    origins = origins | {copy.model_id: origins[copy.original] for copy in planted}
    members: dict[str, set[str]] = {}
    for name, found in group.items():
        members.setdefault(found, set()).add(origins[name])
    kinds: dict[str, list[tuple[bool, bool]]] = {}
    for copy in planted:
        sampled = group[copy.model_id] == group[copy.original]
        same_entries = hashes[copy.model_id] == hashes[copy.original]
        kinds.setdefault(copy.kind, []).append((sampled, same_entries))
    return {
        "kinds": {
            kind: {
                "copies": len(found),
                "sampled weights": float(np.mean([sampled for sampled, _ in found])),
                "sorted entries": float(np.mean([entries for _, entries in found])),
                "either": float(np.mean([sampled or entries for sampled, entries in found])),
            }
            for kind, found in kinds.items()
        },
        "groups with strangers": sum(len(found) > 1 for found in members.values()),
        "models": len(everything),
    }


if __name__ == "__main__":
    main()
