"""The part of RESULTS.md on probes: every embedding of every zoo, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hf_wsl.tables import markdown_table

from ..probing.probe_config import LEAVE_GROUP_OUT
from .result_reading import Result, rows_of


def probe_section(result: Result) -> Iterator[str]:
    """A table a zoo: R2 (or accuracy) of the linear probe with its interval, rank correlation, and the network's."""
    for zoo, control in result["controls"].items():
        embeddings = _embeddings(result, zoo)
        targets = list(control["targets"])
        header = ["embedding", "numbers", *(cell for target in targets for cell in _header(target, control))]
        rows = [
            [name, size, *(cell for target in targets for cell in _cells(found[target], control["targets"][target]))]
            for name, (size, found) in embeddings.items()
        ]
        models = control["models"]
        parts = ", ".join(f"{count} {split}" for split, count in models["splits"].items())
        parts = parts if LEAVE_GROUP_OUT not in models["splits"] else "each group left out in turn"
        parts = f" ({parts})" if parts else ""
        yield f"**{zoo}**: {models['count']:,} checkpoints of {models['groups']:,} groups{parts}."
        yield markdown_table(header, rows, text_columns=1)
        yield _best(embeddings, control)
        if control["skipped"]:
            yield "Not there: " + "; ".join(f"{name} ({why})" for name, why in control["skipped"].items()) + "."
    if result["paper"].get("rows"):
        yield "The paper's R2 in percent (linear probe, ResNet-18 zoos), by what the backbone was trained on:"
        rows = result["paper"]["rows"]
        columns = [(target, zoo) for target, zoos in next(iter(rows.values())).items() for zoo in zoos]
        header = ["trained on", *(f"{target.replace('_', ' ')}, {zoo}" for target, zoo in columns)]
        lines = [[row, *(f"{cells[target][zoo]:.2f}" for target, zoo in columns)] for row, cells in rows.items()]
        yield markdown_table(header, lines)


def _embeddings(result: Result, zoo: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Embedding -> how many numbers it has, and target -> what was found."""
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for row, entries in rows_of(result).items():
        for entry in entries:
            if entry["zoo"] == zoo:
                pooled = "" if entry["pooling"] == "mean" else f", {entry['pooling']}"
                for kind, key in (("trained", entry["backbone"]), ("untrained", "untrained")):
                    name = f"{entry['backbone']} ({row})" if kind == "trained" else f"{entry['backbone']}, untrained"
                    found[name + pooled] = (f"{entry['sizes'][key]:,}", entry[kind])
    control = result["controls"][zoo]
    names = dict.fromkeys(name for facts in control["targets"].values() for name in facts["results"])
    for name in names:
        size = f"{control['sizes'][name]:,}" if name in control["sizes"] else ""
        found[name] = (size, {target: facts["results"].get(name) for target, facts in control["targets"].items()})
    return found


def _main(facts: Mapping[str, Any]) -> str:
    return "r2" if facts["kind"] == "regression" else "accuracy"


def _header(target: str, control: Mapping[str, Any]) -> list[str]:
    name, main = target.replace("_", " "), _main(control["targets"][target])
    label = {"r2": "R2", "accuracy": "accuracy"}[main]
    second = "rank correlation" if main == "r2" else "macro F1"
    return [f"{name}: {label} [interval]", second, f"{label} of the MLP"]


def _cells(found: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> list[str]:
    if not found:
        return ["", "", ""]
    main = _main(facts)
    linear = found.get("ridge") or found.get("constant")
    if linear is None:
        return ["", "", ""]
    second = linear["metrics"].get("spearman" if main == "r2" else "macro_f1")
    interval = linear["intervals"].get(main)
    cell = _figure(linear, main)
    if interval and interval[0] is not None:
        cell += f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    network = found.get("mlp")
    return [cell, "" if second is None else f"{second:.2f}", _figure(network, main) if network else ""]


def _figure(measured: Mapping[str, Any], metric: str) -> str:
    value = measured["metrics"][metric]
    return "–" if value is None else f"{value:.3f}"  # R2 of a target that does not vary


def _best(embeddings: Mapping[str, tuple[str, Mapping[str, Any]]], control: Mapping[str, Any]) -> str:
    """For every target, the embedding that the linear probe reads best."""
    parts = []
    for target, facts in control["targets"].items():
        main = _main(facts)
        probes = {name: found[target] for name, (_, found) in embeddings.items() if found[target]}
        scores = {name: found["ridge"]["metrics"][main] for name, found in probes.items() if "ridge" in found}
        scores = {name: score for name, score in scores.items() if score is not None}
        if scores:
            best = max(scores, key=scores.get)
            parts.append(f"{target.replace('_', ' ')}: {best} ({scores[best]:.3f})")
    return f"Read best by the linear probe: {'; '.join(parts)}." if parts else "No target varies."
