"""The parts of a model and their licenses: its anchors and backbone, or the dataset that it was trained on."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import HfApi, metadata_load

from datasets_scripts.licenses import (
    OTHER,
    REDISTRIBUTABLE,
    UNKNOWN,
    is_redistributable,
    license_ids,
    refusal_reason,
)
from datasets_scripts.model_facts import find_facts
from datasets_scripts.schema import ACCEPTED, CARD_FILE, MODELS
from datasets_scripts.sources import ModelSource
from hf_wsl.tables import code, plain
from modeling_wsl.checkpoints.downloads import fetch
from modeling_wsl.checkpoints.hub import is_hub_id

from .cards import shortened
from .errors import PublishError


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """A model that another is made of.

    Attributes:
        name: its Hub id, or the last part of its path.
        hub_id: None for one that is not on the Hub.
        revision: commit on the Hub.
        sha256: of its weights, where known.
        license: as its own files or the Hub state it, or None.
    """

    name: str
    hub_id: str | None
    revision: str | None
    sha256: str | None
    license: str | None

    def row(self) -> tuple[str, ...]:
        """Cells of a table: name, what identifies its bytes, license."""
        identity = "not noted"
        if self.revision or self.sha256:
            identity = f"commit `{self.revision[:12]}`" if self.revision else f"sha256 `{self.sha256[:12]}`"
        name = f"{code(self.name)} (not on the Hub)"
        if self.hub_id:
            name = f"[{plain(self.name)}](https://huggingface.co/{self.hub_id})"
        return name, identity, plain(self.license or "not stated")


def find_origin(facts: Mapping[str, Any]) -> Origin:
    """Looks up a model that provenance names.

    Args:
        facts: `source` or `name` (path, Hub id with or without a subfolder, or a name in angle brackets of an object
            in memory), `revision` (of a Hub id), `sha256`.
    """
    source, revision, sha256 = (
        str(facts.get("source") or facts.get("name")),
        facts.get("revision"),
        facts.get("sha256"),
    )
    path = Path(source).expanduser().absolute()
    repository = "/".join(source.split("/")[:2])
    if revision is None:  # transformers from 5.24 on does not tell the commit of the backbone that it loaded
        repository = hub_id(source, "model")
    if repository is not None:
        license = find_facts(ModelSource(repository, repository, repository, revision), {}, None, revision).license
        return Origin(source, repository, revision, sha256, license)
    license = None
    if path.exists():
        license = find_facts(ModelSource(path.name, str(path), path.name), {}, None, None).license
    return Origin(shortened(source), None, None, sha256, license)


def hub_id(name: str | None, repo_type: str) -> str | None:
    """The name, if it is that of a repository on the Hub and not of a folder here; `a/b` may be either."""
    if name is None or not is_hub_id(name) or Path(name).expanduser().exists():
        return None
    return name if HfApi().repo_exists(name, repo_type=repo_type) else None


def training_licenses(dataset: str, revision: str | None) -> dict[str | None, int | None]:
    """The licenses of the models in a tokenized dataset, as stated, with how many models are under each.

    Args:
        dataset: folder or Hub id.
        revision: of a Hub id.

    Returns:
        license (None: not stated) -> number of models, None where only the dataset's card tells; empty where the
        dataset cannot be found any more.
    """
    folder = Path(dataset).expanduser()
    if folder.is_dir():
        counts: dict[str | None, int | None] = {}
        for file in sorted((folder / MODELS).glob("*.parquet")):
            for row in pq.read_table(file, columns=["license", "status"]).to_pylist():
                if row["status"] == ACCEPTED:
                    counts[row["license"]] = (counts.get(row["license"]) or 0) + 1
        return dict(sorted(counts.items(), key=lambda item: item[0] or ""))
    if not is_hub_id(dataset):
        return {}
    try:
        card = metadata_load(fetch(dataset, CARD_FILE, repo_type="dataset", revision=revision)) or {}
    except Exception as error:  # of the client, without a common class
        logger.warning("%s: the licenses of its models cannot be read (%r)", dataset, error)
        return {}
    stated = card.get("license") or []
    return dict.fromkeys([stated] if isinstance(stated, str) else map(str, stated))


def settle_license(given: str | None, parts: Iterable[str | None], what: str) -> str:
    """The license to publish something under: the one that is given, or the one that all its parts share.

    Args:
        given: what the publisher says, or None to take that of the parts.
        parts: licenses of what it is made of, as stated.
        what: the parts in words, for messages.

    Returns:
        the Hub's identifier, or the license's own name where the Hub has none for it.

    Raises:
        PublishError: nothing is given and the parts do not all have the same license that lets their weights be passed
            on; or what is given says nothing.
    """
    if given is not None:
        identifiers = license_ids(given)
        if identifiers[0] in (UNKNOWN, "cc") or len(identifiers) > 1:
            raise PublishError(f"license {given!r} says nothing; give one identifier of the Hub, such as apache-2.0.")
        return given.strip() if identifiers[0] == OTHER else identifiers[0]
    parts = list(parts)
    shared = {identifier for part in parts for identifier in license_ids(part)}
    if len(shared) == 1 and shared <= REDISTRIBUTABLE:
        return shared.pop()
    named = ", ".join(sorted({part or "not stated" for part in parts})) or "not known"
    raise PublishError(
        f"No license follows from those of {what}: {named}. Say under which one you may publish it: --license ID."
    )


def refuse_withheld(anchors: Iterable[Origin]) -> None:
    """Refuses to publish what was made from weights that must not be passed on.

    The publisher's word counts only for a model on this machine that states no license.

    Raises:
        PublishError: the license of an anchor does not let others redistribute its weights.
    """
    for anchor in anchors:
        if (anchor.license or anchor.hub_id) and not is_redistributable(anchor.license):
            raise PublishError(
                f"{anchor.name}: {refusal_reason(anchor.license)}. What was made from its weights cannot be "
                "published; generate from other anchors."
            )


def license_fields(license: str) -> dict[str, str]:
    """The entries of a card's front matter for a license of `settle_license`."""
    (identifier,) = license_ids(license)
    return {"license": identifier} if identifier != OTHER else {"license": OTHER, "license_name": license}
