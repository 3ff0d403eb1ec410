"""Loading a backbone by folder, Hub id, or as the one that comes with the library, with errors that say what to do."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints.errors import CheckpointError, shorten


if TYPE_CHECKING:
    from transformers import Pipeline

FEATURE_EXTRACTOR_NAME = "preprocessor_config.json"  # transformers' own constant costs a second
MODEL_TYPE = "wsl"  # of a backbone, in its config.json
DEFAULT_NAME = "default"  # what commands and this library's own classes take for the backbone that comes along
DEFAULT_FOLDER = Path(__file__).parent / "default"  # package data, with a card that says what it was trained on
DEFAULT_BACKBONE = str(DEFAULT_FOLDER)  # for `pipeline` and the Auto classes, which look a name up themselves


def resolve_default(backbone: str | PathLike) -> str:
    """The path of the backbone that comes with the library for "default", anything else as it is, as text.

    A folder of that name in the current directory comes first.

    Raises:
        CheckpointError: "default", in code that came with another backbone, as remote code.
    """
    name = str(backbone)
    if name != DEFAULT_NAME or Path(name).exists():
        return name
    if not DEFAULT_FOLDER.is_dir():
        raise CheckpointError(name, "comes with the installed library only", "pip install hf-wsl, or name a backbone")
    return DEFAULT_BACKBONE


def load_pipeline(
    task: str,
    backbone: str | PathLike = DEFAULT_NAME,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> "Pipeline":
    """`transformers.pipeline` with the errors of `find_backbone`, and everything of a Hub id at one commit.

    Args:
        task: "weight-embedding" or "weight-generation".
        backbone, revision, token: see `find_backbone`.
        options: of the pipeline.
    """
    from transformers import AutoModel, pipeline  # takes seconds

    name, commit = find_backbone(backbone, revision=revision, token=token)
    try:
        return pipeline(task, model=name, revision=commit, token=token, **options)
    except ValueError as error:
        if str(error).startswith(
            "Could not load model"
        ):  # all tracebacks in one message; raise the first error itself
            AutoModel.from_pretrained(name, revision=commit, token=token)
        raise


def find_backbone(
    backbone: str | PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[str, str | None]:
    """Makes sure that there is a backbone, by its config, before anything is loaded.

    Args:
        backbone: folder, Hub id (`org/name`, `org/name@revision`), or "default": the one that comes with the library.
        revision: branch, tag or commit of a Hub id.
        token: for private and gated backbones; by default the one of the login.

    Returns:
        The folder, and None; or the Hub id, and the commit that the revision stands for now.

    Raises:
        CheckpointError: it is missing, may not be read, or is no backbone.
    """
    # Here, for the configuration imports this module: reading checkpoints needs torch and transformers' Auto classes.
    from .checkpoints.folders import read_config
    from .checkpoints.hub import download_config, is_hub_id, verify
    from .checkpoints.reference import exists, parse_reference

    name = resolve_default(backbone)
    reference, commit = parse_reference(name).with_options(revision=revision), None
    revision, on_hub = reference.revision, not exists(reference.location) and is_hub_id(reference.location)
    if reference.key is not None or (on_hub and reference.subfolder):
        reason = f"names a part, {shorten(reference.key or reference.subfolder)}"
        raise CheckpointError(name, reason, "A backbone is a folder of its own: name that")
    name = reference.location if on_hub else str(Path(reference.location, reference.subfolder))
    folder = Path(name).expanduser()
    if on_hub:
        folder = download_config(name, revision=revision, token=token)
        commit = folder.name  # in the cache; a branch may move between one file and the next
    elif revision is not None:
        raise CheckpointError(name, f"has no revision {shorten(revision)}, for it is no Hub id", "Leave revision out")
    library, config = read_config(folder) if folder.is_dir() else (None, {})
    if not config:
        raise CheckpointError(name, "is neither a folder with a config.json nor a Hub id", "Name a trained backbone")
    kind = config.get("model_type")
    if library != "peft" and kind != MODEL_TYPE:  # an adapter names its backbone, which is loaded with it
        raise CheckpointError(name, f"is no backbone: its model_type is {shorten(kind)}", "Name a trained backbone")
    if commit is not None:  # transformers, which loads them from the cache, looks at no byte
        for path in ("", FEATURE_EXTRACTOR_NAME):
            verify(name, path, {"revision": commit, "token": token})
    return name, commit
