"""`hf-wsl publish`: a tokenized dataset, a backbone or a generated model to the Hub, with a card made of facts."""

import json
import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from datasets_scripts.schema import REPORT_FILE, WORK_FOLDER
from modeling_wsl import WSLConfig
from modeling_wsl.generation.generated_model import PROVENANCE_FILE

from .backbone import prepare_backbone
from .dataset import prepare_dataset
from .errors import PublishError
from .generated_model import prepare_generated_model
from .publication import compare
from .upload import PublishPlan, PublishResult, carry_out, look_up


DATASET, BACKBONE, GENERATED_MODEL = "tokenized dataset", "backbone", "generated model"


def publish(
    folder: str | PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    message: str | None = None,
    token: str | None = None,
    confirm: Callable[[PublishPlan], bool] | None = None,
) -> PublishResult | None:
    """Checks a folder, writes its card, and uploads what the Hub does not have yet.

    It can be killed at any moment: the same call then sends what is missing. What the Hub has is not sent again.

    Args:
        folder: of a tokenized dataset (`hf-wsl tokenize`, `collect`), a backbone (`pretrain`) or a generated model
            (`generate`).
        repo_id: "owner/name"; made where it does not exist.
        private: make it private; an existing repository keeps its visibility.
        revision: branch to commit to, made from main where it does not exist.
        create_pr: offer a pull request instead of committing.
        license: to publish a model under, as the Hub spells it; needed where none follows from its parts. A dataset
            has those of its models.
        message: of the commit.
        token: of the Hub; by default the stored one.
        confirm: is shown the plan before anything is sent; false ends it there. `plan_publication` alone is a dry run.

    Returns:
        the commit and what was sent; None where `confirm` said no.

    Raises:
        PublishError: the folder, its licenses or the options do not allow it; nothing was sent.
        UploadError: the Hub refused or failed; run it again.
    """
    plan = plan_publication(
        folder, repo_id, private=private, revision=revision, create_pr=create_pr, license=license, token=token
    )
    if confirm is not None and not confirm(plan):
        plan.publication.remove_staging()
        return None
    return carry_out(plan, message=message, token=token)


def plan_publication(
    folder: str | PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    token: str | None = None,
) -> PublishPlan:
    """All of `publish` that changes nothing on the Hub and, but for a hidden folder, nothing here.

    Raises:
        PublishError, UploadError: as `publish`.
    """
    path = Path(folder).expanduser().absolute()
    check_repo_id(repo_id)
    if create_pr and revision is not None:
        raise PublishError("A pull request goes to the main branch: give revision or create_pr, not both.")
    kind = recognize(path)
    repo_type = "dataset" if kind == DATASET else "model"
    if kind == DATASET and license is not None:
        raise PublishError("The models of a dataset stay under their own licenses: leave license out.")
    there = look_up(repo_id, repo_type, private=private, revision=revision, create_pr=create_pr, token=token)
    if kind == DATASET:
        publication = prepare_dataset(path, repo_id, there.card)
    elif kind == BACKBONE:
        publication = prepare_backbone(path, repo_id, license, there.card)
    else:
        publication = prepare_generated_model(path, repo_id, license, there.card)
    return PublishPlan(publication, there, create_pr, tuple(compare(publication, there.files)))


def recognize(folder: Path) -> str:
    """Tells what a folder holds: `DATASET`, `BACKBONE` or `GENERATED_MODEL`.

    Raises:
        PublishError: nothing of ours, or something that is not meant to be published.
    """
    if not folder.is_dir():
        raise PublishError(f"{folder} is no folder. Give a tokenized dataset's, a backbone's or a generated model's.")
    if (folder / REPORT_FILE).is_file() or (folder / WORK_FOLDER).is_dir():
        return DATASET
    if (folder / PROVENANCE_FILE).is_file():
        return GENERATED_MODEL
    if model_type(folder) == WSLConfig.model_type:
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            raise PublishError(
                f"{folder} is a checkpoint, with the optimizer's state. Publish the folder of its run, once that has "
                f"ended: {folder.parent}."
            )
        return BACKBONE
    inside = sorted(path.parent.name for path in folder.glob(f"*/{PROVENANCE_FILE}"))
    if inside:
        raise PublishError(
            f"{folder} holds {len(inside)} generated models; a repository holds one: {folder / inside[0]}, say."
        )
    raise PublishError(
        f"{folder} is nothing that can be published: a tokenized dataset has {REPORT_FILE}, a generated model "
        f"{PROVENANCE_FILE}, a backbone a config.json with model_type {WSLConfig.model_type}."
    )


def model_type(folder: Path) -> str | None:
    """The model type that config.json states, if there is one that can be read."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None


def check_repo_id(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository.

    Raises:
        PublishError: it is not "owner/name" of the Hub's characters.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is no name of a repository ({error}).") from error
    if repo_id.count("/") != 1:
        raise PublishError(f"{repo_id!r} names no owner; write owner/name.")
