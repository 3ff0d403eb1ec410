"""What the probes of a table found, as its JSON file has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..probing.probe_config import UNTRAINED
from .plan import Entry, Step
from .rounding import kept, rounded
from .steps import PROBE_FILE


_FACTS = ("models", "skipped", "sizes", "warnings")


def probe_entry(entry: Entry, work_dir: Path) -> dict[str, Any]:
    """A backbone on a zoo: `trained` and `untrained`, each target -> probe -> metrics and intervals."""
    found = _probe(entry.evaluations[1], work_dir)
    results = {
        name: {target: rounded(facts["results"][key]) for target, facts in found["targets"].items()}
        for name, key in {"trained": entry.backbone, "untrained": UNTRAINED}.items()
    }
    place = {"row": entry.row, "backbone": entry.backbone, "zoo": entry.dataset, "pooling": entry.pooling}
    return {**place, **results, **kept(found, _FACTS)}


def probe_controls(entries: Sequence[Entry], work_dir: Path) -> dict[str, Any]:
    """Zoo -> `targets` (target -> its kind, counts, and results of all that needs no backbone), models, options.

    Embeddings that are pooled otherwise than by their mean have the pooling in their name: "pca, layers".
    """
    controls: dict[str, Any] = {}
    for step, zoo, pooling in {(e.evaluations[0].folder, e.dataset, e.pooling): e for e in entries}:
        found = json.loads((work_dir / step / PROBE_FILE).read_text(encoding="utf-8"))
        facts = {"targets": rounded(found["targets"]), **kept(found, _FACTS)}
        if pooling != "mean":
            for key in ("sizes", "skipped"):
                facts[key] = {f"{name}, {pooling}": value for name, value in facts[key].items()}
            for own in facts["targets"].values():
                own["results"] = {
                    f"{name}, {pooling}" if name in found["sizes"] else name: one
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


def _probe(step: Step, work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / step.folder / PROBE_FILE).read_text(encoding="utf-8"))
