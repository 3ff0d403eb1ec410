"""Under which licenses the parts of a model are: its anchors and backbone, or the dataset that it was trained on."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import HfApi, hf_hub_download, metadata_load

from datasets_scripts.licenses import License, Strictest, license_of, strictest
from datasets_scripts.model_facts import find_facts
from datasets_scripts.schema import ACCEPTED, CARD_FILE, MODELS
from datasets_scripts.sources import ModelSource
from modeling_wsl.checkpoints.hub import is_hub_id

from .errors import PublishError
from .local_paths import shortened


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
        identity = f"commit `{self.revision[:12]}`" if self.revision else f"sha256 `{(self.sha256 or '')[:12]}`"
        name = f"`{self.name}` (not on the Hub)"
        if self.hub_id:
            name = f"[{self.name}](https://huggingface.co/{self.hub_id})"
        return name, identity if self.revision or self.sha256 else "not noted", self.license or "not stated"


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
        card = metadata_load(hf_hub_download(dataset, CARD_FILE, repo_type="dataset", revision=revision)) or {}
    except Exception as error:  # of the client, without a common class
        logger.warning("%s: the licenses of its models cannot be read (%r)", dataset, error)
        return {}
    stated = card.get("license") or []
    return dict.fromkeys([stated] if isinstance(stated, str) else map(str, stated))


def settle_license(
    given: str | None, parts: Sequence[str | None], what: str, *, adapted: bool
) -> tuple[License, Strictest | None]:
    """The license to publish something under.

    Args:
        given: what the publisher says, or None to derive it.
        parts: licenses of what it is made of, as stated.
        what: the parts in words, for messages.
        adapted: it is an adapted copy of its parts, so their licenses bind; else (a backbone, which holds no model's
            weights) the publisher's word outranks them, and the card names both.

    Returns:
        the license, and the strictest of those parts whose license is known (None where none is).

    Raises:
        PublishError: no license follows from the parts and none is given; of an adapted copy, a part forbids it, or
            grants less than the given license does.
    """
    licenses = [license_of(part) for part in parts]
    readable = [license for license in licenses if "?" not in license.terms]
    known = strictest(readable) if readable else None
    if adapted and known and "nd" in known.license.terms:
        raise PublishError(f"{what}: {known.license.redistribution.reason}. It cannot be published.")
    if given is not None:
        chosen = license_of(given)
        if chosen.stated in ("unknown", "cc"):
            raise PublishError(f"license {given!r} says nothing; give an identifier of the Hub, such as apache-2.0.")
        if adapted and known and chosen.rank < known.license.rank:
            raise PublishError(
                f"license {given!r} grants more than {known.license.stated} does, the strictest of {what}. Give that "
                "one, or a stricter one."
            )
        return chosen, known
    unclear = sorted({license.stated for license in licenses if not license.redistribution})
    if unclear or known is None:
        found = f"among them is {', '.join(unclear)}" if unclear else "none is known"
        raise PublishError(
            f"No license follows from those of {what}: {found}. Say under which one you may publish it: --license ID."
        )
    return known.license, known
