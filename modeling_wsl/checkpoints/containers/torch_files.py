"""torch.save files: loaded with `weights_only=True`, memory-mapped."""

import re
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import CheckpointError, shorten
from ..formats import PICKLE_SCAN_BYTES, SAVE_SAFELY, TorchArchive, pickle_globals, read_archive
from ..state_dicts import walk_tensors


def load_torch_file(path: Path, kind: Literal["torch archive", "torch legacy"]) -> Any:
    """Unpickles a torch.save file with `weights_only=True`: tensors and plain containers, no code.

    The zip format is memory-mapped; the format before torch 1.6 is read into memory.

    Raises:
        CheckpointError: the pickle needs code (the refused global is named), or the file is damaged.
    """
    archive = read_archive(path) if kind == "torch archive" else None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive is not None)
    except Exception as error:  # the unpickler meets a hostile file with any error there is
        raise refusal(path, archive, error) from error
    if archive is not None:
        check_storages(path, content, archive.records)
    return content


def refusal(path: Path, archive: TorchArchive | None, error: Exception) -> CheckpointError:
    """Words torch's refusal in one line: the global it would not import, or what it could not read."""
    text = str(error)
    if named := re.findall(r"GLOBAL ([\w.]+)", text)[:1] or code_in(path, archive):
        listed = ", ".join(shorten(name) for name in named[:6])
        return CheckpointError(path, f"is a pickle that needs code ({listed}); nothing of it was run", SAVE_SAFELY)
    told = text.rpartition("WeightsUnpickler error:")[2].splitlines()
    told = [line.strip() for line in told if line.strip() and "weights_only" not in line] or [type(error).__name__]
    reason = f"cannot be read by torch.load(weights_only=True): {shorten(told[0], 200)}"
    return CheckpointError(path, reason, f"It is damaged or carries more than weights. {SAVE_SAFELY}")


def code_in(path: Path, archive: TorchArchive | None) -> list[str]:
    """Globals of a torch.save file that no state dict needs, where torch's message names none."""
    offset, size = archive.pickle if archive else (0, PICKLE_SCAN_BYTES)
    with path.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(min(size, PICKLE_SCAN_BYTES))
    return [name for name in pickle_globals(data) if not name.startswith(("torch.", "collections."))]


def check_storages(path: Path, content: Any, records: dict[int, int]) -> None:
    """Refuses an archive whose pickle gives a storage another size than its record has.

    Memory-mapped storages are slices of one mapping, cut as the pickle says, so a pickle that lies shows the bytes of
    other records as weights. All storages together must fit the records at one common base address.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in walk_tensors(content)
        if tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.untyped_storage().nbytes()
    }
    if not storages:
        return
    first = min(storages)
    for offset, size in records.items():
        base = first - offset
        if size == storages[first] and all(records.get(at - base) == n for at, n in storages.items()):
            return
    reason = "its pickle and its records disagree about the size of a tensor"
    raise CheckpointError(path, reason, "The file is damaged or forged; fetch or write it again")
