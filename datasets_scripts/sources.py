"""From the paths and Hub ids that a user names to a list of models, in an order that does not change between runs."""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from hf_wsl.files import sha256
from modeling_wsl.checkpoints.checkpoint import list_models
from modeling_wsl.checkpoints.errors import CheckpointError, read_json
from modeling_wsl.checkpoints.folders import own_files, survey
from modeling_wsl.checkpoints.hub import is_hub_id
from modeling_wsl.checkpoints.reference import ALL, Reference, exists, parse_reference

from .populations import MATRIX, is_matrix_zoo, matrix_rows, properties_of, table_models
from .tokenize_config import TokenizeError


LIST_SUFFIXES = (".txt", ".json", ".jsonl")
# A folder with these two is a zoo: its models have the ids of its table, "member_0003/epoch_005".
ZOO_TABLE, ZOO_MODELS = "properties.parquet", "models"
PROPERTIES_FILE = "properties.json"  # beside a model of a zoo
MAX_DEPTH = 64  # of folders in folders


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """One model to tokenize.

    Attributes:
        model_id: unique in the dataset.
        location: for `open_checkpoint`: an absolute path or a Hub id, with `:subfolder` and `#key` if given.
        label: as the user would name it again; no folder outside of what was named shows in it.
        revision: of a Hub id; None is the newest.
        facts: columns of the config `models` that a list of models gave (`license`, `family`, ...).
        properties: what the zoo that it is of tells of it (`test_acc`, `member`, `epoch`, ...; see `populations.py`).
    """

    model_id: str
    location: str
    label: str
    revision: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path | None:
        """The file or folder; None for a model on the Hub."""
        reference = parse_reference(self.location)
        path = Path(reference.location, reference.subfolder)
        return path if path.is_absolute() else None

    @property
    def reference(self) -> Reference:
        """As one can name the model again, on this machine."""
        return parse_reference(self.location).with_options(revision=None if self.path else self.revision)

    def fingerprint(self) -> str:
        """A hash that tells that a source changed, of revision, facts, and each file's name, size and time.

        To a checkpoint file belongs its record, `<stem>.json` beside it.
        """
        state: list[Any] = [self.location if self.path is None else self.label, self.revision, dict(self.facts)]
        if self.path is not None:
            own = [self.path, self.path.with_suffix(".json")] if self.path.is_file() else own_files(self.path)
            files = [path for path in own if path.is_file()]
            state += [key] if (key := parse_reference(self.location).key) is not None else []
            state += [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
        return sha256(json.dumps(state, sort_keys=True))[:32]


def expand_sources(sources: Iterable[str | PathLike]) -> list[ModelSource]:
    """Expands what a user names into models.

    Args:
        sources: any of: a model's folder (`config.json`, `adapter_config.json`, `model.json`, an index of shards, or a
            single weight file in it); a folder of such folders or of checkpoint files, searched to any depth in order
            of names, hidden files left out; a lab zoo, whose models have the ids of its table, behind the zoo's name
            (`zoo/member_0003/epoch_005`) where several zoos are named; a checkpoint file; a Hub id; a part of
            these, as a reference (`org/name:subfolder#key@revision`, `file.pt#ema`, `file.pt#all`: each state dict); a
            list of these, `.txt` (one a line, comments behind a # that white space precedes) or `.json`/`.jsonl` of
            strings or of objects with `source` and any of `model_id`, `revision`, `owner`, `license`, `family`,
            `task`; paths in a list are relative to its file.

    Returns:
        Each model once, in the order named.

    Raises:
        TokenizeError: a name that is neither a path nor a Hub id, a folder without models, a list that cannot be read,
            two models with one id.
    """
    unique: dict[tuple[str, str | None], ModelSource] = {}
    sources = [str(source) for source in sources]
    zoos = zoo_folders(sources)
    for source in sources:
        models = _expand(source, Path.cwd(), {})
        if len(zoos) > 1 and (zoo := zoo_folder(source)):
            models = [replace(model, model_id=f"{zoo.name}/{model.model_id}") for model in models]
        for model in models:
            unique.setdefault((model.location, model.revision), model)
    models = list(unique.values())
    by_id: dict[str, list[ModelSource]] = {}
    for model in models:
        by_id.setdefault(model.model_id, []).append(model)
    for model_id, same in by_id.items():
        if len(same) > 1:
            raise TokenizeError(
                f"{len(same)} models have the id {model_id!r}: {', '.join(m.location for m in same[:3])}. "
                "Give them ids in a JSON list of objects with source and model_id."
            )
    if not models:
        raise TokenizeError("No sources were given. Name folders, checkpoint files, Hub ids or lists of them.")
    return models


def source_state(source: str) -> str:
    """A model as it was named; of a local one, also a hash that tells when it has changed."""
    if not exists(parse_reference(source).location):
        return source
    model = expand_sources([source])[0]
    return f"{model.location} {model.fingerprint()}"


def zoo_folder(source: str | PathLike) -> Path | None:
    """The absolute path of a source that is a zoo, None of any other."""
    path = Path(os.path.abspath(Path(source).expanduser()))
    return path if (path / ZOO_TABLE).is_file() and (path / ZOO_MODELS).is_dir() else None


def zoo_folders(sources: Iterable[str | PathLike]) -> list[Path]:
    """Those of the sources that are zoos, each once."""
    return list(dict.fromkeys(zoo for source in sources if (zoo := zoo_folder(source))))


def _expand(source: str, base: Path, facts: dict[str, Any]) -> list[ModelSource]:
    # Not resolved: in the Hub's cache the link has the name, the file behind it is called by its hash.
    path = Path(os.path.abspath(base / Path(source).expanduser()))
    path = path / ZOO_MODELS if zoo_folder(path) else path
    if path.is_dir():
        models = [model for p in _models_below(path, path, set()) for model in _local_models(p, path, facts)]
        if not models:
            raise TokenizeError(f"{source}: this folder holds no model: no weight file at any depth, no config.json.")
        return models
    if path.is_file():
        if path.suffix in LIST_SUFFIXES:
            return [m for entry, more in _read_list(path) for m in _expand(entry, path.parent, {**facts, **more})]
        if (listed := table_models(path)) is not None:
            return [
                replace(m, properties=known) for name, known in listed for m in _expand(name, path.parent, {**facts})
            ]
        return _local_models(path, path.parent, facts)
    reference = _reference(source, base)
    if reference.key == ALL:
        return _state_dicts(source, reference, base, facts)
    local = Path(reference.location).is_absolute()
    if local and exists(reference.location) and reference.revision is None:
        path = Path(reference.location, reference.subfolder)
        if not path.exists():
            raise TokenizeError(f"{source}: {reference.location} has no {reference.subfolder} inside.")
        named = str(replace(reference, location=os.path.basename(reference.location)))
        return [ModelSource(facts.pop("model_id", named), str(reference), named, facts.pop("revision", None), facts)]
    if is_hub_id(reference.location):
        reference = reference.with_options(revision=facts.pop("revision", None))
        named = str(replace(reference, revision=None))
        return [ModelSource(facts.pop("model_id", named), named, named, reference.revision, facts)]
    raise TokenizeError(
        f"{source}: there is no such file or folder, and it is not a Hub id (org/name:subfolder#key@revision)."
    )


def _reference(source: str, base: Path) -> Reference:
    """A reference; its location is an absolute path where there is such a file or folder, seen from `base`."""
    absolute = parse_reference(os.path.abspath(base / Path(source).expanduser()))
    return absolute if exists(absolute.location) else parse_reference(source)


def _state_dicts(source: str, reference: Reference, base: Path, facts: dict[str, Any]) -> list[ModelSource]:
    """The models of `file#all`; where the file cannot be read one model, which says why when it is opened."""
    try:
        references = list_models(reference)
    except CheckpointError:
        references = [replace(reference, key=None)]
    models = []
    for one in references:
        given = dict(facts)
        if len(references) > 1 and "model_id" in given:
            given["model_id"] = str(Reference(given["model_id"], key=one.key))
        models += _expand(str(one), base, given)
    return models


def _models_below(folder: Path, root: Path, seen: set[str]) -> list[Path]:
    """Files and folders that are models, in order of names. A folder that was seen, by whatever name, is not again."""
    real, top = os.path.realpath(folder), os.path.realpath(root)
    inside = folder.relative_to(root)
    if folder != root and (Path(real).is_relative_to(top) and folder.is_symlink() or Path(top).is_relative_to(real)):
        # What it leads to has its turn under its own name.
        logger.info("%s: passed over, a link to a folder that is looked through anyway", inside)
        return []
    if real in seen or len(inside.parts) > MAX_DEPTH:
        logger.info("%s: passed over, %s", inside, "seen by another name" if real in seen else "too deep")
        return []
    seen.add(real)
    if is_matrix_zoo(folder):
        return [folder]
    try:
        there = survey(folder)
    except OSError as error:
        logger.warning("%s: passed over, it cannot be looked through (%s)", inside, error)
        return []
    for line in there.passed_over:
        logger.info("%s", inside / line)
    models = [folder] if there.is_model else []
    for name in sorted([*there.files, *there.folders]):
        path = folder / name
        models += _models_below(path, root, seen) if name in there.folders else [path]
    return models


def _local_models(path: Path, root: Path, facts: dict[str, Any]) -> list[ModelSource]:
    """A file or folder as the model that it is; the folder of a matrix as the models that are its rows."""
    if not (path.is_dir() and is_matrix_zoo(path)):
        return [replace(_local_model(path, root, facts), properties=properties_of(path))]
    zoo = _local_model(path, root, facts)
    above = "" if path == root else f"{zoo.model_id}/"
    return [
        replace(
            zoo,
            model_id=f"{above}{row}",
            location=f"{path / MATRIX}#{row}",
            label=f"{zoo.label}/{MATRIX}#{row}",
            properties=known,
        )
        for row, known in enumerate(matrix_rows(path))
    ]


def _local_model(path: Path, root: Path, facts: dict[str, Any]) -> ModelSource:
    inside = path.relative_to(root).as_posix()
    label = root.name if inside == "." else f"{root.name}/{inside}"
    facts = dict(facts)
    model_id = facts.pop("model_id", None) or _own_id(path) or (path.name if inside == "." else inside)
    return ModelSource(model_id, str(path), label, facts.pop("revision", None), facts)


def _own_id(path: Path) -> str | None:
    """The id in a folder's model.json. A file that cannot be read is reported when the model is opened."""
    record = path / "model.json"
    if not record.is_file():
        return None
    try:
        content = read_json(record, "model.json")
    except CheckpointError:
        return None
    identity = content.get("id") if isinstance(content, dict) else None
    return identity if isinstance(identity, str) and identity else None


def _read_list(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a list of models, each with the facts given beside it."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())  # `file.pt#key` is a name
        return [(line, {}) for line in lines if line]
    try:
        entries = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else None
        entries = json.loads(text) if entries is None else entries
    except ValueError as error:
        raise TokenizeError(f"{path}: this list of models is not valid JSON ({error}).") from error
    if not isinstance(entries, list):
        raise TokenizeError(f"{path}: a list of models is a JSON list of ids or of objects with `source`.")
    return [_list_entry(path, number, entry) for number, entry in enumerate(entries, start=1)]


def _list_entry(path: Path, number: int, entry: Any) -> tuple[str, dict[str, Any]]:
    known = ("model_id", "revision", "owner", "license", "family", "task")
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        raise TokenizeError(f"{path}: entry {number} is neither an id nor an object with `source`.")
    facts = {key: value for key, value in entry.items() if key != "source" and value is not None}
    for key, value in facts.items():
        if key not in known or not isinstance(value, str):
            raise TokenizeError(f"{path}: entry {number}: {key}={value!r}; known are, as text, {', '.join(known)}.")
    return entry["source"], facts
