"""The meaning of the names in the paper's tables at a scale: models, backbones, architectures, data, protocols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_scripts.embedding.embed_config import POOLINGS
from hf_wsl.options import ConfigError, build, nearest, option, read_yaml

from ..training_options import recipe_path
from .paper_tables import DISTRIBUTIONS, NAMES, PROBING, TABLES, PaperTable, load_table


SCALES = ("paper", "small")
_KEYS = {
    "datasets": ("options", "model_options", "training", "anchors"),
    "texts": ("options", "model_options", "training", "anchors"),
    "architectures": ("group", "target", "target_kwargs", "transformers", "anchors", "options"),
    "zoos": ("dataset", "data", "options", "given", "include", "probe"),
    "collections": ("collect", "given", "exclude", "trained", "zoo", "fraction_of", "fraction", "tokenize"),
    "backbones": ("recipe", "collection", "options", "arms"),
    "tables": ("architectures", "datasets", "zoos", "poolings", "rows", "backbones", "difference"),
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
    zoos: dict = option(
        {},
        "Name -> a zoo that is trained here (options of ZooConfig, all of its images) or given; how it is probed.",
    )
    collections: dict = option({}, "Name -> which models are tokenized, and how.")
    backbones: dict = option({}, "Name -> recipe, collection, options of PretrainConfig.")
    training: dict = option({}, "Options of FinetuneOptions for anchors and zoos that are trained here.")
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
            if "zoo" in collection:
                self._require(collection["zoo"], self.zoos, f"collections.{name}: unknown zoo")
            if "fraction_of" in collection:
                self._require(collection["fraction_of"], self.collections, f"collections.{name}: unknown collection")
        for name, zoo in self.zoos.items():
            if ("dataset" in zoo) == ("given" in zoo):
                raise ConfigError(f"scale '{self.name}': zoos.{name} takes either 'dataset' or 'given'")
            if "dataset" in zoo:
                self._require(zoo["dataset"], self.datasets, f"zoos.{name}: unknown data set")
        for name, backbone in self.backbones.items():
            self._require(backbone["collection"], self.collections, f"backbones.{name}: unknown collection")
            if not recipe_path(backbone["recipe"]).is_file():
                raise ConfigError(f"scale '{self.name}': backbones.{name}: there is no recipe '{backbone['recipe']}'")
        for name, entry in self.tables.items():
            self._require(name, NAMES, "tables: unknown table")
            self._check_table(load_table(name), entry)

    def _check_table(self, table: PaperTable, entry: Mapping[str, Any]) -> None:
        for label in (*entry.get("rows", ()), *entry.get("backbones", ())):
            self._require(label, table.backbones, f"tables.{table.name}: unknown row")
        for _, names in self.rows(table):
            for backbone in names:
                self._require(backbone, self.backbones, f"tables.{table.name}: unknown backbone")
        if table.kind == PROBING:
            for pooling in entry["poolings"]:
                self._require(pooling, POOLINGS, f"tables.{table.name}: unknown pooling")
            for zoo in entry["zoos"]:
                self._require(zoo, self.zoos, f"tables.{table.name}: unknown zoo")
        for architecture in entry.get("architectures", ()):
            self._require(architecture, self.architectures, f"tables.{table.name}: unknown architecture")
        for dataset in entry.get("datasets", ()):
            known = {**self.datasets, **self.texts}
            self._require(dataset, known, f"tables.{table.name}: unknown data set")
        if table.kind != DISTRIBUTIONS:
            self._require(table.kind, self.protocols, f"tables.{table.name}: no protocol")

    def _require(self, name: str, known: Iterable[str], what: str) -> None:
        if name not in known:
            raise ConfigError(f"scale '{self.name}': {what} '{name}'.{nearest(str(name), map(str, known))}")

    def rows(self, table: PaperTable) -> list[tuple[str, list[str]]]:
        """(label, names of backbones) of a table's rows that this scale has; it may name backbones of its own."""
        place = self.tables[table.name]
        backbones = {**table.backbones, **place.get("backbones", {})}
        return [(label, backbones[label]) for label in place.get("rows") or table.backbones]

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
