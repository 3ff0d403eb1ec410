"""RESULTS.md, made of the JSON files of reproduced tables: ours beside the paper's, with every control."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from math import comb
from pathlib import Path
from statistics import mean
from typing import Any

from hf_wsl.files import write_text
from hf_wsl.tables import markdown_table, plus_minus

from ..probing.probe_config import LEAVE_GROUP_OUT
from .donors_page import RECORD, donors_section
from .paper_tables import DISTRIBUTIONS, FEW_SHOT, LANGUAGE, NAMES, PROBING
from .result_reading import (
    RIVALS,
    Result,
    arm_names,
    arms_of,
    best_backbone,
    over_architectures,
    percent_by_epoch,
    rows_of,
    wins,
)


NO_ARMS = (DISTRIBUTIONS, PROBING)  # kinds of tables without generated models and their rivals
INTRODUCTION = """# The paper's tables, run again

This page is written by `hf-wsl reproduce --page RESULTS.md` from the JSON files it links to; nothing in it is typed.
Each section has our figures beside the paper's ([arXiv 2510.02096](https://arxiv.org/abs/2510.02096)), the controls
that the paper does not have, and what is different in our set-up. A figure stands for the paper's claim only where the
generated models beat the controls too.

| arm | its weights |
| --- | --- |
| scratch | the architecture's own random initialization |
| generated | drawn by the backbone around the latents of trained anchors |
| prior | drawn from a prior over latents, without an anchor; it stayed behind scratch and is no longer built |
| reconstructed | the anchor through the backbone and back, without noise |
| PCA, random projection | each token through a linear map to as many numbers as a latent has, and two moments more |
| anchor + noise | the anchor plus Gaussian noise as long as the generated model is far, tried and chosen as often |
| anchor rotated | the anchor turned at random by the generated model's angle, tried and chosen as often |
| anchor permuted | the anchor with the entries of every tensor shuffled |
| inherited only | what generation takes from the anchor untouched, the rest scratch |
| anchor | the trained model itself, the upper bound |
"""


def results_page(results_dir: Path, page: Path) -> str:
    """The page for the results in a folder, in the order of the paper; links are relative to the page's own folder."""
    results = sorted(
        (
            json.loads(path.read_text(encoding="utf-8"))
            for name in NAMES
            for path in results_dir.glob(f"{name}_*.json")
        ),
        key=lambda result: (NAMES.index(result["table"]), result["scale"]),
    )
    folder = Path(os.path.relpath(results_dir.absolute(), page.absolute().parent)).as_posix()
    parts = [INTRODUCTION]
    if results:
        parts += [_overview([result for result in results if result["kind"] not in NO_ARMS])]
        parts += [_section(result, folder) for result in results]
    else:
        parts.append("No table has been run yet: `hf-wsl reproduce table7 --scale small` runs one.\n")
    if (donors := results_dir / RECORD).is_file():
        parts.append(donors_section(json.loads(donors.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def write_page(results_dir: str | Path, page: str | Path) -> Path:
    """Writes the page; see `results_page`."""
    write_text(Path(page), results_page(Path(results_dir), Path(page)))
    return Path(page)


def _overview(results: Sequence[Result]) -> str:
    """For every row of every table, on how many of its models the generated arm is ahead of each rival."""
    rows: dict[str, list[str]] = {}
    for result in results:
        for label, entries in rows_of(result).items():
            pairs = [wins(result, entries, rival, None) for rival in RIVALS]
            cells = [f"{won} of {of} ({_sign_test(won, of):.2g})" if of else "" for won, of in pairs]
            compared = json.dumps(
                [[e["architecture"], e["dataset"], e["arms"]["generated"]["summary"]] for e in entries]
            )
            name = f"{result['heading']}, {result['scale']}"
            if compared in rows:  # the same runs, shown again
                rows[compared][0] += f"; {result['heading']}"
            else:
                rows[compared] = [name, label, *cells]
    rows = list(rows.values())
    return (
        "## What holds\n\nOn how many architectures and data sets the generated models are better than each control "
        "on the test split, after fine-tuning where there is any; in brackets the probability of a count so far from "
        "half by chance (sign test, both sides). Tables that show the same runs share a row. Ahead of scratch alone "
        "says that something of the anchor is left; "
        "ahead of a random projection and PCA, that the backbone has learned something that helps; "
        "ahead of anchor + noise and anchor rotated, that its errors are better ones than random. Noise of the same "
        "length keeps more of the anchor's direction than what is generated: anchor rotated is the fairer of the two."
        "\n\n" + markdown_table(["table", "row", *RIVALS], rows, text_columns=2) + "\n"
    )


def _sign_test(won: int, of: int) -> float:
    """The probability of a count at least so far from half of `of` fair coins."""
    far = max(won, of - won)
    return min(1.0, 2 * sum(comb(of, count) for count in range(far, of + 1)) / 2**of)


def _section(result: Result, folder: str) -> str:
    name = f"{result['table']}_{result['scale']}"
    lines = [f"## {result['heading']}: {result['title']} (scale {result['scale']})", ""]
    if result["claim"]:
        lines += [f"The paper's claim: {_sentence(result['claim'])}", ""]
    about = f"{'Different here' if result['claim'] else 'Set-up'}: {_sentence(result['difference'])}"
    lines += [f"{about} [All figures]({folder}/{name}.json).", ""]
    lines += [_sentence(note) + "\n" for note in result["notes"]]
    if "picture" in result:
        lines += [f"![{result['heading']}]({folder}/{result['picture']})", ""]
        if result["paper"].get("picture_only"):
            lines += ["The paper shows a picture only, so its figures cannot be put beside these.", ""]
    tables = {FEW_SHOT: _few_shot, LANGUAGE: _language, DISTRIBUTIONS: _distributions, PROBING: probe_section}.get(
        result["kind"], _fine_tuning
    )
    for part in tables(result):
        lines += [part, ""]
    if result["kind"] not in NO_ARMS:
        lines += [*_remarks(result), ""]
    lines += [_backbones(result), ""]
    return "\n".join(lines)


def _remarks(result: Result) -> Iterator[str]:
    """The ranking of draws, the arms that could not be run, and the warnings; each once."""
    controls = result["controls"].values()
    yield from dict.fromkeys(f"Draws are ranked by {_ranking(control['ranked_by'])}." for control in controls)
    skipped: dict[str, list[str]] = {}
    for entry in result["entries"]:
        for arm, why in entry["skipped"].items():
            skipped.setdefault(f"{arm} ({why})", []).append(entry["row"])
    if skipped:
        named = (f"{arm}, for {' and '.join(dict.fromkeys(rows))}" for arm, rows in skipped.items())
        yield f"Not run: {'; '.join(named)}."
    for place, arms in [(e["architecture"], e["arms"]) for e in result["entries"]] + [
        (place, control["arms"]) for place, control in result["controls"].items()
    ]:
        for arm, outcome in arms.items():
            if "failed" in outcome:
                yield f"{place}, {arm}: {len(outcome['failed'])} seeds diverged and are not in the means."
    loaded = [entry["loading"] for entry in result["entries"] if entry["loading"]]
    if loaded:
        calls = ", ".join(sorted({call for check in loaded for call in check["loaders"]}))
        worst = max(check["max_difference"] for check in loaded)
        outputs = f"no output differs by more than {worst:.1g}" if worst else "their outputs are the same"
        yield (
            f"{sum(check['models'] for check in loaded)} generated models were loaded by {calls} in a process that "
            f"does not know this library; {outputs}."
        )
    yield from dict.fromkeys(_sentence(warning) for entry in result["entries"] for warning in entry["warnings"])


def _ranking(ranked_by: str | None) -> str:
    if ranked_by is None:
        return "nothing, for the head is new"
    return f"{ranked_by} on one half of the validation split; figures are of the other half, and of the test split"


def _few_shot(result: Result) -> Iterator[str]:
    datasets = list(dict.fromkeys(entry["dataset"] for entry in result["entries"]))
    rows, ensembles = [], []
    for label, entries in rows_of(result).items():
        for dataset in datasets:
            entry = best_backbone([e for e in entries if e["dataset"] == dataset])
            arms = arms_of(result, entry)
            names = arm_names(result, result["entries"])
            cells = [_test(arms[arm]) if arm in arms else "" for arm in names]
            rows.append([label, dataset, *cells])
            joint = [arms.get(arm, {}).get("ensemble") for arm in names]
            ensembles.append([label, dataset, *(f"{100 * one['accuracy']:.1f}" if one else "" for one in joint)])
    header = ["row", "data set", *arm_names(result, result["entries"])]
    yield (
        "Test accuracy in percent without fine-tuning, mean ± deviation over the models. Generated, anchor + noise, "
        "anchor rotated and prior are the best of many draws on validation images; reconstructed, PCA, random "
        "projection, permuted and anchor are of every anchor, unselected:"
    )
    yield markdown_table(header, rows, text_columns=2)
    yield "The models of each arm as one ensemble (mean logits), selected as above:"
    yield markdown_table(header, ensembles, text_columns=2)
    shown = [
        best_backbone([e for e in own if e["dataset"] == d]) for own in rows_of(result).values() for d in datasets
    ]
    yield _beaten(shown, result, None, "of the rows")
    paper = result["paper"].get("rows")
    if paper:
        named = list(dict.fromkeys(dataset for cells in paper.values() for dataset in cells))
        training = result["paper"].get("training", {})
        rows = [
            [label, training.get(label, ""), *(plus_minus(*cells[d], digits=2) if d in cells else "" for d in named)]
            for label, cells in paper.items()
        ]
        yield "The paper's generated models (no control is shown there):"
        yield markdown_table(["row", "trained on", *named], rows, text_columns=2)


def _fine_tuning(result: Result) -> Iterator[str]:
    rows = rows_of(result)
    first = next(iter(rows.values()))
    points = len(percent_by_epoch(next(iter(arms_of(result, first[0]).values()))))
    table, shared = [], set(result["controls"][next(iter(result["controls"]))]["arms"])
    for label, entries in rows.items():
        for arm in arm_names(result, entries):
            if arm in shared and entries is not first:
                continue  # those do not depend on the backbone
            name = arm if len(rows) == 1 or arm in shared else f"{arm}, {label}"
            means = over_architectures(result, entries, arm)
            table.append([name, *([plus_minus(*point) for point in means] or ["not of all"] + [""] * (points - 1))])
    yield (
        f"Validation accuracy in percent by epoch, mean ± deviation over {_number(first, 'architecture')} "
        f"(of each the mean over seeds):"
    )
    table += _paper_means(result, points)
    yield markdown_table(["arm", *map(str, range(points))], table)
    for label, entries in rows.items():
        for point in dict.fromkeys((1, points - 1)):
            yield _beaten(entries, result, point, f"of the architectures after epoch {point}, {label}")
        yield _by_architecture(result, label, entries)


def _paper_means(result: Result, points: int) -> list[list[str]]:
    """The paper's rows, which begin at epoch 1."""
    paper, rows = result["paper"], []
    for label, cells in paper.get("rows", {}).items():
        rows.append([f"paper: {label}", "", *(plus_minus(*cell, digits=2) for cell in cells)])
    for label, cells in paper.get("mean", {}).items():
        rows.append([f"paper: {label}", "", *(plus_minus(cell, None, digits=2) for cell in cells)])
    return [(row + [""] * (points + 1))[: points + 1] for row in rows]


def _by_architecture(result: Result, label: str, entries: Sequence[Mapping[str, Any]]) -> str:
    names, groups = arm_names(result, entries), result["paper"].get("groups", {})
    rows = []
    for entry in entries:
        arms = arms_of(result, entry)
        cells = [f"{percent_by_epoch(arms[arm])[-1]:.1f}" if arm in arms else "" for arm in names]
        if groups:
            cells += [_of_group(groups.get(entry["group"], {}), entry["architecture"], arm) for arm in PAPER_ARMS]
        rows.append([entry["architecture"], entry["group"], *cells])
    header = ["architecture", "group", *names, *(f"paper: {arm}" for arm in PAPER_ARMS if groups)]
    about = " The paper's figure is that of the same architecture, or else the mean of its group." if groups else ""
    title = f"After the last epoch, generated by the row {label}.{about}"
    return f"{title}\n\n{markdown_table(header, rows, text_columns=2)}"


PAPER_ARMS = ("generated", "scratch")


def _of_group(group: Mapping[str, Any], architecture: str, arm: str) -> str:
    """The paper's last epoch of an architecture, or the mean of its group."""
    if not group:
        return ""
    chosen = [group[architecture]] if architecture in group else list(group.values())
    return f"{mean(cells[arm][-1] for cells in chosen):.1f}"


def _beaten(entries: Sequence[Mapping[str, Any]], result: Result, point: int | None, where: str) -> str:
    parts = []
    for rival in RIVALS:
        won, of = wins(result, entries, rival, point)
        if of:
            parts.append(f"{rival} {won} of {of}")
    return f"Generated is above ({where}): {', '.join(parts)}."


def _language(result: Result) -> Iterator[str]:
    for entry in result["entries"]:
        arms = arms_of(result, entry)
        points = next(iter(arms.values()))["summary"]["by_epoch"]
        tokens = result["controls"][f"{entry['architecture']} {entry['dataset']}"]["tokens_per_example"]
        chosen = sorted({0, 1, len(points) // 2, len(points) - 1} & set(range(len(points))))
        yield (
            f"{entry['architecture']} on {entry['dataset']}: perplexity of the validation text after so many tokens, "
            "mean ± deviation over seeds, then the test text's figures:"
        )
        rows = []
        for arm, outcome in arms.items():
            summary, test = outcome["summary"], outcome["summary"]["test"]["metrics"]
            cells = [_metric(summary["by_epoch"][i]["metrics"]["perplexity"], 1, 1) for i in chosen]
            tests = [_metric(test["loss"], 1, 3), _metric(test["perplexity"], 1, 1)]
            rows.append([arm, *cells, *tests, _metric(test["accuracy"], 100, 1), _metric(test["f1"], 100, 2)])
        header = ["arm", *(f"{points[i]['examples'] * tokens:,}" for i in chosen)]
        yield markdown_table([*header, "test loss", "perplexity", "accuracy %", "F1 %"], rows)


def _distributions(result: Result) -> Iterator[str]:
    yield (
        "Reconstructed weights by kind of layer: their relative error, and their deviation over that of the "
        "originals (1 is right, below 1 is squashed):"
    )
    rows = []
    for entry in result["entries"]:
        for kind, figures in entry["kinds"].items():
            std = figures["std"]
            ratio = std["reconstructed"] / std["original"] if std["original"] else None
            cells = [figures["relative_error"], ratio]
            numbers = ["" if cell is None else f"{cell:.3f}" for cell in cells]
            rows.append([entry["row"], entry["architecture"], kind, f"{figures['entries']:,}", *numbers])
    header = ["loss", "architecture", "kind of layer", "weights", "relative error", "deviation"]
    yield markdown_table(header, rows, text_columns=3)


def _backbones(result: Result) -> str:
    rows = []
    for name, facts in result["backbones"].items():
        baselines = facts.get("baselines") or {}
        numbers = [facts["val_r2"], baselines.get("PCA"), baselines.get("random projection")]
        tokens = facts["collection"]["num_tokens"]
        cells = [f"{facts['parameters'] / 1e6:.1f} M", f"{tokens:,}", f"{facts['steps']:,}"]
        rows.append([name, facts["recipe"], *cells, *("" if n is None else f"{n:.3f}" for n in numbers)])
    header = ["backbone", "recipe", "parameters", "tokens", "steps", "R2", "R2 of PCA", "R2 of random projection"]
    return "Backbones, with R2 on held-out models:\n\n" + markdown_table(header, rows, text_columns=2)


def _test(arm: Mapping[str, Any]) -> str:
    test = arm["summary"]["test"]
    return plus_minus(100 * test["mean"], None if test["std"] is None else 100 * test["std"])


def _metric(statistic: Mapping[str, float | None], scale: float, digits: int) -> str:
    deviation = None if statistic["std"] is None else scale * statistic["std"]
    return plus_minus(scale * statistic["mean"], deviation, digits)


def _number(entries: Sequence[Mapping[str, Any]], what: str) -> str:
    count = len({entry[what] for entry in entries})
    return f"{count} {what}{'' if count == 1 else 's'}"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith(".") else text + "."


def probe_section(result: Result) -> Iterator[str]:
    """A table a zoo: R2 (or accuracy) of the linear probe with its interval, rank correlation, and the network's."""
    for zoo, control in result["controls"].items():
        embeddings = _probe_embeddings(result, zoo)
        targets = control["targets"]
        header = ["embedding", "numbers", *(cell for target in targets for cell in _probe_header(target, control))]
        rows = [
            [name, size, *(cell for target, facts in targets.items() for cell in _probe_cells(probed[target], facts))]
            for name, (size, probed) in embeddings.items()
        ]
        models = control["models"]
        parts = ", ".join(f"{count} {split}" for split, count in models["splits"].items())
        parts = parts if LEAVE_GROUP_OUT not in models["splits"] else "each group left out in turn"
        parts = f" ({parts})" if parts else ""
        yield f"**{zoo}**: {models['count']:,} checkpoints of {models['groups']:,} groups{parts}."
        yield markdown_table(header, rows, text_columns=1)
        yield _probe_best(embeddings, control)
        if control["skipped"]:
            yield "Not there: " + "; ".join(f"{name} ({why})" for name, why in control["skipped"].items()) + "."
    if result["paper"].get("rows"):
        yield "The paper's R2 in percent (linear probe, ResNet-18 zoos), by what the backbone was trained on:"
        rows = result["paper"]["rows"]
        columns = [(target, zoo) for target, zoos in next(iter(rows.values())).items() for zoo in zoos]
        header = ["trained on", *(f"{target.replace('_', ' ')}, {zoo}" for target, zoo in columns)]
        lines = [[row, *(f"{cells[target][zoo]:.2f}" for target, zoo in columns)] for row, cells in rows.items()]
        yield markdown_table(header, lines)


def _probe_embeddings(result: Result, zoo: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Embedding -> its number of numbers, and target -> figures of the probes."""
    embeddings: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for row, entries in rows_of(result).items():
        for entry in entries:
            if entry["zoo"] == zoo:
                pooled = "" if entry["pooling"] == "mean" else f", {entry['pooling']}"
                for kind, key in (("trained", entry["backbone"]), ("untrained", "untrained")):
                    name = f"{entry['backbone']} ({row})" if kind == "trained" else f"{entry['backbone']}, untrained"
                    embeddings[name + pooled] = (f"{entry['sizes'][key]:,}", entry[kind])
    control = result["controls"][zoo]
    names = dict.fromkeys(name for facts in control["targets"].values() for name in facts["results"])
    for name in names:
        size = f"{control['sizes'][name]:,}" if name in control["sizes"] else ""
        embeddings[name] = (size, {target: facts["results"].get(name) for target, facts in control["targets"].items()})
    return embeddings


def _probe_main(facts: Mapping[str, Any]) -> str:
    return "r2" if facts["kind"] == "regression" else "accuracy"


def _probe_header(target: str, control: Mapping[str, Any]) -> list[str]:
    name, main = target.replace("_", " "), _probe_main(control["targets"][target])
    label = {"r2": "R2", "accuracy": "accuracy"}[main]
    second = "rank correlation" if main == "r2" else "macro F1"
    return [f"{name}: {label} [interval]", second, f"{label} of the MLP"]


def _probe_cells(probes: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> list[str]:
    if not probes:
        return ["", "", ""]
    main = _probe_main(facts)
    linear = probes.get("ridge") or probes.get("constant")
    if linear is None:
        return ["", "", ""]
    second = linear["metrics"].get("spearman" if main == "r2" else "macro_f1")
    interval = linear["intervals"].get(main)
    cell = _probe_figure(linear, main)
    if interval and interval[0] is not None:
        cell += f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    network = probes.get("mlp")
    return [cell, "" if second is None else f"{second:.2f}", _probe_figure(network, main) if network else ""]


def _probe_figure(measured: Mapping[str, Any], metric: str) -> str:
    value = measured["metrics"][metric]
    return "–" if value is None else f"{value:.3f}"  # R2 of a target that does not vary


def _probe_best(embeddings: Mapping[str, tuple[str, Mapping[str, Any]]], control: Mapping[str, Any]) -> str:
    """For every target, the embedding that the linear probe reads best."""
    parts = []
    for target, facts in control["targets"].items():
        main = _probe_main(facts)
        probes = {name: by_target[target] for name, (_, by_target) in embeddings.items() if by_target[target]}
        scores = {name: probe["ridge"]["metrics"][main] for name, probe in probes.items() if "ridge" in probe}
        scores = {name: score for name, score in scores.items() if score is not None}
        if scores:
            best = max(scores, key=scores.get)
            parts.append(f"{target.replace('_', ' ')}: {best} ({scores[best]:.3f})")
    return f"Read best by the linear probe: {'; '.join(parts)}." if parts else "No target varies."
