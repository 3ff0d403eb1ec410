"""Writes `report.html`: one self-contained page with the quickstart's pictures, numbers and limits."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from hf_wsl.files import replacing

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
    pictures = {}
    for name, draw in FIGURES.items():
        buffer = io.BytesIO()
        draw(results).savefig(buffer, format="png", dpi=160)
        pictures[name] = buffer.getvalue()
        _write(folder / f"{name}.png", buffer.getvalue())
    images = {name: base64.b64encode(content).decode() for name, content in pictures.items()}
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(images, **_texts(results))
    path = folder / "report.html"
    _write(path, page.encode("utf-8"))
    return path


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _texts(results: dict[str, Any]) -> dict[str, str]:
    """Everything in the page that depends on the results, as HTML."""
    zoo, tokens, training, embed = (results[stage] for stage in ("zoo", "tokenize", "pretrain", "embed"))
    generated, tuned = results["generate"], results["finetune"]
    held_out = next(member for member in zoo["members"] if member["name"] == zoo["held_out"])
    siblings = sum(member["family"] == held_out["family"] for member in zoo["members"]) - 1
    r2, lines = training["val_r2"], training["baselines"]
    return {
        "zoo_table": _zoo_table(zoo["members"]),
        "num_models": str(len(zoo["members"])),
        "num_families": str(len({member["family"] for member in zoo["members"]})),
        "num_tokens": f"{tokens['num_tokens']:,}",
        "num_weights": f"{tokens['num_parameters']:,}",
        "train_models": str(len(tokens["models"]["train"])),
        "validation_models": _names(tokens["models"]["validation"]),
        "held_out": escape(held_out["name"]),
        "architecture": escape(held_out["architecture"]),
        "anchor_accuracy": _percent(held_out["test_accuracy"]),
        "siblings": str(siblings),
        "backbone_parameters": f"{training['parameters'] / 1e6:.1f}",
        "steps": str(training["steps"]),
        "r2": f"{r2:.3f}",
        "pca": f"{lines['PCA']:.3f}",
        "random_projection": f"{lines['random projection']:.3f}",
        "r2_verdict": _r2_verdict(r2, lines),
        "r2_start": _start(training),
        "variance_shown": _percent(embed["variance_shown"]),
        "nearest": _percent(embed["nearest_of_same_family"]),
        "kinds_table": _kinds_table(generated["kinds"]),
        "reconstructed_models": _names(generated["reconstructed_models"]),
        "num_candidates": str(generated["num_candidates"]),
        "error_generated": _percent(generated["relative_error"]["generated"]),
        "error_reconstructed": _percent(generated["relative_error"]["reconstructed"]),
        "origins": _origins(generated["entries"]),
        "arms_table": _arms_table(tuned["arms"]),
        "arms_about": _arms_about(tuned),
        "arms_verdict": _arms_verdict(tuned["arms"]),
        "epochs": str(tuned["config"]["epochs"]),
        "seeds": str(len(tuned["seeds"])),
        "learning_rate": f"{tuned['config']['learning_rate']:g}",
        "batch_size": str(tuned["config"]["batch_size"]),
        "seconds_table": _seconds_table(results["seconds"]),
        "seed": str(results["settings"]["seed"]),
        "versions": escape(", ".join(f"{name} {version}" for name, version in results["versions"].items())),
    }


def _zoo_table(members: Sequence[dict[str, Any]]) -> str:
    rows = []
    for family in dict.fromkeys(member["family"] for member in members):
        own = [member for member in members if member["family"] == family]
        accuracies = sorted(member["test_accuracy"] for member in own)
        rows.append(
            [
                family,
                f"<code>{escape(own[0]['architecture'])}</code>",
                f"{own[0]['image_size']} × {own[0]['image_size']}",
                f"{own[0]['num_parameters']:,}",
                str(len(own)),
                f"{_percent(accuracies[0])} – {_percent(accuracies[-1])}",
            ]
        )
    return _table(["family", "architecture (narrowed)", "input", "weights", "members", "test accuracy"], rows, text=2)


def _kinds_table(kinds: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            kind,
            f"{found['entries']:,}",
            f"{found['relative_error']:.3f}",
            "–" if found["r2"] is None else f"{found['r2']:.2f}",
            f"{found['std']['original']:.4f}",
            f"{found['std']['reconstructed']:.4f}",
        ]
        for kind, found in kinds.items()
    ]
    return _table(["kind of layer", "weights", "relative error", "R²", "std, original", "reconstructed"], rows, text=1)


def _arms_table(arms: dict[str, Any]) -> str:
    rows = []
    for arm, found in arms.items():
        summary = found["summary"]
        tests = sorted(run["test"]["accuracy"] for run in found["runs"])
        row = [arm, *(f"{100 * point['mean']:.1f}" for point in [*summary["by_epoch"], summary["test"]])]
        row.append(f"{100 * tests[0]:.1f} – {100 * tests[-1]:.1f}")
        rows.append(row)
    epochs = [f"{point['epoch']:g}" for point in summary["by_epoch"]]
    return _table(["initial weights", *epochs, "test, mean", "test, range"], rows, text=1, strong="generated")


def _arms_about(tuned: dict[str, Any]) -> str:
    items = [f"<dt>{escape(arm)}</dt><dd>{escape(found['about'])}</dd>" for arm, found in tuned["arms"].items()]
    items += [f"<dt>{escape(arm)}</dt><dd>not run: {escape(why)}</dd>" for arm, why in tuned["skipped"].items()]
    return "".join(items)


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
    """What the first point of the curve is, where the backbone does not start at random."""
    first = training["val_r2_history"][0]
    if not training["model_config"].get("linear_path") or first["step"] != 0:
        return ""
    return (
        f"It starts at {first['val_r2']:.3f}, which is PCA as well, by design: its linear path is initialized "
        "with it, in 128 numbers, mean and standard deviation included. The change from there is what training adds."
    )


def _arms_verdict(arms: dict[str, Any]) -> str:
    """How the generated arm stands beside the arms that use no backbone, after one epoch and at the end."""

    def after(arm: str, epoch: int) -> float:
        return 100 * arms[arm]["summary"]["by_epoch"][epoch]["mean"]

    last = len(arms["generated"]["runs"][0]["history"]) - 1
    without = [arm for arm in WITHOUT_BACKBONE if arm in arms]
    sentences = []
    for epoch, when in ((min(1, last), "After one epoch"), (last, f"After {last} epochs")):
        own = after("generated", epoch)
        others = ", ".join(f"{escape(arm)} {after(arm, epoch):.1f}" for arm in without)
        level = [arm for arm in without if after(arm, epoch) > own - NOISE]
        sentences.append(
            f"{when} the generated models stand at <b>{own:.1f} %</b> of the validation images that they were not "
            f"chosen on; without a backbone: {others}. Of these {len(without)} controls, {len(level)} are not more "
            f"than {NOISE:g} points below it."
        )
    return " ".join(sentences)


def _origins(entries: dict[str, int]) -> str:
    return escape(", ".join(f"{count:,} {origin.split(':')[0]}" for origin, count in entries.items()))


def _seconds_table(seconds: dict[str, float]) -> str:
    rows = [[stage, f"{value:.0f}"] for stage, value in seconds.items()]
    return _table(["stage", "seconds"], [*rows, ["total", f"{sum(seconds.values()):.0f}"]], text=1, strong="total")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text: int, strong: str = "") -> str:
    """An HTML table; the first `text` columns are aligned left, the others are numbers. Cells are HTML already."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{'' if i < text else ' class=n'}>{cell}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr{' class=strong' if row[0] == strong else ''}>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"<code>{escape(name)}</code>" for name in names)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
