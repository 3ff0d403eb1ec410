"""`hf-wsl probe`: properties of models, read off embeddings of their weights, beside every baseline."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from datasets_scripts.embedding import EmbeddingTable
from datasets_scripts.schema import SPLITS
from hf_wsl.files import write_json, write_text
from hf_wsl.workers import run_tasks

from ..pretrain import versions
from .labeled_models import LabeledModels, label_models
from .probe_config import LEAVE_GROUP_OUT, MAJORITY, MEAN, ProbeConfig
from .probe_embeddings import CLASSIFICATION, ProbeFit, constant_prediction, families_across_owners
from .probe_report import probe_page
from .probe_tables import embedding_tables, probed_sections


logger = logging.getLogger(__name__)


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Embeds models and predicts their properties (paper, Table 9).

    All embeddings are measured on the same models: those that every one of them has. Run it again with other targets
    or backbones; the tables of embeddings in `output_dir/embeddings` are kept. With `num_workers` above 1 a script
    that calls this needs the usual `if __name__ == "__main__":`.

    Returns:
        The content of `output_dir/probe.json`: `config`, `versions`, `models` (`count`, `groups`, `splits`, `left_out`
        reason -> number), `targets` (target -> `kind`, `count`, `measured`, `groups`, `left_out`, `classes`, and
        `results`: embedding -> probe -> `metrics`, `intervals`, `hyperparameters`; "mean" or "majority" -> "constant"
        for no embedding), `families` (see `families_across_owners`; {} where no owner or family is known),
        `backbones` (name -> source), `skipped` (embedding -> why), `refused` (embedding -> model -> why), `sizes`
        (embedding -> numbers), `warnings`.

    Raises:
        ConfigError: an option that cannot be.
        ValueError: models, properties, backbones or tables that cannot be read or do not fit each other.
    """
    folder = Path(config.output_dir)
    labeled = label_models(config)
    for target in config.target:
        labeled.task(target, config.folds)  # what cannot be predicted is refused before hours of embedding
    tables, skipped, refused = embedding_tables(config, labeled, folder / "embeddings")
    rows, missing = _common_rows(labeled, tables)
    chosen: dict[str, np.ndarray] = {}
    for name, table in tables.items():
        chosen |= probed_sections(name, table.select(labeled.properties.index[rows]))
    options = {"bootstrap": config.bootstrap, "confidence": config.confidence, "seed": config.seed}
    targets: dict[str, dict[str, Any]] = {}
    fits = []
    for target in config.target:
        task, kept = labeled.task(target, config.folds, rows)
        constant = MAJORITY if task.kind == CLASSIFICATION else MEAN
        left_out = {"no value": len(rows) - len(kept), "class not in training": len(task.unseen)}
        targets[target] = {
            "kind": task.kind,
            "count": len(kept),
            "measured": len(task.test),
            "groups": len(np.unique(task.groups[task.test])),
            "classes": task.classes,
            "left_out": {reason: count for reason, count in left_out.items() if count},
            "results": {constant: {"constant": constant_prediction(task, **options)}, **dict.fromkeys(chosen)},
        }
        inside = np.isin(rows, kept)
        fits += [ProbeFit(target, name, part[inside], task, config.probes, options) for name, part in chosen.items()]
    done = run_tasks(ProbeFit.run, fits, config.num_workers, "trainers.probing.probe_embeddings")
    hidden = not is_progress_bar_enabled()
    for target, name, probes in tqdm(done, total=len(fits), desc="Probing", unit="probe", disable=hidden):
        targets[target]["results"][name] = probes
    results = {
        "config": asdict(config),
        "versions": {**versions(), "scikit-learn": sklearn.__version__},
        "models": {
            "count": len(rows),
            "groups": len(np.unique(labeled.groups[rows])),
            "splits": _split_counts(labeled, rows),
            "left_out": {**labeled.left_out, **missing},
        },
        "targets": targets,
        "families": families_across_owners(*labeled.owners_and_families(rows), chosen, **options),
        "backbones": config.named_backbones,
        "skipped": skipped,
        "refused": {name: why for name, why in refused.items() if why},
        "sizes": {name: part.shape[1] for name, part in chosen.items()},
        "warnings": _warnings(chosen, labeled.groups[rows]),
    }
    for warning in results["warnings"]:
        logger.warning("%s", warning)
    write_json(folder / "probe.json", results)
    write_text(folder / "probe.md", probe_page(results))
    return results


def _common_rows(labeled: LabeledModels, tables: dict[str, EmbeddingTable]) -> tuple[np.ndarray, dict[str, int]]:
    """Rows that every table has, and how many it lacks of them."""
    if not tables:
        raise ValueError("None of the baselines works on these models, and no backbone was given.")
    present = {name: labeled.properties.index.isin(table.model_ids) for name, table in tables.items()}
    missing = {f"not in the embeddings {name}": int((~has).sum()) for name, has in present.items() if not has.all()}
    rows = np.flatnonzero(np.logical_and.reduce(list(present.values())))
    if not len(rows):
        raise ValueError(f"No model has all embeddings: {'; '.join(f'{n} {why}' for why, n in missing.items())}.")
    return rows, missing


def _split_counts(labeled: LabeledModels, rows: np.ndarray) -> dict[str, int]:
    if labeled.splits is None:
        return {LEAVE_GROUP_OUT: len(rows)}
    return {name: int((labeled.splits[rows] == name).sum()) for name in SPLITS}


def _warnings(embeddings: dict[str, np.ndarray], groups: np.ndarray) -> list[str]:
    """Copies across groups, which a probe may have been trained on under another name."""
    # What one method cannot tell apart may still differ; copies are the same to all of them.
    codes = [np.unique(part, axis=0, return_inverse=True)[1].reshape(-1) for part in embeddings.values()]
    same = np.unique(np.stack(codes), axis=1, return_inverse=True)[1].reshape(-1)
    copies = sum(int((same == code).sum()) for code in np.unique(same) if len(np.unique(groups[same == code])) > 1)
    if not copies:
        return []
    return [
        f"{copies} models have embeddings equal to those of a model of another group, as copies have: what is "
        "measured on them may have been trained on. Give them one group."
    ]
