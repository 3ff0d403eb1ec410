"""Tells what a file is by its content, and refuses what is not weights that can be read safely."""

import os
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO, Literal

from .errors import CheckpointError, shorten


SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".th", ".tar", ".pkl", ".pickle")
# torch.save before 1.6 starts with this number, pickled; no other pickle does.
TORCH_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
PICKLE_STARTS = (b"(", b"}", b"]", b"c", b"i")  # of an object, a mapping or a list in protocol 0 or 1

SAVE_SAFELY = (
    "If you trust the file, load it where its code is installed and save the state dict with "
    "safetensors.torch.save_file"
)
CONVERT = "Load it with the library that wrote it and save its arrays, by name, with safetensors"
UNPACK = "Pass the original model, or dequantize to safetensors"
EXPORT = "An exported graph carries no state dict; pass the checkpoint it was exported from"

# Told by the first bytes, whatever the suffix: (first bytes, what the file is, what to do).
CONTENTS = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the weights it stands for",
        "Run `git lfs pull` in its repository, or download the file itself",
    ),
    *(
        (mark, "is a git-annex pointer, not the weights it stands for", "Run `git annex get` in its repository")
        for mark in (b"/annex/objects/", b".git/annex/", b"../.git/annex/")
    ),
    (b"# xet version", "is a Xet pointer, not the weights it stands for", "Fetch the file with git-xet or the Hub"),
    (b"lmgg", "is a GGML file: weights packed for llama.cpp", UNPACK),
    (b"tjgg", "is a GGML file: weights packed for llama.cpp", UNPACK),
    (b"\x1f\x8b", "is a gzip archive", "Unpack it first"),
    (b"\xfd7zXZ", "is an xz archive", "Unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "Unpack it first"),
    (b"BZh", "is a bzip2 archive", "Unpack it first"),
    (b"<!DOCTYPE", "is a web page; the download went wrong", "Download the file itself"),
    (b"<html", "is a web page; the download went wrong", "Download the file itself"),
)
# Of other frameworks, and read: (first bytes, the kind).
FRAMEWORK_MARKS = ((b"\x89HDF\r\n\x1a\n", "hdf5"), (b"\x93NUMPY", "npy"), (b"GGUF", "gguf"))
FRAMEWORK_SUFFIXES = {".onnx": "onnx", ".msgpack": "flax", ".gguf": "gguf"}
# Suffixes by which folders and lists tell them; a lone .npy or .index is as often something else. A quantized copy and
# an exported graph are taken last.
FRAMEWORK_WEIGHTS = (".keras", ".h5", ".hdf5", ".msgpack", ".npz", ".pdparams", ".gguf", ".onnx")
TABLE_MARK = bytes.fromhex("57fb808b247547db")  # the end of a TensorFlow checkpoint's index
# Told by the suffix, where the content has no mark of its own.
SUFFIXES = {
    ".pb": ("is a TensorFlow graph (SavedModel or frozen graph)", CONVERT),
    ".tflite": ("is a TensorFlow Lite model", EXPORT),
    ".mlmodel": ("is a Core ML model", EXPORT),
    ".caffemodel": ("is a Caffe model", CONVERT),
    ".engine": ("is a TensorRT engine", EXPORT),
    ".md": ("is text, not weights", "Pass the folder or the weight file"),
    ".txt": ("is text, not weights", "Pass the folder or the weight file"),
    ".yaml": ("is text, not weights", "Pass the folder or the weight file"),
    ".json": ("is not valid JSON, nor weights", "Pass the folder or the weight file"),
}
FOREIGN_SUFFIXES = (".pb", ".tflite", ".mlmodel")
READABLE = (
    "Readable: safetensors and torch.save files, shards with their index, PEFT adapters, Keras, Flax, ONNX, NumPy, "
    "TensorFlow and GGUF checkpoints, and folders of these"
)


def identify(path: Path) -> str:
    """Names the format of a file by its content; nothing is unpickled.

    Returns:
        "safetensors", "torch archive", "torch legacy", "pickle", "json", or one of other frameworks: "flax", "hdf5",
        "keras", "npy", "npz", "onnx", "tensorflow".

    Raises:
        CheckpointError: the file is empty, not a regular file, or of a kind that is refused, which is named.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise CheckpointError(path, "is not a regular file", "Pass a file or a folder with weights")
    with path.open("rb") as stream:
        head = stream.read(512)
        stream.seek(-min(8, os.fstat(stream.fileno()).st_size), os.SEEK_END)
        end = stream.read(8)
    if not head:
        raise CheckpointError(path, "is an empty file", "Fetch or write it again")
    for mark, what, advice in CONTENTS:
        if head.startswith(mark):
            raise CheckpointError(path, what, advice)
    for mark, kind in FRAMEWORK_MARKS:
        if head.startswith(mark):
            return kind
    suffix = path.suffix.lower()
    if head.startswith(b"PK\x03\x04"):
        return archive_kind(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch legacy" if TORCH_LEGACY_MAGIC in head[:32] else "pickle"
    if head[257:262] == b"ustar":
        raise CheckpointError(path, "is a tar archive", "Unpack it first")
    if head[4:8] == b"TFL3":
        raise CheckpointError(path, *SUFFIXES[".tflite"])
    # Protocol buffers have no mark; these are the first fields of a SavedModel (schema 1) and of an ONNX model.
    if head.startswith(b"\x08\x01\x12"):
        raise CheckpointError(path, *SUFFIXES[".pb"])
    if head[:1] == b"\x08" and b"\x03" <= head[1:2] <= b"\x20" and head[2:3] in b"\x12\x1a\x22\x3a\x42":
        return "onnx"
    if end == TABLE_MARK:
        return "tensorflow"
    if suffix in SAFETENSORS_SUFFIXES:
        return "safetensors"
    if suffix in FRAMEWORK_SUFFIXES or is_msgpack(head):
        return FRAMEWORK_SUFFIXES.get(suffix, "flax")
    if head.lstrip()[:1] in (b"{", b"["):
        return "json"
    if suffix in SUFFIXES:
        raise CheckpointError(path, *SUFFIXES[suffix])
    if suffix in TORCH_SUFFIXES and head[:1] in PICKLE_STARTS:  # protocol 0 and 1 have no mark
        return "pickle"
    raise CheckpointError(path, f"is of no known format (first bytes {head[:8].hex(' ')})", READABLE)


def is_msgpack(head: bytes) -> bool:
    """Whether a file begins as a mapping of MessagePack whose first key is a short text, as a Flax checkpoint does."""
    start = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0)
    if not start or len(head) <= start or not 0xA1 <= head[start] <= 0xBF:
        return False
    key = head[start + 1 : start + 1 + (head[start] & 0x1F)]
    return key.isascii() and key.decode("ascii").isprintable()


def archive_kind(path: Path) -> Literal["torch archive", "keras", "npz"]:
    """Names the kind of a zip archive by what is in it; one that cannot be listed is refused as torch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, EOFError, OSError):
        return "torch archive"
    if "model.weights.h5" in names:
        return "keras"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "torch archive"


def data_offset(path: Path, stream: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: behind its local header, which gives the lengths of its two variable parts."""
    stream.seek(record.header_offset)
    header = stream.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no record at byte {record.header_offset}")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    offset = record.header_offset + 30 + lengths
    if offset + record.file_size > os.stat(path).st_size:
        raise zipfile.BadZipFile(f"record {record.filename!r} ends behind the file's end")
    return offset


def refuse_foreign_archive(path: Path, names: list[str]) -> None:
    """Refuses a zip that is not one state dict written by torch.save, telling what it is instead."""
    parts = [name.split("/") for name in names]
    leaves = {p[-1] for p in parts}
    roots = {p[0] for p in parts if len(p) == 2 and p[1] == "data.pkl"}
    if {"constants.pkl", "bytecode.pkl"} & leaves or any(len(p) > 2 and p[1] == "code" for p in parts):
        what, advice = "is a TorchScript archive: it carries code", f"Pass the eager model's state dict. {SAVE_SAFELY}"
    elif "archive_format" in leaves or "serialized_exported_program.json" in leaves:
        what, advice = "is a program saved by torch.export", EXPORT
    elif "policy.pth" in leaves:
        what, advice = "is a Stable-Baselines3 archive", "Unpack it and pass its policy.pth"
    elif len(set(names)) < len(names):
        what, advice = "is a zip archive that names a record twice", "Write it again with torch.save"
    elif len(roots) != 1:
        listed = ", ".join(shorten(name, 60) for name in names[:5]) or "nothing"
        what, advice = f"is a zip archive that torch.save did not write (it holds {listed})", "Unpack it first"
    else:
        return
    raise CheckpointError(path, what, advice)
