"""The page of a probe, made from its record alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_wsl.tables import markdown_table

from .probe_config import LEAVE_GROUP_OUT, UNTRAINED
from .probe_embeddings import REGRESSION


LABELS = {"r2": "R2", "spearman": "Spearman", "kendall": "Kendall", "mae": "MAE"}
LABELS |= {"accuracy": "accuracy", "macro_f1": "macro F1"}
FEW_GROUPS = 10  # below it an interval over groups says little of other groups


def probe_page(results: dict[str, Any]) -> str:
    """Markdown: for each target a table of all embeddings, the best by its first probe on top.

    Args:
        results: what `probe` returns.
    """
    config, models = results["config"], results["models"]
    splits = ", ".join(f"{count} {name}" for name, count in models["splits"].items())
    parts = [
        f"# {', '.join(config['target'])} from weights",
        f"{models['count']} models in {models['groups']} groups ({splits}) of {', '.join(config['models'])}. "
        f"{_protocol(results)}",
        *(f"**Mind:** {warning}" for warning in results["warnings"]),
    ]
    if models["left_out"]:
        parts.append(
            "Left out: " + "; ".join(f"{count} models, {why}" for why, count in models["left_out"].items()) + "."
        )
    parts += [*probe_figures(results)]
    parts += ["## The embeddings", "\n".join(f"- **{name}**: {about}" for name, about in _sources(results).items())]
    if results["skipped"]:
        parts += ["Not used:", "\n".join(f"- **{name}**: {why}" for name, why in results["skipped"].items())]
    made_with = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n\n".join([*parts, f"Made with {made_with}."]) + "\n"


def printed_lines(results: dict[str, Any]) -> Iterator[str]:
    """What `hf-wsl probe` prints: the page's figures, and where the page is."""
    yield "\n\n".join(probe_figures(results))
    embeddings = f"{len(results['sizes'])} embeddings of {results['models']['count']} models"
    yield f"\n{Path(results['config']['output_dir']) / 'probe.md'}: {embeddings}, {len(results['skipped'])} left out"


def probe_figures(results: dict[str, Any]) -> Iterator[str]:
    """A heading, what was measured and a table for each target, and one for families across owners."""
    config = results["config"]
    for target, outcome in results["targets"].items():
        yield f"## {target}"
        yield _about(outcome, config["probes"][0])
        yield _table(outcome, config["probes"], results["sizes"])
    if results["families"]:
        of = results["families"]
        yield "## Families across owners"
        yield (
            f"How often the nearest model of another owner is of the same family: {of['count']} models of "
            f"{of['owners']} owners have such a relative; intervals by owner.{_caution(of['owners'], 'owners')}"
        )
        rows = [[name, _cell(own, "share")] for name, own in of["results"].items()]
        yield markdown_table(["embedding", "share"], rows)


def _caution(count: int, what: str) -> str:
    return f" Nothing can be concluded: {count} {what} are fewer than {FEW_GROUPS}." if count < FEW_GROUPS else ""


def _protocol(results: dict[str, Any]) -> str:
    config = results["config"]
    share = f"{config['confidence']:.0%}"
    intervals = (
        f" In brackets {share} intervals from {config['bootstrap']} resamples of the measured groups."
        if config["bootstrap"]
        else ""
    )
    count = results["models"]["groups"]
    alone = (
        " Every model is a group of its own: checkpoints of one run, if there are any, are predicted from their "
        "neighbors, which tells how well a probe interpolates within the run and nothing about other runs."
        if count == results["models"]["count"]
        else ""
    )
    if LEAVE_GROUP_OUT not in results["models"]["splits"]:
        return f"Fitted on train, settings chosen on validation, measured on test.{alone}{intervals}"
    return (
        f"Groups are left out in {min(config['folds'] or count, count)} parts, each predicted from all others; "
        f"settings are chosen on groups among these.{alone} Naming the mean of the others ranks models backwards "
        f"here: a Spearman near -1 of a line without signal is that.{intervals}"
    )


def _about(outcome: dict[str, Any], first: str) -> str:
    left_out = "".join(f"; {count} left out: {why}" for why, count in outcome["left_out"].items())
    what = (
        outcome["kind"] if outcome["kind"] == REGRESSION else f"{outcome['kind']}, {len(outcome['classes'])} classes"
    )
    return (
        f"{what.capitalize()}; {outcome['measured']} models measured{left_out}. Sorted by the first figure of {first}."
        f"{_caution(outcome['groups'], 'measured groups')}"
    )


def _table(outcome: dict[str, Any], probes: list[str], sizes: dict[str, int]) -> str:
    metrics = ("r2", "spearman", "kendall", "mae") if outcome["kind"] == REGRESSION else ("accuracy", "macro_f1")

    def first_figure(item: tuple[str, dict[str, Any]]) -> float:
        value = (item[1].get(probes[0]) or item[1].get("constant"))["metrics"][metrics[0]]
        return float("-inf") if value is None else value

    rows = []
    for name, by_probe in sorted(outcome["results"].items(), key=first_figure, reverse=True):
        measured = [by_probe.get(probe) or by_probe.get("constant") for probe in probes]
        cells = [_cell(one, metric) for one in measured for metric in metrics]
        rows.append([name, str(sizes.get(name, 0)), *cells])
    header = [f"{probe}: {LABELS[metric]}" for probe in probes for metric in metrics]
    return markdown_table(["embedding", "numbers", *header], rows)


def _cell(measured: dict[str, Any], metric: str) -> str:
    value, interval = measured["metrics"][metric], measured["intervals"][metric]
    if value is None:
        return "–"
    return _number(value) if interval is None else f"{_number(value)} [{', '.join(map(_number, interval))}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _sources(results: dict[str, Any]) -> dict[str, str]:
    config = results["config"]
    backbones = results["backbones"]
    first = next(iter(backbones), "")
    named = {name: f"{backbones[name]}, {config['pooling']} over tokens" for name in backbones}
    if UNTRAINED in results["sizes"]:
        named[UNTRAINED] = f"the architecture of {first} with fresh weights of seed {config['seed']}"
    named |= {name: f"baseline `{name}` of hf-wsl embed" for name in results["sizes"] if name in config["baselines"]}
    if "position" in results["sizes"]:
        named["position, probe, shapes only"] = "sections of the baseline `profile`, and its numbers of layers' shapes"
    if "pca" in named:
        seen = (
            "all models, without targets" if LEAVE_GROUP_OUT in results["models"]["splits"] else "the training models"
        )
        named["pca"] += f", fitted on tokens of {seen}"
    named |= {name: f"table {path}" for name, path in config["tables"].items()}
    return named
