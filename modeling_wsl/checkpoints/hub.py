"""Weights from the Hugging Face Hub: only the weight files and the configs are fetched, into the usual cache."""

import re
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging

from .architectures import import_timm, is_timm_name
from .downloads import fetch
from .errors import CheckpointError, DamagedFileError, NoWeightsError, PartOfModelError, read_json, shorten
from .file_names import is_index, read_with
from .folders import choose_weights, local_subfolder, parse_index
from .formats import SAFETENSORS_SUFFIXES, SUFFIXES, TORCH_SUFFIXES
from .order import SIDECAR
from .parts.layouts import part_names


logger = logging.get_logger(__name__)

CONFIG_NAMES = ("config.json", "adapter_config.json", SIDECAR)
LOGIN = "log in (`hf auth login`, HF_TOKEN, or token= in Python)"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def is_hub_id(source: str) -> bool:
    """True for "org/name"; a weight file's suffix makes it a path, so mistyped files are not looked for online."""
    suffix = PurePosixPath(source).suffix.lower()
    return bool(HUB_ID.fullmatch(source)) and suffix not in (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES, *SUFFIXES)


def download(
    repo_id: str,
    *,
    revision: str | None,
    token: str | bool | None,
    subfolder: str = "",
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str]:
    """Downloads the weight files and configs of a Hub model, at one commit, and makes sure of their bytes.

    Returns:
        the local folder that holds them (with `subfolder`), and the commit.

    Raises:
        CheckpointError: the repository, revision or weights are missing, access is gated, or the Hub is out of reach.
    """
    repo_id = with_default_tag(repo_id)
    source = f"{repo_id}/{subfolder}" if subfolder else repo_id
    prefix = f"{subfolder.strip('/')}/" if subfolder.strip("/") else ""
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        if local_files_only:
            raise OfflineModeIsEnabled("local_files_only is set")
        info = HfApi().model_info(repo_id, revision=revision, token=token)
        listed = [file.rfilename for file in info.siblings or ()]
    except Exception as error:  # HTTP errors of two httpx generations, OSError, RuntimeError (Xet)
        if isinstance(error, (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)):
            raise hub_error(source, revision, error) from error
        folder = cached(source, repo_id, revision, cache_dir, error)
        local_subfolder(folder, subfolder)
        listed = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        revision, options = folder.name, options | {"local_files_only": True}
    inside = [name.removeprefix(prefix) for name in listed if name.startswith(prefix)]
    names = sorted({name.split("/")[0] + "/" * ("/" in name) for name in inside})

    def get(name: str, at: str | None) -> Path:
        return fetch(repo_id, prefix + name, revision=at, **options)

    weights, *parts = weight_files(source, names)
    try:
        path = get(weights, revision)  # by its branch, which the cache then knows; the rest at the commit it gave
        commit = path.parents[(prefix + weights).count("/")].name
        for name in parts:
            get(name, commit)
        if is_index(weights):
            for shard in parse_index(path, read_json(path, "the index")).shards:
                if shard not in inside:
                    raise CheckpointError(
                        source, f"lacks the shard {shard} of {weights}", "Ask its owner to upload it"
                    )
                get(shard, commit)
        for name in set(CONFIG_NAMES) & set(names):
            get(name, commit)
    except CheckpointError:
        raise
    except Exception as error:
        raise hub_error(source, revision, error) from error
    return path.parent, commit


def weight_files(source: str, names: list[str]) -> list[str]:
    """The weight file among the names of a folder, and those that are read with it: other parts, data beside it.

    Raises:
        CheckpointError: as `choose_weights`.
    """
    try:
        chosen = choose_weights(source, names)
    except (NoWeightsError, PartOfModelError):
        parts = part_names(names)
        if not parts:
            raise
        return parts
    return [chosen, *read_with(chosen, names)]


def verify(repo_id: str | PathLike[str], path: str, options: Mapping[str, Any]) -> None:
    """Makes sure of the bytes of a file (of the weights and configs, for "") that transformers is about to load.

    Args:
        repo_id: or a folder, which is left alone.
        options: of `from_pretrained`.

    Raises:
        DamagedFileError: see `fetch`. What else goes wrong is left for transformers to find, and to say.
    """
    name = fspath(repo_id)
    if Path(name).exists() or not is_hub_id(name):
        return
    known = {name: options.get(name) for name in ("revision", "token", "cache_dir")}
    known["revision"] = getattr(known["revision"], "resolved", known["revision"])  # newer Auto classes look it up
    known["local_files_only"] = bool(options.get("local_files_only"))
    subfolder = options.get("subfolder") or ""
    try:
        if path:
            fetch(name, f"{subfolder}/{path}" if subfolder else path, **known)
        else:
            download(name, subfolder=subfolder, **known)
    except DamagedFileError:
        raise
    except Exception as error:  # the client's have no common class
        logger.debug(f"{name}: {error}")


def with_default_tag(repo_id: str) -> str:
    """ "timm/resnet18" names an architecture; the repository of its default weights is "timm/resnet18.a1_in1k"."""
    owner, name = repo_id.split("/")
    if owner != "timm" or "." in name or not is_timm_name(name):
        return repo_id
    pretrained = import_timm(name).models.get_pretrained_cfg(name)
    if pretrained is None or not (pretrained.hf_hub_id or "").startswith("timm/"):  # weights elsewhere, or none
        return repo_id
    logger.info(f"{repo_id}: the default weights of this architecture are {pretrained.hf_hub_id}")
    return pretrained.hf_hub_id


def download_config(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Downloads the config.json of a Hub model, and nothing else; returns the local folder that holds it.

    Raises:
        CheckpointError: the repository, revision or config is missing, access is gated, or the Hub is out of reach.
    """
    try:
        return fetch(repo_id, "config.json", revision=revision, token=token).parent
    except CheckpointError:
        raise
    except Exception as error:  # as in `download`
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            advice = f"Give open_checkpoint({repo_id!r}) for its tensors, or a module of it"
            raise CheckpointError(repo_id, "has no config.json that says what to build", advice) from error
        raise hub_error(repo_id, revision, error) from error


def cached(
    source: str, repo_id: str, revision: str | None, cache_dir: str | PathLike[str] | None, error: Exception
) -> Path:
    """The snapshot in the local cache, where the Hub cannot be asked."""
    try:
        return Path(snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        raise hub_error(source, revision, error) from error


def hub_error(source: str, revision: str | None, error: Exception) -> CheckpointError:
    """Words an error of the Hub's client about a model."""
    return CheckpointError(source, *hub_problem(error, revision))


def hub_problem(error: Exception, revision: str | None, kind: str = "model") -> tuple[str, str]:
    """Words an error of the Hub's client about a `kind` of repository: what it means, and what to do about it."""
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too, so it comes first
        return "is a gated repository on the Hub", f"Accept its terms there, then {LOGIN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"is neither a local path nor a {kind} on the Hub", f"Check the name; for a private one {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {shorten(revision)} on the Hub", "Pass a branch, tag or commit"
    if isinstance(error, OfflineModeIsEnabled):
        return "is not in the local cache, and HF_HUB_OFFLINE is set", "Unset it to download"
    if any(isinstance(e, HfHubHTTPError) and e.response.status_code == 401 for e in (error, error.__cause__)):
        return "cannot be read: the Hub does not know the access token", f"Unset HF_TOKEN, or {LOGIN}"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"cannot be downloaded ({type(error).__name__}: {shorten(first)})", "Check the connection and try again"


def upload_problem(error: Exception) -> tuple[str, str]:
    """The meaning of an error of the Hub's client while something is published, and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    said, again = " ".join(str(error).split()), "Run the same command again: what has arrived is not sent again"
    if isinstance(error, (GatedRepoError, RepositoryNotFoundError)) or status in (401, 403):
        advice = "Check `hf auth whoami`: the token needs write access to this repository"
        return f"the Hub refuses ({said})", advice
    if status in (409, 412):
        return f"somebody else changed the repository meanwhile ({said})", again
    if isinstance(error, ValueError):
        return f"the Hub does not take it ({said})", "Mend what it names and run the command again"
    return f"the Hub could not be reached or failed ({type(error).__name__}: {said})", again
