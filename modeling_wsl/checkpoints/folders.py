"""Folders of weights: which files are the model, what is passed over, and shards that agree with their index."""

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .containers.safetensors_files import read_header
from .errors import CheckpointError, NoWeightsError, PartOfModelError, read_json, shorten
from .file_names import (
    ADAPTER_NAMES,
    INDEX_SUFFIX,
    MODEL_SUFFIXES,
    SHARD,
    TWIN_FOLDERS,
    WEIGHT_NAMES,
    holds_weights,
    is_beside_weights,
    is_index,
    is_later_part,
    is_weight_name,
    part_of,
    shards_of,
    tensorflow_indices,
    variant_of,
)
from .formats import (
    CONVERT,
    FOREIGN_SUFFIXES,
    FRAMEWORK_WEIGHTS,
    READABLE,
    SAFETENSORS_SUFFIXES,
    SUFFIXES,
    TORCH_SUFFIXES,
)
from .parts.layouts import JOIN, RANK_FOLDER, find_parts, list_files, parts_folders
from .reference import Reference, exists


PIPELINE = "model_index.json"  # of diffusers: its components are models of their own
# A folder with one of these and weights is one model.
MODEL_FOLDER_MARKS = ("config.json", "adapter_config.json", "model.json")


@dataclass(frozen=True)
class Choice:
    """What is read of a folder.

    Attributes:
        path: a weight file, an index of shards, or a folder of parts.
        folder: where its config lies.
        passed_over: a line for each thing that could be taken for weights and is not read.
    """

    path: Path
    folder: Path
    passed_over: list[str] = field(default_factory=list)


def choose_local(folder: Path) -> Choice:
    """The model of a local folder, chosen by names and, where these do not tell, by content.

    Raises:
        NoWeightsError, CheckpointError: as `choose_weights`.
    """
    names = list_files(folder)
    if not _has_plain_name(names) and PIPELINE not in names and (parts := find_parts(folder, names)):
        return Choice(parts, folder, _passed_over(names, None))
    try:
        chosen = choose_weights(folder, names, lambda file, index: _complete_one(folder, file, index))
    except NoWeightsError as error:
        unnamed = [name for name in names if not name.endswith("/") and holds_weights(folder / name)]
        if len(unnamed) > 1:
            raise _several(folder, unnamed) from error
        if not unnamed and (module := _transformer_of(folder)):
            inside = choose_local(folder / module)
            return Choice(inside.path, inside.folder, [f"read is the model in {module}/", *inside.passed_over])
        holding = [n for n in names if n.endswith("/") and not is_beside_weights(n) and _shows_weights(folder / n)]
        if unnamed:
            chosen = unnamed[0]
        elif any(RANK_FOLDER.fullmatch(name[:-1]) for name in holding):
            reason = f"holds parts of a model, a folder a rank ({', '.join(holding[:8])})"
            raise PartOfModelError(folder, reason, JOIN) from error
        elif holding:
            advice = f"Its folders {', '.join(holding[:8])} hold weights: pass one of them (`:` and its name behind)"
            raise NoWeightsError(folder, error.reason, advice) from error
        else:
            raise
    return Choice(folder / chosen, folder, _passed_over(names, chosen))


def _has_plain_name(names: Iterable[str]) -> bool:
    return any(name in (*WEIGHT_NAMES, *ADAPTER_NAMES) or variant_of(name) for name in names)


def _complete_one(folder: Path, file: str, index: str) -> str:
    """Of a file and the index of shards beside it the one that is the model.

    The file, as in transformers, if it holds every tensor of the shards with its shape, or if shards are missing;
    otherwise it is a leftover (a quantized copy, a part).
    """
    try:
        promised = parse_index(folder / index, read_json(folder / index, "the index"))
        shards = [find_shard(folder / index, shard) for shard in promised.shards]
    except CheckpointError:
        return file
    try:
        own = read_header(folder / file).tensors
        theirs = {name: spec for shard in shards for name, spec in read_header(shard).tensors.items()}
    except (CheckpointError, OSError):  # no safetensors: nothing tells but the index
        return index
    return file if all(name in own and own[name].shape == spec.shape for name, spec in theirs.items()) else index


def _transformer_of(folder: Path) -> str | None:
    """The folder of the first module of a sentence-transformers model that has weights (`0_Transformer`)."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = read_json(path, "modules.json", unique_keys=False)
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    inside = [p for p in paths if isinstance(p, str) and p and "/" not in p and p not in (".", "..")]
    return next((p for p in inside if (folder / p).is_dir() and _shows_weights(folder / p)), None)


def _shows_weights(folder: Path) -> bool:
    try:
        return any(is_weight_name(name) or name == ".metadata" for name in os.listdir(folder))
    except OSError:
        return False


def _passed_over(names: Iterable[str], chosen: str | None) -> list[str]:
    """A line for each file and folder beside the chosen one that could be taken for weights."""
    variant = variant_of(chosen or "")
    lines = [f"{chosen}: a variant ({variant['variant']}), as the plain weights are not there"] if variant else []
    shards = set(shards_of(chosen, names)) if chosen and is_index(chosen) else set()
    for name in names:
        if name == chosen or name in shards or name.startswith(".") or is_later_part(name):
            continue
        if name.endswith("/"):
            if name[:-1] in TWIN_FOLDERS:
                lines.append(f"{name}: passed over, the model once more, for another use")
        elif is_beside_weights(name):
            lines.append(f"{name}: passed over, a state of training, no weights")
        elif chosen and (name.lower().endswith(MODEL_SUFFIXES) or is_index(name)):
            lines.append(f"{name}: passed over for {chosen}")
    return lines


@dataclass(frozen=True)
class Survey:
    """A folder as one sees it who looks for models.

    Attributes:
        is_model: the folder is one model.
        files: names of files that are a model each.
        folders: names of the folders in which to look further.
        passed_over: one line each for what could be taken for a model and is none of its own.
    """

    is_model: bool
    files: list[str]
    folders: list[str]
    passed_over: list[str]


def survey(folder: Path) -> Survey:
    """Tells which of a folder's files and folders are models; nothing but names and first bytes are read."""
    names = list_files(folder)
    folders = [name[:-1] for name in names if name.endswith("/") and not name.startswith(".")]
    files = [name for name in names if not name.endswith("/") and not name.startswith(".")]
    beside = [name for name in files if is_beside_weights(name) and name.lower().endswith(TORCH_SUFFIXES)]
    weights = [
        n
        for n in files
        if n not in beside
        and not is_later_part(n)
        and (n.lower().endswith(MODEL_SUFFIXES) or holds_weights(folder / n))
    ]
    inner = parts_folders(folder, names)  # of the parts of this very model
    inner += ["blobs"] if "snapshots" in folders else []  # of the Hub's cache: files by their hashes
    further = [name for name in folders if name not in inner and not is_beside_weights(name)]
    lines = [f"{name}: passed over, a state of training, no weights" for name in beside]
    if _is_one_model(folder, names, files, weights, folders):
        twins = [name for name in further if name in TWIN_FOLDERS]
        lines += [f"{name}/: passed over, the model once more, for another use" for name in twins]
        return Survey(True, [], [name for name in further if name not in twins], lines)
    return Survey(False, weights, further, lines)


def _is_one_model(folder: Path, names: list[str], files: list[str], weights: list[str], folders: list[str]) -> bool:
    if _has_plain_name(files):
        return True
    if PIPELINE in files:
        return False
    if any(is_index(name) or (SHARD.fullmatch(name) and not name.endswith(".gguf")) for name in files):
        return True
    if parts := find_parts(folder, names):  # not where `latest` names one of several steps: each is a model
        return parts == folder or parts.name in parts_folders(folder, names)
    readable = [name for name in weights if is_weight_name(name) or holds_weights(folder / name)]
    if any(mark in files for mark in MODEL_FOLDER_MARKS):
        # A config.json above folders of models, without weights of its own, describes the collection.
        return len(readable) == 1 or (not readable and not folders)
    return len(weights) == 1 and not folders


def own_files(folder: Path) -> list[Path]:
    """What lies directly in the folder of a model, and in the folders of its parts; sorted."""
    inner = parts_folders(folder, list_files(folder))
    return sorted([*folder.iterdir(), *(path for name in inner for path in (folder / name).iterdir())])


def choose_weights(source: object, names: Iterable[str], prefer: Callable[[str, str], str] | None = None) -> str:
    """The one weight file (or index of shards) among the file names of a folder; folders end in a slash.

    Of several spellings of one model it takes safetensors before torch, the plain one before its variants, and the
    index before a single file of its stem, which is often a leftover; `prefer(file, index)` decides otherwise.

    Raises:
        NoWeightsError: there is none; what is there is listed, and named if its format is known.
        CheckpointError: there are several, or parts of one model.
    """
    names = sorted(names)
    if PIPELINE in names and not _has_plain_name(names):
        folders = ", ".join(name for name in names if name.endswith("/")) or "none is here"
        reason = f"is a diffusers pipeline, whose components are models of their own ({folders})"
        raise CheckpointError(source, reason, "Pass one of these folders (`:` and its name behind this one)")
    adapters = [name for name in ADAPTER_NAMES if name in names]
    standard = [name for name in WEIGHT_NAMES if name in names]
    if adapters and standard:
        reason = f"holds a model ({standard[0]}) and an adapter ({adapters[0]})"
        raise CheckpointError(source, reason, "Pass the path of the file that is meant")
    if adapters or standard:
        chosen = (adapters or standard)[0]
        index = chosen + INDEX_SUFFIX
        if index not in standard or not shards_of(index, names):
            return chosen
        return prefer(chosen, index) if prefer else index
    weights = [name for name in names if not is_beside_weights(name) and not is_later_part(name)]
    plain = [name for name in weights if not variant_of(name)]
    for suffixes in (SAFETENSORS_SUFFIXES, TORCH_SUFFIXES, *((suffix,) for suffix in FRAMEWORK_WEIGHTS)):
        for of_kind in (plain, [name for name in weights if name not in plain]):
            if chosen := _only_one(source, of_kind, suffixes):
                return chosen
    if len(indices := tensorflow_indices(names)) == 1:
        return indices[0]
    raise _nothing(source, names)


def _only_one(source: object, names: list[str], suffixes: tuple[str, ...]) -> str | None:
    """The one index or file of these suffixes, None if there is none."""
    indices = [n for n in names if is_index(n) and any(f"{suffix}." in n for suffix in suffixes)]
    files = [n for n in names if n.lower().endswith(suffixes)]
    if len(indices) == 1:
        return indices[0]
    is_gguf = ".gguf" in suffixes  # its first part stands for all
    shards = [n for n in files if (match := SHARD.fullmatch(n)) and int(match["world"]) > 1 and not is_gguf]
    if shards and not indices:
        reason = f"holds shards ({shorten(shards[0], 60)}, {len(shards)} in all) without their index"
        raise PartOfModelError(source, reason, f"Fetch the {INDEX_SUFFIX} file that belongs to them")
    parts = [part for n in files if (part := part_of(n, files))]
    if parts and not indices:
        reason = f"holds {len(parts)} parts of a model, from {parts[0].maker}"
        raise PartOfModelError(source, reason, "Download the folder and pass its path: there they are joined")
    if len(indices or files) > 1:
        raise _several(source, indices or files)
    return files[0] if files else None


def _several(source: object, files: list[str]) -> CheckpointError:
    reason = f"holds {len(files)} weight files: {', '.join(files[:8])}"
    return CheckpointError(source, reason, "Pass the path of the one that is meant")


def _nothing(source: object, names: list[str]) -> NoWeightsError:
    listed = ", ".join(names[:12]) or "nothing"
    if len(names) > 12:
        listed += f" and {len(names) - 12} more"
    foreign = [name for name in names if PurePosixPath(name).suffix.lower() in FOREIGN_SUFFIXES]
    advice = READABLE
    if foreign:
        what, fix = SUFFIXES[PurePosixPath(foreign[0]).suffix.lower()]
        advice = f"{foreign[0]} {what}. {fix}"
    return NoWeightsError(source, f"holds no weights that can be read; there is {listed}", advice)


@dataclass(frozen=True)
class ShardIndex:
    """A checked index: tensor name -> shard file name, in the index's order."""

    path: Path
    weight_map: Mapping[str, str]

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.weight_map.values()))

    def check_shard(self, shard: str, names: Iterable[str]) -> None:
        """Refuses a shard that does not hold exactly the tensors which the index places in it.

        Raises:
            CheckpointError: naming the tensor, the shard that has it and the one that should.
        """
        held = set(names)
        promised = {name for name, place in self.weight_map.items() if place == shard}
        fix = "Shards and index are from different models, or damaged; fetch them again"
        if missing := sorted(promised - held):
            reason = f"the index places tensor {shorten(missing[0])} in {shard}, which does not hold it"
            raise CheckpointError(self.path, reason, fix)
        if extra := sorted(held - promised):
            place = self.weight_map.get(extra[0])
            instead = f"the index places it in {place}" if place else "the index does not list it"
            raise CheckpointError(self.path, f"{shard} holds tensor {shorten(extra[0])}; {instead}", fix)


def parse_index(source: Path, content: Any) -> ShardIndex:
    """Checks a parsed `*.index.json`: a mapping from tensor names to files of the same folder.

    Raises:
        CheckpointError: `weight_map` is missing, empty or of wrong types, or a name leads out of the folder.
    """
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        reason = "has no weight_map from tensor names to shards"
        raise CheckpointError(source, reason, "Pass the folder or the weight file, or write the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            reason = f"its weight_map gives {shorten(shard)} as the shard of {shorten(name)}"
            raise CheckpointError(source, reason, "A shard is the name of a file in the same folder")
        check_inside(source, shard)
    return ShardIndex(source, weight_map)


def check_inside(source: object, name: str) -> None:
    """Refuses a file name that leads out of its folder, before anything looks for the file.

    Raises:
        CheckpointError: the name is absolute, has `..`, a drive, a backslash or a NUL.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or any(c in name for c in "\\:\0"):
        reason = f"names the file {shorten(name)}, which is not inside its folder"
        raise CheckpointError(source, reason, "Shards lie beside their index; copy them there and correct the names")


def find_shard(index: Path, name: str) -> Path:
    """The path of a shard beside its index.

    A symbolic link may lead out of the folder only as those of a Hugging Face cache do, from
    `models--x/snapshots/<commit>/` to `models--x/blobs/`.

    Raises:
        CheckpointError: the shard is missing, or a link that leads elsewhere.
    """
    path = index.parent / name
    if not path.exists():
        reason = f"lacks the shard {name}" + (" (a broken link)" if path.is_symlink() else "")
        raise CheckpointError(index, reason, "Fetch or copy it beside the index")
    folder = index.parent.resolve()
    if path.resolve().is_relative_to(folder):
        return path
    # One step only: a blob may itself be a link into a store that several caches share.
    blob = Path(os.path.normpath(path.parent.resolve() / os.readlink(path))) if path.is_symlink() else path.resolve()
    if blob.parent.name == "blobs" and folder.is_relative_to(blob.parent.parent / "snapshots"):
        return path
    reason = f"names the shard {name}, a link out of the folder (to {shorten(blob)})"
    raise CheckpointError(index, reason, "Copy the file beside the index")


def read_config(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The library whose folder this is ("peft", "timm", "transformers" or None) and its parsed config ({} if none).

    Raises:
        CheckpointError: config.json or adapter_config.json is not a JSON object.
    """
    adapter = folder / "adapter_config.json"
    path = adapter if adapter.is_file() else folder / "config.json"
    if not path.is_file():
        return None, {}
    config = read_json(path, "the config", unique_keys=False)
    if not isinstance(config, dict):
        raise CheckpointError(path, "is not a JSON object", "Fetch or write it again")
    if path == adapter:
        return "peft", config
    if isinstance(config.get("architecture"), str):
        return "timm", config
    return "transformers" if {"model_type", "architectures"} & set(config) else None, config


def refuse_json(path: Path, content: Any) -> None:
    """Refuses a JSON file that is no index of shards, telling what it is.

    Raises:
        CheckpointError: always.
    """
    first: Sequence = content if isinstance(content, list) else [content]
    groups = content.get("weightsManifest") if isinstance(content, dict) else first
    if isinstance(groups, list) and groups and isinstance(groups[0], dict) and {"paths", "weights"} <= set(groups[0]):
        what = "is a TensorFlow.js manifest, whose weights lie in shards of their own"
        raise CheckpointError(path, what, CONVERT)
    raise CheckpointError(path, "is JSON, not weights", "Pass the folder or the weight file beside it")


def local_path(reference: Reference) -> Path:
    """The file or folder that a reference to this machine names.

    Raises:
        CheckpointError: it is missing, may not be read, is a link to nothing, or has a revision; the reason tells it.
    """
    path = Path(reference.location).expanduser()
    shown = shorten(reference.location) if not reference.location.isprintable() else reference.location
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", errno.EINVAL)
        if number not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL):
            reason = f"cannot be looked at ({os.strerror(number)})"
            raise CheckpointError(shown, reason, "Check its name and your rights to it") from error
        advice = "Pass a path that exists, or a Hub id of the form org/name"
        raise CheckpointError(
            shown, "is no file or folder" + " (a broken link)" * exists(reference.location), advice
        ) from error
    if reference.revision is not None:
        reason = f"has no revision {shorten(reference.revision)}, for it is no Hub id"
        raise CheckpointError(shown, reason, "Leave the revision out")
    return local_subfolder(path, reference.subfolder) if reference.subfolder else path


def local_subfolder(path: Path, subfolder: str) -> Path:
    """A folder inside a local folder."""
    inside = path / subfolder
    if not inside.is_dir() or not inside.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(path, f"has no folder {shorten(subfolder)} inside", "Correct the subfolder")
    return inside
