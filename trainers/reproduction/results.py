"""Puts the outcomes of a table's steps together in one JSON file, which the results page is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from hf_wsl.files import replacing, write_json

from ..evaluation.evaluate import EVALUATION_FILE
from ..pretrain import versions
from ..probing.probe_config import UNTRAINED
from .figures import draw_figure
from .paper_tables import DISTRIBUTIONS, PROBING, PaperTable
from .plan import BACKBONE, GENERATED, MODEL, TOKENS, Entry, Step, ordered_steps
from .scale import Scale
from .steps import PROBE_FILE, read_record


DIGITS = 5  # of floats, for the files are committed
PROBE_FACTS = ("models", "skipped", "sizes", "warnings")


def table_result(table: PaperTable, scale: Scale, entries: Sequence[Entry], work_dir: Path, results_dir: Path) -> Path:
    """Writes `<table>_<scale>.json`, and the picture of a figure beside it; all steps must be done.

    The JSON holds: what the paper says (`title`, `claim`, `notes`, `paper`), what differs (`about`, `difference`),
    `protocol`, `entries` (row, backbone, architecture, group, data set, and the figures of every arm that depends on
    the backbone), `controls` (architecture and data set -> the arms that do not), `backbones`, `models` (trained
    here), `versions`, `seconds` of every step.

    Returns:
        The JSON file.
    """
    steps = ordered_steps(entries)
    records = {step.folder: read_record(step, work_dir) for step in steps}
    place = scale.tables[table.name]
    if table.kind == PROBING:
        figures, controls = [probe_entry(entry, work_dir) for entry in entries], probe_controls(entries, work_dir)
    else:
        figures = [_entry(entry, scale, table, work_dir, records) for entry in entries]
        controls = {} if table.kind == DISTRIBUTIONS else _controls(entries, work_dir)
    result = {
        "table": table.name,
        "heading": table.heading,
        "kind": table.kind,
        "title": table.title,
        "claim": table.claim,
        "notes": table.notes,
        "paper": table.paper,
        "scale": scale.name,
        "about": scale.about,
        "difference": place["difference"],
        "protocol": scale.protocols.get(table.kind, {}),
        "entries": figures,
        "controls": controls,
        "backbones": _backbones(steps, records),
        "models": {
            step.name: kept(records[step.folder]["outcome"], ("parameters", "validation", "test"))
            for step in steps
            if step.kind == MODEL
        },
        "versions": versions(),
        "seconds": {folder: record["seconds"] for folder, record in records.items()},
    }
    path = results_dir / f"{table.name}_{scale.name}.json"
    if table.is_figure:
        picture = path.with_suffix(".png")
        with replacing(picture) as temporary:
            draw_figure(result).savefig(temporary, format="png", dpi=110)
        result["picture"] = picture.name
    write_json(path, result)
    return path


def _entry(
    entry: Entry, scale: Scale, table: PaperTable, work_dir: Path, records: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    described = {
        "row": entry.row,
        "backbone": entry.backbone,
        "architecture": entry.architecture,
        "group": scale.architectures[entry.architecture]["group"],
        "dataset": entry.dataset,
    }
    if table.kind == DISTRIBUTIONS:
        return {**described, **rounded(records[entry.evaluations[0].folder]["outcome"])}
    _, projections, generated = (_read(step, EVALUATION_FILE, work_dir) for step in entry.evaluations)
    return {
        **described,
        "arms": {**_arms(generated), **_arms(projections)},
        "skipped": {**_not_planned(entry), **generated["skipped"], **projections["skipped"]},
        "warnings": generated["warnings"],
        "loading": _loading_summary(generated["loading"]),
        "distances": {arm: _mean_distance(models) for arm, models in generated["weights"].items()},
    }


def _not_planned(entry: Entry) -> dict[str, str]:
    """The arms that a backbone of this scale is not run with."""
    planned = entry.evaluations[-1].settings["arms"]
    return {arm: "not planned for this backbone at this scale" for arm in GENERATED if arm not in planned}


def _loading_summary(loading: Mapping[str, Any]) -> dict[str, Any]:
    """The number of generated models that their own library loaded, its calls, and the worst difference."""
    if not loading:
        return {}
    return {
        "models": len(loading),
        "loaders": sorted({check["loader"] for check in loading.values()}),
        "max_difference": max(check["max_difference"] for check in loading.values()),
    }


def _controls(entries: Sequence[Entry], work_dir: Path) -> dict[str, Any]:
    """`<architecture> <data set>` -> figures of the arms that depend on no backbone, and the data."""
    controls = {}
    for entry in entries:
        key = f"{entry.architecture} {entry.dataset}"
        if key not in controls:
            evaluation = _read(entry.evaluations[0], EVALUATION_FILE, work_dir)
            others = ("skipped", "ranked_by", "guess", "tokens_per_example")
            # Without its paths, which are this machine's.
            data = kept(evaluation["data"], ("sizes", "split_names", "class_names", "class_counts", "fingerprint"))
            controls[key] = {"arms": _arms(evaluation), "data": data, **kept(evaluation, others)}
    return controls


def _read(step: Step, name: str, work_dir: Path) -> dict[str, Any]:
    """A file that a step has written."""
    return json.loads((work_dir / step.folder / name).read_text(encoding="utf-8"))


def _arms(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """arm -> `summary` (see `arm_runs.summarize`), number of `runs`, seeds that `failed`, mean over `ensembles`."""
    arms = {}
    for arm, outcome in evaluation["arms"].items():
        arms[arm] = {"runs": len(outcome["runs"]), "summary": rounded(outcome["summary"])}
        if "failed" in outcome:
            arms[arm]["failed"] = outcome["failed"]
        ensembles = [ensemble["test"] for ensemble in outcome.get("ensembles", ())]
        if ensembles:
            arms[arm]["ensemble"] = {
                name: round(mean(ensemble[name] for ensemble in ensembles), DIGITS) for name in ensembles[0]
            }
    return arms


def _mean_distance(models: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the models of an arm: relative error and cosine to the anchor, and agreement with it."""
    flat = [{**kept(model, ("relative_error", "cosine")), **model["agreement"]} for model in models]
    return {name: round(mean(model[name] for model in flat), DIGITS) for name in flat[0]}


def _backbones(steps: Sequence[Step], records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    backbones = {}
    for step in steps:
        if step.kind == BACKBONE:
            collection = records[step.needed(TOKENS)[0].folder]
            backbones[step.name] = {
                **rounded(records[step.folder]["outcome"]),
                "recipe": step.settings["recipe"],
                "options": step.settings["options"],
                "collection": {"name": collection["name"], **collection["outcome"]},
            }
    return backbones


def probe_entry(entry: Entry, work_dir: Path) -> dict[str, Any]:
    """A backbone on a zoo: `trained` and `untrained`, each target -> probe -> metrics and intervals."""
    probed = _read(entry.evaluations[1], PROBE_FILE, work_dir)
    results = {
        name: {target: rounded(facts["results"][key]) for target, facts in probed["targets"].items()}
        for name, key in {"trained": entry.backbone, "untrained": UNTRAINED}.items()
    }
    place = {"row": entry.row, "backbone": entry.backbone, "zoo": entry.dataset, "pooling": entry.pooling}
    return {**place, **results, **kept(probed, PROBE_FACTS)}


def probe_controls(entries: Sequence[Entry], work_dir: Path) -> dict[str, Any]:
    """Zoo -> `targets` (target -> its kind, counts, and results of all that needs no backbone), models, options.

    Embeddings that are pooled otherwise than by their mean have the pooling in their name: "pca, layers".
    """
    controls: dict[str, Any] = {}
    for entry in {(e.evaluations[0].folder, e.dataset, e.pooling): e for e in entries}.values():
        zoo, pooling = entry.dataset, entry.pooling
        probed = _read(entry.evaluations[0], PROBE_FILE, work_dir)
        facts = {"targets": rounded(probed["targets"]), **kept(probed, PROBE_FACTS)}
        if pooling != "mean":
            for key in ("sizes", "skipped"):
                facts[key] = {f"{name}, {pooling}": value for name, value in facts[key].items()}
            for own in facts["targets"].values():
                own["results"] = {
                    f"{name}, {pooling}" if name in probed["sizes"] else name: one
                    for name, one in own["results"].items()
                }
        if zoo not in controls:
            controls[zoo] = facts
            continue
        for key in ("sizes", "skipped"):
            controls[zoo][key] |= facts[key]
        for target, own in facts["targets"].items():
            results = controls[zoo]["targets"][target]["results"]
            results |= {name: one for name, one in own["results"].items() if name not in results}
    return controls


def kept(content: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Those of the keys that there are, rounded."""
    return {key: rounded(content[key]) for key in keys if key in content}


def rounded(content: Any) -> Any:
    """The same with floats cut to what a table can use."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return round(content, DIGITS) if isinstance(content, float) else content
