"""The page and the picture of an evaluation, made from its record alone."""

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from hf_wsl.files import replacing, write_text
from hf_wsl.tables import markdown_table, plus_minus

from .arm_figure import arm_curves, arm_dots, scale_of


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Writes `evaluation.md` and `evaluation.png`.

    Args:
        results: what `evaluate` returns.
        folder: exists.
    """
    with replacing(folder / "evaluation.png") as temporary:
        evaluation_figure(results).savefig(temporary, format="png", dpi=130)
    write_text(folder / "evaluation.md", evaluation_page(results))


def evaluation_figure(results: dict[str, Any]) -> Figure:
    """Curves where models are fine-tuned, else a dot for each model."""
    fine_tuned = any(len(outcome["summary"]["by_epoch"]) > 1 for outcome in results["arms"].values())
    return arm_curves(results) if fine_tuned else arm_dots(results)


def evaluation_page(results: dict[str, Any]) -> str:
    """Markdown: the set-up, the table of arms, what was left out, and how far the models are from their anchors."""
    config, metric = results["config"], results["metric"]
    _, label = scale_of(metric)
    runs = {len(outcome["runs"]) for outcome in results["arms"].values()}
    parts = [
        f"# {config['target']} from {', '.join(config['anchors'] or config['donors'])}",
        f"{_origin(results)}; {_data(results)}. Seeds: {', '.join(map(str, results['seeds']))}; {_range(runs)} models "
        f"an arm. {_ranking(results)}",
        *(f"**Mind:** {warning}" for warning in results["warnings"]),
        f"## {label.capitalize()}",
        f"Mean ± standard deviation over models, of the half of the validation split that nothing is ranked on "
        f"{_axis(results)}, and of the test split at the end.",
        _arms_table(results),
        "![The arms](evaluation.png)",
        *([_ensembles_table(results)] if any("ensembles" in outcome for outcome in results["arms"].values()) else []),
        *([_donors_table(results)] if results.get("donors") else []),
        "## The arms",
        "\n".join(f"- **{arm}**: {outcome['about']}" for arm, outcome in results["arms"].items()),
    ]
    failed = [
        f"- **{a}**, seed {f['seed']}: {f['why']}" for a, x in results["arms"].items() for f in x.get("failed", ())
    ]
    if failed:
        parts += ["Seeds that are missing above:", "\n".join(failed)]
    if results["skipped"]:
        parts += ["Not run:", "\n".join(f"- **{arm}**: {why}" for arm, why in results["skipped"].items())]
    if results["weights"]:
        parts += [
            "## How much of them is the anchor",
            "Before fine-tuning, over the tensors that are sampled, means over models. Relative error and cosine are "
            "those of the weights as vectors; distance is the 1-Wasserstein distance between the distributions of a "
            "tensor's entries in units of its standard deviation; same answer is the share of validation examples "
            "with the same prediction, KL that of the predictive distributions in nats.",
            _weights_table(results),
        ]
    if results["loading"]:
        parts += ["## Loaded by their own library", _loading(results["loading"])]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n\n".join([*parts, f"Made with {versions}."]) + "\n"


def _origin(results: dict[str, Any]) -> str:
    config = results["config"]
    if config["donors"]:
        return f"Donors of other sizes; fitted on {config['num_images']} training examples without labels"
    return f"Backbone {config['backbone']}; protocol {config['protocol']}"


def _donors_table(results: dict[str, Any]) -> str:
    """What each arm costs, how early it reaches the end of scratch, and what the donors themselves reach."""
    factor, label = scale_of(results["metric"])
    rows = []
    for arm, outcome in results["arms"].items():
        seconds = [run["cpu_seconds"] for run in outcome["runs"] if "cpu_seconds" in run]
        reached = outcome.get("epochs_to_scratch")
        rows.append(
            [
                arm,
                f"{mean(seconds):.1f}" if seconds else "–",
                "never" if reached is None else f"{reached:g}",
            ]
        )
    reach = "epochs to the end of tuned scratch"
    donors = []
    for donor in results["donors"]:
        reached = "other classes" if donor["test"] is None else f"{factor * donor['test'][results['metric']]:.1f}"
        donors.append(f"- {donor['name']}: {reached}")
    table = markdown_table(["initial weights", "CPU seconds", reach], rows)
    return "\n\n".join(["## Cost and gain", table, f"The donors themselves, test {label}:", "\n".join(donors)])


def _loading(loading: dict[str, Any]) -> str:
    calls = ", ".join(sorted({outcome["loader"] for outcome in loading.values()}))
    worst = max(outcome["max_difference"] for outcome in loading.values())
    return (
        f"{len(loading)} generated models were loaded in a process of their own by `{calls}` alone; no output differs "
        f"by more than {worst:.2g}."
    )


def _data(results: dict[str, Any]) -> str:
    data = results["data"]
    sizes = ", ".join(f"{size:,} {name}" for name, size in data["sizes"].items())
    unit = "images" if "images" in data else f"blocks of {data['block_size']} tokens"
    return f"{data.get('images') or data.get('text')}: {sizes} {unit}"


def _ranking(results: dict[str, Any]) -> str:
    config = results["config"]
    if results["ranked_by"] is None:
        return "Draws are not ranked."
    return (
        f"Of {config['num_candidates']} draws a seed the best {config['num_kept']} by {results['ranked_by']} on the "
        "other half of the validation split are kept (generated, anchor + noise and anchor rotated alike)."
    )


def _axis(results: dict[str, Any]) -> str:
    if results.get("tokens_per_example"):
        return "after so many million training tokens"
    return "after so many epochs of fine-tuning"


def _points(results: dict[str, Any]) -> list[str]:
    """The table's columns: epochs, or millions of tokens."""
    first = next(iter(results["arms"].values()))["summary"]["by_epoch"]
    if tokens := results.get("tokens_per_example"):
        return [f"{point['examples'] * tokens / 1e6:.3g}" for point in first]
    return [f"{point['epoch']:g}" for point in first]


def _arms_table(results: dict[str, Any]) -> str:
    metric = results["metric"]
    rows = []
    for arm, outcome in results["arms"].items():
        summary = outcome["summary"]
        rows.append([arm, *(_cell(point, metric) for point in [*summary["by_epoch"], summary["test"]])])
    return markdown_table(["initial weights", *_points(results), "test"], rows)


def _ensembles_table(results: dict[str, Any]) -> str:
    factor, label = scale_of(results["metric"])
    rows = [
        [
            arm,
            _cell(outcome["summary"]["test"], results["metric"]),
            f"{factor * mean(ensemble['test'][results['metric']] for ensemble in outcome['ensembles']):.1f}",
        ]
        for arm, outcome in results["arms"].items()
        if "ensembles" in outcome
    ]
    return "## Ensembles\n\n" + markdown_table(["arm", f"a model: test {label}", "their mean logits"], rows)


def _weights_table(results: dict[str, Any]) -> str:
    kinds = list(dict.fromkeys(k for models in results["weights"].values() for m in models for k in m["kinds"]))
    header = ["arm", "relative error", "cosine", "same answer", "KL", *(f"distance, {kind}" for kind in kinds)]
    rows = []
    for arm, models in results["weights"].items():
        figures = [
            [model["relative_error"] for model in models],
            [model["cosine"] for model in models],
            [model["agreement"]["same_answer"] for model in models if model["agreement"]],
            [model["agreement"]["kl"] for model in models if model["agreement"]],
            *([model["kinds"][kind]["distance"] for model in models if kind in model["kinds"]] for kind in kinds),
        ]
        rows.append([arm, *("–" if not values or None in values else f"{mean(values):.3f}" for values in figures)])
    return markdown_table(header, rows)


def _cell(point: dict[str, Any], metric: str) -> str:
    factor, _ = scale_of(metric)
    deviation = None if point["std"] is None else factor * point["std"]
    return plus_minus(factor * point["mean"], deviation, digits=1 if factor == 100.0 else 3)


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
