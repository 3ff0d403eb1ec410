"""The steps of a set of tables: models to train, collections to tokenize, backbones to train, evaluations.

A step's folder has a name that follows from all that decides its outcome, the steps that it needs included. So a step
is shared by every table that needs it, and a changed setting never mixes with an older result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasets_scripts.embedding.embed_config import METHODS, TOKEN_METHODS
from datasets_scripts.sources import expand_sources
from hf_wsl.files import sha256
from hf_wsl.options import ConfigError, nearest, read_yaml
from modeling_wsl import WSLConfig

from ..evaluation.evaluate_config import ON_REQUEST
from ..pretraining.pretrain_options import PretrainOptions
from ..training_options import recipe_path
from .paper_tables import DISTRIBUTIONS, FEW_SHOT, PROBING, PaperTable
from .scale import Scale


MODEL, ZOO, TOKENS, BACKBONE = "model", "zoo", "tokens", "backbone"
EVALUATION, RECONSTRUCTION, PROBE = "evaluation", "reconstruction", "probe"
# Kind of step -> its folder below the work folder; in the order in which they are done.
FOLDERS = {
    MODEL: "models",
    ZOO: "zoos",
    TOKENS: "tokens",
    BACKBONE: "backbones",
    EVALUATION: "evaluations",
    RECONSTRUCTION: "reconstructions",
    PROBE: "probes",
}
FEW_SHOT_ANCHORS = 5  # paper, appendix C.2
# Arms by what their weights depend on: nothing but the anchor; the training tokens too; the backbone too.
CONTROLS = ("scratch", "anchor", "anchor permuted")
PROJECTIONS = ("PCA", "random projection")
GENERATED = ("generated", "reconstructed", "anchor + noise", "anchor rotated", "inherited only")


@dataclass(frozen=True)
class Given:
    """Where the user's own data lie: name in the scale -> path or Hub id."""

    images: Mapping[str, str] = field(default_factory=dict)
    text: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One piece of work with a folder of its own.

    Attributes:
        kind: one of `FOLDERS`.
        name: for people.
        settings: all that decides the outcome beside `needs`; JSON.
        needs: steps that come first.
    """

    kind: str
    name: str
    settings: Mapping[str, Any]
    needs: tuple[Step, ...] = ()

    @cached_property
    def folder(self) -> str:
        """Below the work folder: `<kind>/<name>-<digest>`."""
        content = json.dumps([self.kind, self.settings, [need.folder for need in self.needs]], sort_keys=True)
        return f"{FOLDERS[self.kind]}/{self.name.replace(' ', '_')}-{sha256(content)[:10]}"

    def needed(self, kind: str) -> list[Step]:
        return [need for need in self.needs if need.kind == kind]

    @property
    def num_runs(self) -> int:
        """Fine-tuned or measured models of an evaluation, at least."""
        return self.settings["options"].get("seeds", 1) * len(self.settings["arms"])


@dataclass(frozen=True)
class Entry:
    """One architecture on one data set (or one zoo, as `dataset`) for one row of a table, and the steps with its
    figures."""

    row: str
    backbone: str
    architecture: str | None
    dataset: str
    evaluations: tuple[Step, ...]
    backbone_step: Step
    pooling: str | None = None  # of embeddings that are probed


class Planner:
    """Turns tables into entries and steps.

    Args:
        scale: what the tables' names stand for.
        given: where the user's data lie.

    Raises:
        ConfigError: a name in `given` that the scale does not have.
    """

    def __init__(self, scale: Scale, given: Given) -> None:
        self.scale, self.given = scale, given
        names = {
            "--images": (given.images, scale.datasets),
            "--text": (given.text, scale.texts),
            "--models": (given.models, _model_names(scale)),
        }
        for flag, (values, known) in names.items():
            for name in values:
                if name not in known:
                    raise ConfigError(f"{flag} {name}=…: scale '{scale.name}' has no such name.{nearest(name, known)}")
        self.missing: dict[str, str] = {}  # what must be given -> why

    def entries(self, table: PaperTable) -> list[Entry]:
        """The entries of one table; what is missing from `given` is noted in `missing`."""
        self.scale.require_table(table.name)
        place = self.scale.tables[table.name]
        entries = []
        for row, backbones in self.scale.rows(table):
            for backbone in backbones:
                step = self.backbone(backbone)
                if table.kind == PROBING:
                    pairs = [(zoo, pooling) for zoo in place["zoos"] for pooling in place["poolings"]]
                    for zoo, pooling in pairs:
                        entries.append(
                            Entry(row, backbone, None, zoo, self._probes(step, zoo, pooling), step, pooling)
                        )
                    continue
                for architecture in place["architectures"]:
                    for dataset in place["datasets"]:
                        steps = self._evaluations(table.kind, step, architecture, dataset)
                        entries.append(Entry(row, backbone, architecture, dataset, steps, step))
        return entries

    def require_given(self) -> None:
        """Raises ConfigError where data are missing, with the options that would give them."""
        if self.missing:
            lines = "; ".join(f"{option} ({why})" for option, why in self.missing.items())
            raise ConfigError(f"scale '{self.scale.name}' needs data that were not given: {lines}")

    def backbone(self, name: str) -> Step:
        spec = self.scale.backbones[name]
        recipe = read_yaml(recipe_path(spec["recipe"]))  # an edited recipe is another step
        settings = {"recipe": spec["recipe"], "recipe_options": recipe, "options": spec.get("options") or {}}
        return Step(BACKBONE, name, settings, (self.tokens(spec["collection"]),))

    def tokens(self, name: str) -> Step:
        spec = self.scale.collections[name]
        if "collect" in spec:
            return Step(TOKENS, name, {"collect": spec["collect"]})
        if "zoo" in spec:
            settings = {"sources": [], "tokenize": spec.get("tokenize") or {}}
            return Step(TOKENS, name, settings, (self.zoo(spec["zoo"]),))
        sources, members = self._members(name)
        settings = {"sources": sources, "tokenize": spec.get("tokenize") or {}}
        return Step(TOKENS, name, settings, tuple(members))

    def _members(self, name: str) -> tuple[list[str], list[Step]]:
        """The models of a collection: paths or ids that were given, and steps that train others."""
        spec = self.scale.collections[name]
        if "fraction_of" in spec:
            sources, members = self._members(spec["fraction_of"])
            return _evenly(sources, spec["fraction"]), _evenly(members, spec["fraction"])
        given = [self._given("models", source, f"collection {name}") for source in spec.get("given", ())]
        sources = [location for source in given for location in _chosen(source, exclude=spec.get("exclude", ()))]
        trained = spec.get("trained", {})
        members = [
            self.model(architecture, dataset, seed)
            for architecture in trained.get("architectures", ())
            for dataset in trained.get("datasets", ())
            for seed in trained.get("seeds", ())
        ]
        return sources, members

    def model(self, architecture: str, dataset: str, seed: int) -> Step:
        """A model of an architecture that is trained here on a data set."""
        settings = {
            "architecture": self._built(architecture),
            "data": self._data(dataset, self._dataset(dataset).get("model_options", {})),
            "training": {**self.scale.training, **self._dataset(dataset).get("training", {}), "seed": seed},
        }
        return Step(MODEL, f"{architecture}-{dataset}-{seed}", settings)

    def zoo(self, name: str) -> Step:
        """A zoo that is trained here; of the data set only the place is taken over, not its options."""
        spec = self.scale.zoos[name]
        data = self._data(spec["dataset"])
        images = {"images": data["path"], **spec.get("data", {})}
        return Step(ZOO, name, {"options": {**spec.get("options", {}), "data": images}})

    def _probes(self, backbone: Step, name: str, pooling: str) -> tuple[Step, ...]:
        """The probe of what needs no backbone, which all backbones share, and that of the backbone and its untrained
        twin."""
        spec = self.scale.zoos[name]
        options = {**self.scale.protocols[PROBING], **spec.get("probe", {}), "pooling": pooling}
        baselines = options.pop("baselines", METHODS)
        if pooling != "mean":  # statistics of weights have no other
            baselines = [name for name in baselines if name in TOKEN_METHODS]
        if "given" in spec:
            source = self._given("models", spec["given"], f"zoo {name}")
            settings, needs = {"sources": _chosen(source, include=spec.get("include", ()))}, ()
        else:
            settings, needs = {"sources": []}, (self.zoo(name),)
        common = {**settings, "options": options}
        return (
            Step(PROBE, f"{name}-{pooling}-baselines", {**common, "baselines": list(baselines)}, needs),
            Step(PROBE, f"{name}-{pooling}-{backbone.name}", {**common, "baselines": ["-"]}, (backbone, *needs)),
        )

    def _evaluations(self, kind: str, backbone: Step, architecture: str, dataset: str) -> tuple[Step, ...]:
        """The steps with the figures of an entry. Controls that do not depend on the backbone are a step of their own,
        which all backbones share."""
        sources, members = self._anchors(architecture, dataset, FEW_SHOT_ANCHORS if kind == FEW_SHOT else 1)
        name = f"{architecture}-{dataset}"
        common = {"architecture": self._built(architecture), "anchors": sources}
        if kind == DISTRIBUTIONS:
            return (Step(RECONSTRUCTION, f"{name}-{backbone.name}", common, (backbone, *members)),)
        protocol = _merged(self.scale.protocols[kind], self.scale.architectures[architecture].get("options", {}))
        common |= {"data": self._data(dataset), "options": protocol}
        tokens = backbone.needs[0]
        projections = {**common, "arms": PROJECTIONS, "latent_size": _latent_size(backbone)}
        asked = GENERATED + tuple(arm for arm, option in ON_REQUEST.items() if protocol.get(option))
        generated = tuple(self.scale.backbones[backbone.name].get("arms", asked))
        return (
            Step(EVALUATION, f"{name}-{kind}-controls", {**common, "arms": CONTROLS}, tuple(members)),
            Step(EVALUATION, f"{name}-{kind}-{tokens.name}", projections, (tokens, *members)),
            Step(EVALUATION, f"{name}-{kind}-{backbone.name}", {**common, "arms": generated}, (backbone, *members)),
        )

    def _anchors(self, architecture: str, dataset: str, count: int) -> tuple[list[str], list[Step]]:
        published = self.scale.architectures[architecture].get("anchors")
        if published:
            return published[:count], []
        name = self._dataset(dataset).get("anchors")
        if name is None:
            return [], [self.model(architecture, dataset, seed) for seed in range(count)]
        folder = self._given("models", name, f"anchors for {dataset}")
        if name not in self.given.models:
            return [folder], []
        models = expand_sources([folder])
        if len(models) < count:
            raise ConfigError(f"--models {name}={folder}: {count} anchors are needed, it holds {len(models)}")
        return [model.location for model in models[:count]], []

    def _built(self, architecture: str) -> dict[str, Any]:
        spec = self.scale.architectures[architecture]
        return {key: spec[key] for key in ("target", "target_kwargs", "transformers") if key in spec}

    def _dataset(self, name: str) -> dict[str, Any]:
        return self.scale.texts[name] if name in self.scale.texts else self.scale.datasets[name]

    def _data(self, name: str, over: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        kind = "text" if name in self.scale.texts else "images"
        path = self._given(kind, name, "text" if kind == "text" else "images")
        return {"kind": kind, "path": path, "options": {**self._dataset(name).get("options", {}), **over}}

    def _given(self, kind: str, name: str, why: str) -> str:
        """A path or id of the user's, as it was given; one that is missing is noted and stands as its name."""
        value = getattr(self.given, kind).get(name)
        if value is None:
            self.missing.setdefault(f"--{kind} {name}=PATH", why)
            return f"<{name}>"
        path = Path(value).expanduser()
        if path.exists():
            return str(path.absolute())
        if value.startswith((".", "/", "~")) or value.count("/") != 1:
            raise ConfigError(f"--{kind} {name}={value}: there is no such path, and it is no id of the Hub (org/name)")
        return value


def ordered_steps(entries: Sequence[Entry]) -> list[Step]:
    """Every step once, those needed first, by kind."""
    by_folder: dict[str, Step] = {}

    def visit(step: Step) -> None:
        for need in step.needs:
            visit(need)
        by_folder.setdefault(step.folder, step)

    for entry in entries:
        visit(entry.backbone_step)
        for step in entry.evaluations:
            visit(step)
    return sorted(by_folder.values(), key=lambda step: list(FOLDERS).index(step.kind))


def _chosen(source: str, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The models of a folder whose id matches a pattern, or all, but those that match one to exclude; the source as it
    is where there are no patterns."""
    if not (include or exclude) or source.startswith("<"):
        return [source]

    def matches(model_id: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch(model_id, pattern) for pattern in patterns)

    models = expand_sources([source])
    return [m.location for m in models if matches(m.model_id, include or ["*"]) and not matches(m.model_id, exclude)]


def _model_names(scale: Scale) -> set[str]:
    named = {name for spec in scale.collections.values() for name in spec.get("given", ())}
    named |= {spec["given"] for spec in scale.zoos.values() if "given" in spec}
    return named | {spec["anchors"] for spec in scale.datasets.values() if "anchors" in spec}


def _merged(options: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Options under others; groups of options are merged key by key."""
    groups = {name: {**options[name], **value} for name, value in over.items() if isinstance(options.get(name), dict)}
    return {**options, **over, **groups}


def _latent_size(backbone: Step) -> int:
    config = PretrainOptions.from_yaml(backbone.settings["recipe"], **backbone.settings["options"])
    return WSLConfig.from_size(config.size, **config.model).latent_size


def _evenly(models: list, fraction: float) -> list:
    """That share of a list, at least one where there is any, evenly spaced."""
    if not models:
        return []
    count = max(1, round(fraction * len(models)))
    return [models[index * len(models) // count] for index in range(count)]
