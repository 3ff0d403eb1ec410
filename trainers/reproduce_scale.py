"""What the names in the paper's tables stand for at a scale: models, backbones, architectures, data, protocols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_scripts.config_sources import ConfigError, build, nearest, option, read_yaml

from .paper_tables import DISTRIBUTIONS, NAMES, TABLES, PaperTable, load_table
from .pretrain_config import find_recipe


SCALES = ("paper", "small")
_KEYS = {
    "datasets": ("options", "model_options", "training", "anchors"),
    "texts": ("options", "model_options", "training", "anchors"),
    "architectures": ("group", "target", "target_kwargs", "transformers", "anchors", "options"),
    "collections": ("collect", "given", "exclude", "trained", "fraction_of", "fraction", "tokenize"),
    "backbones": ("recipe", "collection", "options", "arms"),
    "tables": ("architectures", "datasets", "rows", "difference"),
}


@dataclass(frozen=True)
class Scale:
    """A scale file, `tables/scales/<name>.yaml` or one's own. Every name in it is resolved when it is read.

    Raises:
        ConfigError: an unknown key or name, with the nearest known one.
    """

    name: str = option("", "Of the scale; part of the results' file names.")
    about: str = option("", "What the scale is, for the results page.")
    datasets: dict = option(
        {}, "Images: name -> options of ImageDataConfig, training of its anchors, or where anchors come from."
    )
    texts: dict = option({}, "Texts: name -> options of TextDataConfig, training of its anchors.")
    architectures: dict = option(
        {}, "Name -> group, timm name or transformers config, published anchors, evaluation options."
    )
    collections: dict = option({}, "Name -> which models are tokenized, and how.")
    backbones: dict = option({}, "Name -> recipe, collection, options of PretrainConfig.")
    training: dict = option({}, "Options of FinetuneConfig for anchors and zoos that are trained here.")
    protocols: dict = option({}, "Kind of table -> options of EvaluateConfig.")
    tables: dict = option(
        {}, "Table -> architectures, data sets, rows, and the difference from the paper's set-up in words."
    )

    def __post_init__(self) -> None:
        for section, keys in _KEYS.items():
            for name, entry in getattr(self, section).items():
                for key in entry:
                    self._require(key, keys, f"{section}.{name}: unknown key")
        for name, collection in self.collections.items():
            for architecture in collection.get("trained", {}).get("architectures", ()):
                self._require(architecture, self.architectures, f"collections.{name}: unknown architecture")
            for dataset in collection.get("trained", {}).get("datasets", ()):
                self._require(dataset, self.datasets, f"collections.{name}: unknown data set")
            if "fraction_of" in collection:
                self._require(collection["fraction_of"], self.collections, f"collections.{name}: unknown collection")
        for name, backbone in self.backbones.items():
            self._require(backbone["collection"], self.collections, f"backbones.{name}: unknown collection")
            if not find_recipe(backbone["recipe"]).is_file():
                raise ConfigError(f"scale '{self.name}': backbones.{name}: there is no recipe '{backbone['recipe']}'")
        for name, entry in self.tables.items():
            self._require(name, NAMES, "tables: unknown table")
            self._check_table(load_table(name), entry)

    def _check_table(self, table: PaperTable, entry: Mapping[str, Any]) -> None:
        for label in entry.get("rows", ()):
            self._require(label, table.backbones, f"tables.{table.name}: unknown row")
        for _, names in self.rows(table):
            for backbone in names:
                self._require(backbone, self.backbones, f"tables.{table.name}: unknown backbone")
        for architecture in entry["architectures"]:
            self._require(architecture, self.architectures, f"tables.{table.name}: unknown architecture")
        for dataset in entry["datasets"]:
            known = {**self.datasets, **self.texts}
            self._require(dataset, known, f"tables.{table.name}: unknown data set")
        if table.kind != DISTRIBUTIONS:
            self._require(table.kind, self.protocols, f"tables.{table.name}: no protocol")

    def _require(self, name: str, known: Iterable[str], what: str) -> None:
        if name not in known:
            raise ConfigError(f"scale '{self.name}': {what} '{name}'.{nearest(str(name), map(str, known))}")

    def rows(self, table: PaperTable) -> list[tuple[str, list[str]]]:
        """(label, names of backbones) of a table's rows that this scale has."""
        chosen = self.tables[table.name].get("rows") or list(table.backbones)
        return [(label, table.backbones[label]) for label in chosen]

    def require_table(self, name: str) -> None:
        """Raises ConfigError where the scale does not have the table."""
        self._require(name, self.tables, "this scale does not have")


def load_scale(scale: str) -> Scale:
    """A scale by its name (`paper`, `small`) or the path of a YAML file.

    Raises:
        ConfigError: neither; or see `Scale`.
    """
    shipped = TABLES / "scales" / f"{scale}.yaml"
    if scale in SCALES:
        return build(Scale, (str(shipped), {"name": scale, **read_yaml(shipped)}))
    if not Path(scale).is_file():
        raise ConfigError(
            f"--scale '{scale}' is neither a file nor one of {', '.join(SCALES)}.{nearest(scale, SCALES)}"
        )
    return build(Scale, (scale, {"name": Path(scale).stem, **read_yaml(scale)}))
