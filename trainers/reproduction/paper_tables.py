"""The tables and figures of the paper that can be run again: what each compares and the paper's own figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_wsl.options import ConfigError, nearest, read_yaml


TABLES = Path(__file__).parent / "tables"
FINE_TUNING, FEW_SHOT, LANGUAGE, DISTRIBUTIONS, PROBING = (
    "fine-tuning",
    "few-shot",
    "language-modeling",
    "weight-distributions",
    "probing",
)
KINDS = (FINE_TUNING, FEW_SHOT, LANGUAGE, DISTRIBUTIONS, PROBING)
NAMES = (
    "table1",
    "table2",
    "table6",
    "table7",
    "table8",
    "table9",
    "table10",
    "table11",
    "table12",
    "figure2",
    "figure3",
    "figure4",
    "figure5",
    "figure6",
    "figure8",
    # ours
    "populations",  # the probe of Table 9 on models that others trained
    "codes",  # Table 8 by the matrix code
)


@dataclass(frozen=True)
class PaperTable:
    """One table or figure of the paper (`tables/<name>.yaml`).

    Attributes:
        name: e.g. "table7".
        title: what is compared.
        kind: one of `KINDS`, which decides the protocol.
        claim: what the paper concludes from it.
        backbones: row label in the paper -> names of backbones in a scale; of several the best counts.
        notes: what a reader must know about the paper's figures.
        paper: the paper's figures in percent: `rows`, or `groups` and `mean`; or `picture_only`; empty where it has no
            such table.
    """

    name: str
    title: str
    kind: str
    claim: str
    backbones: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)
    paper: dict[str, Any] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """As the paper calls it: "Table 7"."""
        return self.name.replace("table", "Table ").replace("figure", "Figure ").capitalize()

    @property
    def is_figure(self) -> bool:
        return self.name.startswith("figure")


def load_table(name: str) -> PaperTable:
    """Reads one. Raises ConfigError on an unknown name, with the nearest known ones."""
    if name not in NAMES:
        raise ConfigError(f"unknown table '{name}'.{nearest(name, NAMES)} Choose among {', '.join(NAMES)}, or all")
    return PaperTable(name=name, **read_yaml(TABLES / f"{name}.yaml"))


def load_tables(names: list[str] | tuple[str, ...]) -> list[PaperTable]:
    """Those named, each once, in the order named; `all` stands for all of them."""
    expanded = [known for name in names for known in (NAMES if name == "all" else (name,))]
    return [load_table(name) for name in dict.fromkeys(expanded)]
