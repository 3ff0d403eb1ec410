"""Who made a model, under which licence, of which family, for which task: as far as its own files say."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, metadata_load

from modeling_wsl.checkpoint_errors import CheckpointError, read_json

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
    licence: str | None
    library: str | None
    family: str | None
    task: str | None


def find_facts(source: ModelSource, config: Mapping[str, Any], library: str | None, commit: str | None) -> ModelFacts:
    """Reads the facts of a model; what is said first counts: a list of models, `model.json`, `config.json`, the
    card's front matter, the folder's name. Nothing is guessed from the weights.

    Args:
        source: the model.
        config: its parsed `config.json` or `adapter_config.json`, `{}` where there is none.
        library: "timm", "transformers" or "peft", where known.
        commit: of a model on the Hub.
    """
    record, card = _record(source), _card(source)
    pretrained = config.get("pretrained_cfg")  # timm's, with its licence
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    given = source.facts
    url = _first(record.get("source"), source.label)
    base_model = _first(config.get("base_model_name_or_path"))
    return ModelFacts(
        source=url,
        revision=_first(commit, source.revision, record.get("revision"), record.get("commit")),
        owner=_first(given.get("owner"), record.get("owner"), _owner(source, record)),
        licence=_first(
            given.get("licence"),
            record.get("licence"),
            record.get("license"),
            pretrained.get("license"),
            card.get("license_name"),
            card.get("license"),
        ),
        library=_first(record.get("library"), library, card.get("library_name")),
        family=_first(
            given.get("family"),
            record.get("family"),
            config.get("architecture"),
            config.get("model_type"),
            f"{config['peft_type'].lower()} of {base_model}"
            if _first(config.get("peft_type")) and base_model
            else None,
        ),
        task=_first(given.get("task"), record.get("task"), card.get("pipeline_tag")),
    )


def _first(*values: Any) -> str | None:
    """The first value that says anything; lists (of licences) are joined, other types are not facts."""
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
    """The front matter of the model's README.md: beside its weights, or as the Hub knows it."""
    path = source.path
    if path is None:
        return _hub_card(source)
    if not (path / "README.md").is_file():
        return {}
    try:
        return metadata_load(Path(path / "README.md")) or {}
    except (yaml.YAMLError, ValueError, OSError) as error:
        logger.warning("%s: the front matter of README.md is left out: %s", source.model_id, error)
        return {}


def _hub_card(source: ModelSource) -> Mapping[str, Any]:
    try:
        info = HfApi().model_info(source.location, revision=source.revision)
    except Exception as error:  # its client raises errors of three libraries; facts are no reason to stop
        logger.warning("%s: the Hub does not give its licence and task (%r)", source.model_id, error)
        return {}
    said = {"library_name": info.library_name, "pipeline_tag": info.pipeline_tag}
    return {**said, **(info.card_data.to_dict() if info.card_data else {})}
