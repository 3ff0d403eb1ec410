"""Who made a model, under which license, of which family, for which task: as far as its own files say."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelInfo, metadata_load

from modeling_wsl.checkpoints.errors import CheckpointError, read_json

from .card.composition import describe
from .sources import ModelSource


logger = logging.getLogger(__name__)
# `owner--repository--file`, and the Hub cache's `models--owner--name`
FOLDER_NAME = re.compile(r"(?:models--)?(?P<owner>[\w][\w.-]*?)--[\w].*")
REPOSITORY_URL = re.compile(r"https?://(?:www\.)?(?:github\.com|gitlab\.com|huggingface\.co|hf\.co)/([\w.-]+)/[\w.-]+")


@dataclass(frozen=True)
class ModelFacts:
    """Columns of the config `models`; None is unknown."""

    source: str | None
    revision: str | None
    owner: str | None
    license: str | None
    library: str | None
    architecture: str | None
    family: str | None
    task: str | None
    training_data: str | None
    base_model: str | None


@dataclass(frozen=True)
class HubFacts:
    """Facts of a model on the Hub: its tags, and its card's front matter with `library_name` and `pipeline_tag`."""

    tags: Sequence[str] = ()
    card: Mapping[str, Any] = field(default_factory=dict)


def find_facts(
    source: ModelSource,
    config: Mapping[str, Any],
    library: str | None,
    commit: str | None,
    hub: HubFacts | None = None,
) -> ModelFacts:
    """Reads the facts of a model; what is said first counts: a list of models, `model.json`, `config.json`, the
    card's front matter, the folder's name. Nothing is guessed from the weights.

    Args:
        source: the model.
        config: its parsed `config.json` or `adapter_config.json`, `{}` where there is none.
        library: "timm", "transformers" or "peft", where known.
        commit: of a model on the Hub.
        hub: what the Hub says; None asks it, for a model that is there.
    """
    record = _record(source)
    hub = hub or (HubFacts(card=_card(source)) if source.path else ask_hub(source))
    card = hub.card
    pretrained = config.get("pretrained_cfg")  # timm's, with its license
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    given = source.facts
    stated_family = _first(given.get("family"), record.get("family"))
    base_model = _first(config.get("base_model_name_or_path"))
    adapter = (
        f"{config['peft_type'].lower()} of {base_model}" if _first(config.get("peft_type")) and base_model else None
    )
    composition = describe(
        _first(record.get("source")) or source.model_id,
        config=config,
        tags=hub.tags,
        card=card,
        architecture=_first(config.get("architecture"), record.get("architecture"), config.get("model_type"), adapter),
        task=_first(given.get("task"), record.get("task")),
    )
    return ModelFacts(
        source=_first(record.get("source"), source.label),
        revision=_first(commit, source.revision, record.get("revision"), record.get("commit")),
        owner=_first(given.get("owner"), record.get("owner"), _owner(source, record)),
        license=_first(
            given.get("license"),
            record.get("license"),
            record.get("licence"),
            pretrained.get("license"),
            license_of_card(card),
        ),
        library=_first(record.get("library"), library, card.get("library_name")),
        architecture=composition.architecture,
        family=stated_family or composition.family,
        task=composition.task,
        training_data=_first(record.get("training_data"), record.get("trained_on")) or composition.training_data,
        base_model=composition.base_model,
    )


def license_of_card(card: Mapping[str, Any]) -> str | None:
    """The license that a card's front matter names; its own name where the Hub has none for it."""
    return _first(card.get("license_name"), card.get("license"))


def _first(*values: Any) -> str | None:
    """The first value that says anything; lists (of licenses) are joined, other types are not facts."""
    for value in values:
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            return ", ".join(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def _owner(source: ModelSource, record: Mapping[str, Any]) -> str | None:
    repository = _first(record.get("repo"), record.get("repository"), record.get("repo_id"))
    if repository and "/" in repository:
        return repository.split("/")[0]
    if match := REPOSITORY_URL.match(_first(record.get("source")) or ""):
        return match[1]
    if source.path is None:
        return source.location.split("/")[0]
    folders = reversed(source.label.split("/"))
    return next((match["owner"] for part in folders if (match := FOLDER_NAME.fullmatch(part))), None)


def _record(source: ModelSource) -> Mapping[str, Any]:
    """`model.json` in the folder, or `<file's stem>.json` beside a checkpoint file."""
    path = source.path
    if path is None:
        return {}
    record = path / "model.json" if path.is_dir() else path.with_suffix(".json")
    if not record.is_file():
        return {}
    try:
        content = read_json(record, record.name)
    except CheckpointError as error:
        logger.warning("%s: its facts are left out: %s", source.model_id, error)
        return {}
    return content if isinstance(content, dict) else {}


def _card(source: ModelSource) -> Mapping[str, Any]:
    """The front matter of the README.md beside a model's weights."""
    path = source.path / "README.md"
    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (yaml.YAMLError, ValueError, OSError) as error:
        logger.warning("%s: the front matter of README.md is left out: %s", source.model_id, error)
        return {}


def ask_hub(source: ModelSource) -> HubFacts:
    """Asks the Hub for a model's facts; gives empty ones, with a warning, where it does not answer."""
    try:
        info = HfApi().model_info(source.reference.location, revision=source.revision)
    except Exception as error:  # its client raises errors of three libraries; facts are no reason to stop
        logger.warning("%s: the Hub does not give its license and task (%r)", source.model_id, error)
        return HubFacts()
    return hub_facts(info)


def hub_facts(info: ModelInfo) -> HubFacts:
    """The facts in an answer of the Hub."""
    said = {"library_name": info.library_name, "pipeline_tag": info.pipeline_tag}
    return HubFacts(tuple(info.tags or ()), {**said, **(info.card_data.to_dict() if info.card_data else {})})
