"""One model of the Hub: examined, fetched, tokenized and let go of, or refused for a reason.

Much can be told before its weights are downloaded: from its listing, its metadata, its configs and the headers of its
safetensors files.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock
from huggingface_hub import ModelInfo

from hf_wsl.files import sha256
from modeling_wsl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from modeling_wsl.checkpoints.containers.container import Contents
from modeling_wsl.checkpoints.containers.safetensors_files import DTYPES, LENGTH_BYTES, header_length, parse_header
from modeling_wsl.checkpoints.downloads import HubFile
from modeling_wsl.checkpoints.errors import CheckpointError, NotTokenizableError, NoWeightsError, parse_json
from modeling_wsl.checkpoints.file_names import is_index
from modeling_wsl.checkpoints.folders import ShardIndex, choose_weights, parse_index, read_config
from modeling_wsl.checkpoints.formats import FRAMEWORK_WEIGHTS
from modeling_wsl.checkpoints.hub import CONFIG_NAMES
from modeling_wsl.checkpoints.quantization.dequantize import dequantized
from modeling_wsl.tokens.manifest import TensorSpec

from ..licenses import is_redistributable, license_ids
from ..model_facts import HubFacts, license_of_card
from ..model_task import ModelTask, refusing
from ..outcomes import RefusedModel
from ..work_folder import ModelRecord, WorkFolder
from .config import CollectConfig, split_list
from .hub_listing import Candidate
from .hub_reader import HubReader, Pace
from .loadable import check_loadable, write_hollow_file


HEADER_GUESS = 100_000  # bytes of the first range: most headers end within it


@dataclass(frozen=True)
class Examined:
    """A model that nothing speaks against so far.

    Attributes:
        weights: the weight files to download.
        library, config: as `modeling_wsl.checkpoints.folders.read_config` gives them.
        checked: its tensors are known from headers, and were checked as far as asked for; false for pickles, whose
            tensors are known once they are here.
    """

    weights: tuple[HubFile, ...]
    library: str | None
    config: Mapping[str, Any]
    checked: bool

    @property
    def download_bytes(self) -> int:
        return sum(file.size for file in self.weights)

    @property
    def weights_key(self) -> str | None:
        """The hashes of the weight files, by which exact copies are known unread; None where the Hub has none."""
        hashes = [file.sha256 for file in self.weights]
        return None if None in hashes else "-".join(sorted(hashes))


def examine(candidate: Candidate, hub: HubReader, config: CollectConfig, folder: Path) -> Examined:
    """Examines a model, from the cheapest question to the dearest.

    Args:
        candidate: as listed.
        hub: to ask.
        config: of the collection.
        folder: an empty one; gets the configs and the index of shards, and a folder that the loader is shown.

    Raises:
        CheckpointError: the reason to refuse it; `outcomes.outcome_of` tells its code.
    """
    check_listing(candidate, config)
    info = hub.info(candidate.repo_id, candidate.commit)
    files = hub_files(info)
    source = candidate.repo_id
    # Folders end in a slash, as `choose_weights` knows them.
    names = sorted({path.split("/")[0] + "/" * ("/" in path) for path in files})
    chosen = _choose(source, names)
    for name in (*CONFIG_NAMES, chosen if is_index(chosen) else ""):
        if name in files:
            (folder / name).write_bytes(hub.read(source, candidate.commit, files[name]))
    library, model_config = _read_config(source, folder)
    index = None
    if is_index(chosen):
        index = parse_index(folder / chosen, parse_json(source, (folder / chosen).read_bytes(), chosen))
    weights = _weight_files(source, chosen, index, files)
    total = sum(file.size for file in weights)
    if total > config.max_download_bytes:
        reason = f"has {total:,} bytes of weights, more than {config.max_download}"
        raise RefusedModel(source, "too_large", reason, "Raise max_download")
    examined = Examined(weights, library, model_config, all(f.path.endswith(".safetensors") for f in weights))
    if examined.checked:
        shown = shown_to_loader(folder)
        tensors = dequantized_specs(source, _read_headers(candidate, hub, weights, index, shown), model_config, shown)
        if tensors is None:
            return replace(examined, checked=False)
        parameters = sum(spec.numel for spec in tensors.values() if spec.torch_dtype.is_floating_point)
        if not parameters:
            kinds = ", ".join(sorted({spec.dtype for spec in tensors.values()})) or "none"
            reason = f"holds no floating-point tensor ({len(tensors)} tensors: {kinds})"
            raise NotTokenizableError(source, reason, "Leave it out")
        check_parameters(source, parameters, config)
        if config.check == "loadable":
            check_loadable(shown, source, library, model_config, tensors)
    return examined


def dequantized_specs(
    source: str, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], shown: Path
) -> Mapping[str, TensorSpec] | None:
    """The tensors that the reader makes of stored ones; of quantized ones, hollow files of the result are shown.

    Returns:
        None where entries of tensors, which are not here yet, say how others are stored.

    Raises:
        QuantizedError: by the rules of the reader.
    """

    def read(name: str) -> NoReturn:
        raise EntriesNeeded(name)

    try:
        contents = dequantized(source, Contents(dict(tensors), read), None, dict(config))
    except EntriesNeeded:
        return None
    if contents.stored_as:
        show_hollow(shown, contents.specs)
    return contents.specs


class EntriesNeeded(Exception):
    """A header does not tell how a tensor is stored."""


def show_hollow(shown: Path, tensors: Mapping[str, TensorSpec]) -> None:
    """Puts one hollow file of tensors, as they are when dequantized, in place of a folder's weight files."""
    for path in (*shown.glob("*.safetensors"), *shown.glob("*.index.json")):
        path.unlink()
    names = {kind: name for name, (_, kind) in DTYPES.items() if kind}
    header, end = {}, 0
    for name, spec in tensors.items():
        begin, end = end, end + spec.numel * spec.torch_dtype.itemsize
        header[name] = {"dtype": names[spec.dtype], "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    length = len(text).to_bytes(LENGTH_BYTES, "little")
    write_hollow_file(shown / "model.safetensors", length + text, LENGTH_BYTES + len(text) + end)


def shown_to_loader(folder: Path) -> Path:
    """A folder beside the configs of a model, with copies of them: the loader may change them."""
    shown = folder / "shown"
    shown.mkdir(exist_ok=True)
    for path in folder.glob("*.json"):
        shutil.copyfile(path, shown / path.name)
    return shown


def check_listing(candidate: Candidate, config: CollectConfig) -> None:
    """Refuses what the listing alone speaks against."""
    source = candidate.repo_id
    if candidate.disabled:
        raise RefusedModel(source, "disabled", "the Hub has disabled it", "Leave it out")
    if candidate.gated and config.gated == "refuse":
        reason = "its owner gives access on request"
        raise RefusedModel(source, "gated", reason, "Ask for access and collect with gated try")
    license = candidate.stated.get("license") or license_of_card(candidate.card)
    if config.licenses == "any":
        return
    if config.licenses == "redistributable":
        allowed = is_redistributable(license)
    else:
        allowed = set(license_ids(license)) <= {i for name in split_list(config.licenses) for i in license_ids(name)}
    if not allowed:
        reason = f"its license is {license or 'not stated'}"
        raise RefusedModel(source, "license", reason, f"Asked for were licenses {config.licenses}")


def hub_files(info: ModelInfo) -> dict[str, HubFile]:
    """The files of a model by path, from an answer with `files_metadata`."""
    return {file.rfilename: HubFile.of(file.rfilename, file) for file in info.siblings or ()}


def _choose(source: str, names: list[str]) -> str:
    try:
        chosen = choose_weights(source, names)
        if chosen.lower().endswith(FRAMEWORK_WEIGHTS):
            reason = f"has weights of another framework alone ({chosen})"
            raise NoWeightsError(source, reason, "Tokenize it by its id")
        return chosen
    except NoWeightsError:
        raise
    except CheckpointError as error:  # there are several; which one is meant cannot be asked
        raise RefusedModel(source, "unloadable", error.reason, error.advice) from error


def _read_config(source: str, folder: Path) -> tuple[str | None, dict[str, Any]]:
    try:
        return read_config(folder)
    except CheckpointError as error:
        raise RefusedModel(
            source, "unloadable", f"its config.json cannot be read: {error.reason}", error.advice
        ) from error


def _weight_files(
    source: str, chosen: str, index: ShardIndex | None, files: Mapping[str, HubFile]
) -> tuple[HubFile, ...]:
    if index is None:
        return (files[chosen],)
    missing = [shard for shard in index.shards if shard not in files]
    if missing:
        reason = f"{chosen} names {missing[0]}, which is not there"
        raise RefusedModel(source, "damaged", reason, "Ask its owner to upload it")
    return tuple(files[shard] for shard in index.shards)


def _read_headers(
    candidate: Candidate, hub: HubReader, weights: tuple[HubFile, ...], index: ShardIndex | None, shown: Path
) -> dict[str, TensorSpec]:
    """All tensors by name; writes the hollow files into the folder that the loader is shown."""
    tensors: dict[str, TensorSpec] = {}
    for file in weights:
        source = f"{candidate.repo_id}, {file.path}"
        first = hub.read(candidate.repo_id, candidate.commit, file, 0, HEADER_GUESS)
        end = LENGTH_BYTES + header_length(source, first, file.size)
        if end > len(first):
            first += hub.read(candidate.repo_id, candidate.commit, file, len(first), end)
        header = parse_header(source, first[LENGTH_BYTES:end], file.size)
        if index is not None:
            index.check_shard(file.path, header.tensors)
        tensors |= header.tensors
        write_hollow_file(shown / file.path, first[:end], file.size)
    return tensors


def check_parameters(source: str, parameters: int, config: CollectConfig) -> None:
    """Refuses a model of more or fewer floating-point entries than asked for.

    Raises:
        RefusedModel: too_large or too_small.
    """
    if parameters > config.parameter_limit:
        reason = f"has {parameters:,} parameters, more than {config.max_parameters}"
        raise RefusedModel(source, "too_large", reason, "Raise max_parameters")
    if parameters < (config.min_parameters or 0):
        reason = f"has {parameters:,} parameters, fewer than {config.min_parameters:,}"
        raise RefusedModel(source, "too_small", reason, "Lower min_parameters")


def new_reader(work: WorkFolder, config: CollectConfig) -> HubReader:
    """A reader of the Hub that keeps pace with all others of the run."""
    return HubReader(Pace(work.root / "pace"), retries=config.retries, pause=config.retry_pause)


@dataclass(frozen=True)
class HubTask(ModelTask):
    """One model of the Hub to deal with, see `ModelTask`; make it with `hub_task`.

    Attributes:
        candidate: as listed.
        workers: how many work at once, on this and other machines that share the output.
    """

    candidate: Candidate = None
    workers: int = 1

    @cached_property
    def hub(self) -> HubReader:
        return new_reader(WorkFolder(self.output), self.config)

    @property
    def bytes_read(self) -> int:
        return self.hub.bytes_read

    def record(self, work: WorkFolder) -> ModelRecord:
        """As of a `ModelTask`; the files are let go of at the end."""
        with empty_folder(work.temporary / f"examined-{self.index}") as folder:
            with refusing(self.source):
                examined = examine(self.candidate, self.hub, self.config, folder)
            key = examined.weights_key and sha256(examined.weights_key)
            record = self._known_copy(work, examined, key) or self._fetched(work, examined, folder)
        if key:
            work.write_text(work.mark(key), str(self.index))
        return record

    def check_unchanged(self) -> None:
        """Nothing to check: files of one commit do not change."""

    def _known_copy(self, work: WorkFolder, examined: Examined, key: str | None) -> ModelRecord | None:
        """The record of a model whose weight files are those of a model before it, which need not be fetched again.

        It takes the other's columns, the hash of the weights among them, by which `collect` then knows the copy.
        """
        mark = work.mark(key) if key else None
        if mark is None or not mark.is_file():
            return None
        first = int(mark.read_text(encoding="utf-8"))
        before = work.read_model(first) if first < self.index else None  # of copies, the first keeps its windows
        if before is None:  # or a run was killed between the mark and the record
            return None
        return self.accepted(before, examined.config, examined.library, self.candidate.commit)

    def _fetched(self, work: WorkFolder, examined: Examined, folder: Path) -> ModelRecord:
        """Fetches the weights, tokenizes them into the part, and lets go of the files."""
        repo_id, commit = self.candidate.repo_id, self.candidate.commit
        with weights_folder(work, self.index, examined.download_bytes, self.config, self.workers) as files:
            for path in folder.glob("*.json"):
                shutil.copyfile(path, files / path.name)
            for file in examined.weights:
                self.hub.download(repo_id, commit, file, files / file.path)
            with refusing(self.source):
                checkpoint = open_checkpoint(
                    files, min_parameters=self.config.min_parameters, allow_nonfinite=self.config.allow_nonfinite
                )
            with checkpoint:
                if not examined.checked:
                    self._check_pickle(examined, checkpoint, folder, files)
                return self.tokenized(work, checkpoint)

    def _check_pickle(self, examined: Examined, checkpoint: Checkpoint, folder: Path, files: Path) -> None:
        """Asks of a file that had to be fetched for it what a safetensors file's header tells beforehand."""
        check_parameters(self.candidate.repo_id, checkpoint.num_parameters, self.config)
        if self.config.check == "loadable":
            shown = shown_to_loader(folder)
            if checkpoint.stored_as:
                show_hollow(
                    shown,
                    {name: checkpoint.tensors[checkpoint.tied.get(name, name)] for name in checkpoint.tensor_order},
                )
            for file in () if checkpoint.stored_as else examined.weights:
                os.symlink(files / file.path, shown / file.path)
            check_loadable(shown, self.candidate.repo_id, examined.library, examined.config, checkpoint.tensors)


def hub_task(index: int, candidate: Candidate, config: CollectConfig, output: Path, workers: int) -> HubTask:
    """The task of a candidate; see `HubTask`."""
    facts = HubFacts(candidate.tags, candidate.card)
    return HubTask(index, candidate.source, candidate.commit, config, output, facts, candidate, workers)


@contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """A folder for the block, empty at first (a run that was killed may have left it) and removed at the end."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def weights_folder(work: WorkFolder, index: int, size: int, config: CollectConfig, workers: int) -> Iterator[Path]:
    """A folder with room for `size` bytes.

    All workers together never hold more than `max_disk`: one half is shared out among them, and a model that is larger
    than a worker's share takes the other half, one such model at a time.
    """
    with ExitStack() as stack:
        if size > config.max_disk_bytes // 2 // workers:
            stack.enter_context(FileLock(work.root / "large_model.lock"))
        yield stack.enter_context(empty_folder(work.temporary / f"weights-{index}"))
