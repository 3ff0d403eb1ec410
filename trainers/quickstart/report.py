"""Writes `report.html`: one self-contained page with the quickstart's pictures, numbers and limits."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hf_wsl.files import replacing, write_text
from hf_wsl.pages import Table, html_page, png

from .figures import FIGURES


WITHOUT_BACKBONE = ("PCA", "random projection", "anchor + noise", "anchor permuted", "scratch")
# Points of accuracy, about two standard errors of 95 % on 180 images.
NOISE = 3.0
TEMPLATE = Path(__file__).parent / "report.html"


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Writes the pictures as `<name>.png` and the page `report.html` into `folder`; returns the page's path.

    Args:
        results: what `quickstart` returns.
        folder: exists.
    """
    pictures = {name: png(draw(results)) for name, draw in FIGURES.items()}
    for name, content in pictures.items():
        with replacing(folder / f"{name}.png") as temporary:
            temporary.write_bytes(content)
    path = folder / "report.html"
    write_text(path, report_page(results, pictures))
    return path


def report_page(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page as text; `pictures` are the PNG files of `FIGURES`."""
    members, training, tuned = results["zoo"]["members"], results["pretrain"], results["finetune"]
    held_out = next(member for member in members if member["name"] == results["zoo"]["held_out"])
    return html_page(
        TEMPLATE,
        **results,
        title="hf-wsl quickstart",
        pictures={name: base64.b64encode(content).decode() for name, content in pictures.items()},
        held_out=held_out,
        siblings=sum(member["family"] == held_out["family"] for member in members) - 1,
        zoo_table=_zoo_table(members),
        r2_start=_start(training),
        r2_verdict=_r2_verdict(training["val_r2"], training["baselines"]),
        kinds_table=_kinds_table(results["generate"]["kinds"]),
        origins=", ".join(f"{n:,} {origin.split(':')[0]}" for origin, n in results["generate"]["entries"].items()),
        arms_table=_arms_table(tuned["arms"]),
        arms_verdict=_arms_verdict(tuned["arms"]),
        seconds_table=_seconds_table(results["seconds"]),
    )


def _zoo_table(members: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for family in dict.fromkeys(member["family"] for member in members):
        own = [member for member in members if member["family"] == family]
        accuracies = sorted(100 * member["test_accuracy"] for member in own)
        rows.append(
            [
                family,
                Markup("<code>{}</code>").format(own[0]["architecture"]),
                f"{own[0]['image_size']} × {own[0]['image_size']}",
                f"{own[0]['num_parameters']:,}",
                str(len(own)),
                f"{accuracies[0]:.1f} % – {accuracies[-1]:.1f} %",
            ]
        )
    return Table(["family", "architecture (narrowed)", "input", "weights", "members", "test accuracy"], rows, 2)


def _kinds_table(kinds: dict[str, dict[str, Any]]) -> Table:
    rows = [
        [
            kind,
            f"{result['entries']:,}",
            f"{result['relative_error']:.3f}",
            "–" if result["r2"] is None else f"{result['r2']:.2f}",
            f"{result['std']['original']:.4f}",
            f"{result['std']['reconstructed']:.4f}",
        ]
        for kind, result in kinds.items()
    ]
    return Table(["kind of layer", "weights", "relative error", "R²", "std, original", "reconstructed"], rows)


def _arms_table(arms: dict[str, Any]) -> Table:
    rows = []
    for arm, result in arms.items():
        summary = result["summary"]
        tests = sorted(run["test"]["accuracy"] for run in result["runs"])
        row = [arm, *(f"{100 * point['mean']:.1f}" for point in [*summary["by_epoch"], summary["test"]])]
        row.append(f"{100 * tests[0]:.1f} – {100 * tests[-1]:.1f}")
        rows.append(row)
    epochs = [f"{point['epoch']:g}" for point in summary["by_epoch"]]
    return Table(["initial weights", *epochs, "test, mean", "test, range"], rows)


def _r2_verdict(r2: float, lines: dict[str, float]) -> str:
    if r2 > lines["PCA"]:
        return f"It passes PCA by {r2 - lines['PCA']:.3f}, measured once, on one split, with one seed."
    reached = (
        "reaches neither line" if r2 <= lines["random projection"] else "does not pass PCA, which needs no training"
    )
    return (
        f"It {reached}: it has learned nothing that helps. A few small models with seeds of their own have little in "
        "common token by token. On public models more is to be gained from a token's context than from the token "
        "alone, but a backbone of this size does not learn in a minute to use it."
    )


def _start(training: dict[str, Any]) -> str:
    """Tells what the first point of the curve is, where the backbone does not start at random."""
    first = training["val_r2_history"][0]
    if not training["model_config"].get("linear_path") or first["step"] != 0:
        return ""
    return (
        f"It starts at {first['val_r2']:.3f}, which is PCA as well, by design: its linear path is initialized "
        "with it, in 128 numbers, mean and standard deviation included. The change from there is what training adds."
    )


def _arms_verdict(arms: dict[str, Any]) -> Markup:
    """Sets the generated arm beside the arms that use no backbone, after one epoch and at the end."""

    def after(arm: str, epoch: int) -> float:
        return 100 * arms[arm]["summary"]["by_epoch"][epoch]["mean"]

    last = len(arms["generated"]["runs"][0]["history"]) - 1
    without = [arm for arm in WITHOUT_BACKBONE if arm in arms]
    sentences = []
    for epoch, when in ((min(1, last), "After one epoch"), (last, f"After {last} epochs")):
        own = after("generated", epoch)
        others = ", ".join(f"{arm} {after(arm, epoch):.1f}" for arm in without)
        level = [arm for arm in without if after(arm, epoch) > own - NOISE]
        sentences.append(
            Markup(
                "{} the generated models stand at <b>{:.1f} %</b> of the validation images that they were not "
            ).format(when, own)
            + f"chosen on; without a backbone: {others}. Of these {len(without)} controls, {len(level)} are not more "
            f"than {NOISE:g} points below it."
        )
    return Markup(" ").join(sentences)


def _seconds_table(seconds: dict[str, float]) -> Table:
    rows = [[stage, f"{value:.0f}"] for stage, value in seconds.items()]
    return Table(["stage", "seconds"], [*rows, ["total", f"{sum(seconds.values()):.0f}"]])
