"""What is refused: each with an error that names the file, the reason and what to do, and with nothing executed."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modeling_wsl.checkpoints.checkpoint import CheckpointError, open_checkpoint


def refused(path, match: str) -> CheckpointError:
    """Opens and reads; the error must come while opening, name the path and match."""
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) or str(Path(path).parent) in str(caught.value)
    return caught.value


class Exploit:
    """Unpickled by plain pickle, it makes the marker file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def zip_torch(path: Path, content: object) -> None:
    torch.save(content, path)


def legacy_torch(path: Path, content: object) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors", ""])
def test_a_plain_pickle_with_code_and_no_weights_is_refused_by_the_name_of_its_global(protocol, suffix, tmp_path):
    path, marker = tmp_path / f"model{suffix}", tmp_path / "marker"
    path.write_bytes(pickle.dumps({"weight": Exploit(marker)}, protocol))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert not marker.exists() and str(path) in str(caught.value)
    if protocol >= 2 or suffix in (".pt", ".bin"):
        assert "posix.system" in str(caught.value)


@pytest.mark.parametrize("save", [zip_torch, legacy_torch])
@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"epoch": 3, "hook": e}, lambda e: [e]])
def test_a_torch_file_of_code_alone_is_refused_by_the_name_of_its_global(save, wrap, tmp_path):
    path, marker = tmp_path / "pytorch_model.bin", tmp_path / "marker"
    save(path, wrap(Exploit(marker)))
    error = refused(path, "needs code.*posix.system.*nothing of it was run")
    assert "trust" in str(error)
    refused(tmp_path, "posix.system")
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused_by_content_whatever_its_suffix(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(3, 3)), str(tmp_path / "m.pt"))
    for name in ("m.jit", "model.safetensors", "pytorch_model.bin"):
        shutil.copy(tmp_path / "m.pt", tmp_path / name)
        refused(tmp_path / name, "TorchScript archive")


# --- safetensors headers -------------------------------------------------------------------------------------------


def raw_safetensors(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "a header longer than the file": (raw_safetensors({"a": entry()}, b"\0" * 8, length=10**6), "header is 1,000,000"),
    "a header length near 2**64": (raw_safetensors({"a": entry()}, b"\0" * 8, length=2**64 - 1), "header is 18,446"),
    "a truncated file": (raw_safetensors({"a": entry()}, b"\0" * 7), "take 8 bytes, 7 are there"),
    "trailing bytes": (raw_safetensors({"a": entry()}, b"\0" * 9), "take 8 bytes, 9 are there"),
    "offsets beyond the end": (
        raw_safetensors({"a": entry(shape=[10**9], offsets=[0, 4 * 10**9])}, b"\0"),
        "1 are there",
    ),
    "a tensor without its bytes": (raw_safetensors({"a": entry(shape=[3])}, b"\0" * 8), "needs 12 bytes, not 8"),
    "an overlap": (raw_safetensors({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "'b' overlaps"),
    "a gap": (raw_safetensors({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20), "'b' leaves bytes out"),
    "offsets that run backwards": (raw_safetensors({"a": entry(offsets=[8, 0])}, b"\0" * 8), "needs 8 bytes"),
    "negative offsets": (raw_safetensors({"a": entry(offsets=[-8, 0])}, b"\0" * 8), "byte range"),
    "a negative shape": (raw_safetensors({"a": entry(shape=[-1, -2])}, b"\0" * 8), "shape"),
    "a boolean shape": (raw_safetensors({"a": entry(shape=[True, 2])}, b"\0" * 8), "shape"),
    "a shape of 100 dimensions": (raw_safetensors({"a": entry(shape=[1] * 99 + [2])}, b"\0" * 8), "shape"),
    "a shape whose product overflows": (raw_safetensors({"a": entry(shape=[2**62, 4])}, b"\0" * 8), "needs"),
    "an unknown dtype": (raw_safetensors({"a": entry("F31")}, b"\0" * 8), "unknown dtype 'F31'"),
    "a dtype that is a list": (raw_safetensors({"a": entry(["F32"])}, b"\0" * 8), "unknown dtype"),
    "a dtype that torch lacks": (raw_safetensors({"a": entry("F6_E2M3", [4], [0, 3])}, b"\0" * 3), "torch lacks"),
    "an entry without offsets": (raw_safetensors({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8), "lacks dtype"),
    "an entry that is a list": (raw_safetensors({"a": [1, 2]}, b"\0" * 8), "lacks dtype"),
    "a key given twice": (
        raw_safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
        "twice",
    ),
    "metadata of numbers": (raw_safetensors({"a": entry(), "__metadata__": {"x": 1}}, b"\0" * 8), "__metadata__"),
    "no JSON": (raw_safetensors(b"{not json", b""), "not valid JSON"),
    "JSON nested too deeply": (raw_safetensors(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}", b""), "not valid JSON"),
    "no UTF-8": (raw_safetensors(b'{"\xff": 1}', b""), "not valid JSON"),
    "a header that is a list": (raw_safetensors(b"[1, 2]", b""), "does not start with"),
    "three bytes": (b"abc", "header is"),
    "an empty header": (raw_safetensors({}, b""), "no floating-point tensor"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_that_lies_is_refused(name, tmp_path):
    content, match = HEADERS[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path / "model.safetensors", match)
    refused(tmp_path, match)


def test_every_single_damaged_header_byte_is_refused_or_harmless(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.int16)}, path)
    good = path.read_bytes()
    for at in range(8 + int.from_bytes(good[:8], "little")):
        for value in (0, 34, 57, 123, 255):
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            try:
                open_checkpoint(path).state_dict()
            except CheckpointError as error:
                assert str(path) in str(error)


# --- torch archives ------------------------------------------------------------------------------------------------


def rezip(source: Path, target: Path, edit, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            for name, data in edit(info.filename, old.read(info)):
                new.writestr(name, data)


def test_damaged_torch_files_are_refused(tmp_path):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"w": torch.ones(100), "v": torch.zeros(50)}, good)
    bad.write_bytes(good.read_bytes()[:-400])
    refused(bad, "damaged or cut-off zip")
    rezip(good, bad, lambda name, data: [(name, data)], zipfile.ZIP_DEFLATED)
    refused(bad, "records are compressed")
    rezip(good, bad, lambda name, data: [(name, data[:40] if name.endswith("data/0") else data)])
    refused(bad, "records disagree about the size")
    rezip(good, bad, lambda name, data: [] if name.endswith("data/1") else [(name, data)])
    refused(bad, "lacks the record '1' of a tensor")
    rezip(good, bad, lambda name, data: [(name, data[:-20] if name.endswith("data.pkl") else data)])
    refused(bad, "cannot be read: it (is damaged|ends)|disagree")
    with pytest.warns(UserWarning, match="Duplicate name"):
        rezip(good, bad, lambda name, data: [(name, data)] * 2)
    refused(bad, "names a record twice")
    torch.save({"w": torch.ones(100)}, good, _use_new_zipfile_serialization=False)
    bad.write_bytes(good.read_bytes()[:-100])
    refused(bad, "it ends inside of a storage")


def test_a_tensor_that_shows_few_bytes_as_very_many_is_refused(tmp_path):
    torch.save({"w.weight": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "bomb.pt")
    refused(tmp_path / "bomb.pt", "'w.weight' of shape .* shows 4 stored bytes as 4,000,000,000,000")
    assert open_checkpoint({"w": torch.ones(1, 3).expand(5, 3)}).read("w").shape == (5, 3)


def test_other_zip_archives_are_refused_by_what_they_are(tmp_path):
    for names, match in (
        (["policy.pth", "data"], "Stable-Baselines3.*policy.pth"),
        (["config.json", "model.weights.h5"], "cannot be read as an archive of Keras|needs the package h5py"),
        (["a.npy", "b.npy"], "the header of its array 'a' cannot be read"),
        (["x/archive_format", "x/models/model.json"], "torch.export"),
        (["a.txt"], "torch.save did not write .it holds 'a.txt'"),
        ([], "is a zip archive|is of no known format"),
    ):
        with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"x")
        refused(tmp_path / "m.zip", match)


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index in `tmp_path/model`; the index can be rewritten with `write`."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(3), "b": torch.ones(4)}, folder / "one.safetensors")
    save_file({"c": torch.ones(5)}, folder / "two.safetensors")

    def write(**changes):
        weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"} | changes
        content = {
            "metadata": {"total_size": 48},
            "weight_map": {n: s for n, s in weight_map.items() if s is not None},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return folder

    write()
    return write


def test_a_missing_shard_is_refused_by_name(sharded):
    assert list(open_checkpoint(sharded()).tensors) == ["a", "b", "c"]
    (sharded() / "two.safetensors").unlink()
    refused(sharded(), r"model\.safetensors\.index\.json: lacks the shard two\.safetensors")


def test_shards_that_contradict_their_index_are_refused_by_tensor_and_shard(sharded):
    refused(sharded(d="two.safetensors"), "places tensor 'd' in two.safetensors, which does not hold it")
    refused(sharded(b=None), "one.safetensors holds tensor 'b'; the index does not list it")
    refused(sharded(b="two.safetensors"), "one.safetensors holds tensor 'b'; the index places it in two.safetensors")
    save_file({"c": torch.ones(5), "a": torch.zeros(3)}, sharded() / "two.safetensors")
    refused(sharded(), "two.safetensors holds tensor 'a'; the index places it in one.safetensors")


def test_torch_shards_are_held_to_their_index_too(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "one.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.bin", "b": "one.bin"}})
    )
    refused(tmp_path, "places tensor 'b' in one.bin, which does not hold it")


@pytest.mark.parametrize(
    "name", ["../two.safetensors", "/etc/passwd", "x/../../two.safetensors", "..\\two.safetensors", "."]
)
def test_a_shard_name_that_escapes_the_folder_is_refused_before_it_is_looked_for(name, sharded, tmp_path):
    shutil.copy(sharded() / "two.safetensors", tmp_path / "two.safetensors")
    refused(sharded(c=name), "is not inside its folder")


def test_a_link_out_of_the_folder_is_refused_unless_it_is_a_hub_cache(sharded, tmp_path):
    folder = sharded()
    (folder / "two.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "two.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "names the shard two.safetensors, a link out of the folder")
    (folder / "two.safetensors").unlink()
    (folder / "two.safetensors").symlink_to("absent")
    refused(folder, "lacks the shard two.safetensors .a broken link")

    snapshot, blobs = tmp_path / "models--o--m" / "snapshots" / "c0ffee", tmp_path / "models--o--m" / "blobs"
    store = tmp_path / "store"
    for path in (snapshot, blobs, store):
        path.mkdir(parents=True)
    (tmp_path / "elsewhere.safetensors").rename(store / "22")  # caches may share blobs through links of their own
    (blobs / "2").symlink_to("../../store/22")
    (folder / "one.safetensors").rename(blobs / "1")
    (folder / "model.safetensors.index.json").rename(blobs / "0")
    for name, blob in (("model.safetensors.index.json", 0), ("one.safetensors", 1), ("two.safetensors", 2)):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert set(open_checkpoint(snapshot).state_dict()) == {"a", "b", "c"}


INDICES = [
    b"",
    b"[]",
    b"3",
    b"{}",
    b'{"weight_map": []}',
    b'{"weight_map": {}}',
    b'{"weight_map": {"a": 3}}',
    b'{"weight_map": {"a": ["one.safetensors"]}}',
    b'{"weight_map": {"a": null}}',
    b'{"weight_map": {"a": ""}}',
    b'{"weight_map": {"a": {"b": "c"}}}',
    b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}',
    b'{"weight_map": {"a": "model.safetensors.index.json"}}',
    b'{"weight_map": {"a": "model"}}',
    b'{"weight_map": ' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}",
    b"\xff\xfe",
    b'{"weight_map": {"a": ' + b"9" * 10**4 + b"}}",
]


@pytest.mark.parametrize("number", range(len(INDICES)))
def test_an_index_of_wrong_types_is_refused(number, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model.safetensors.index.json").write_bytes(INDICES[number])
    refused(tmp_path, ".")
    refused(tmp_path / "model.safetensors.index.json", ".")


# --- folders and foreign formats -----------------------------------------------------------------------------------


def test_folders_without_weights_list_what_is_there(tmp_path):
    refused(tmp_path, "there is nothing")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    refused(tmp_path, "there is config.json, optimizer.pt, unet/")
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    refused(tmp_path, "is of no known format")


def test_folders_with_several_models_name_them(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"w": torch.ones(3)}, tmp_path / name)
    refused(tmp_path, "2 weight files: x.safetensors, y.safetensors")
    (tmp_path / "x.safetensors").rename(tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["w"]
    (tmp_path / "y.safetensors").rename(tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "a model .model.safetensors. and an adapter")
    for name in ("model.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).rename(tmp_path / f"model-0000{len(name)}-of-00009.safetensors")
    refused(tmp_path, "shards .* without their index")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FOREIGN = {
    "empty.safetensors": (b"", "is an empty file"),
    "model.safetensors": (LFS, "Git LFS pointer.*git lfs pull"),
    "pytorch_model.bin": (LFS, "Git LFS pointer"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch", "holds no array of numbers"),
    "renamed.bin": (b"\x08\x07\x12\x99pytorch", "cannot be read as ONNX"),
    "saved_model.pb": (b"\x08\x01\x12\xf0\x812", "TensorFlow graph"),
    "frozen.pb": (b"\n$\n\x05input", "TensorFlow graph"),
    "model.h5": (b"\x89HDF\r\n\x1a\n....", "cannot be read as HDF5"),
    "weights.keras": (b"\x89HDF\r\n\x1a\n....", "cannot be read as HDF5"),
    "model.gguf": (b"GGUF\x03\0\0\0", "cannot be read as GGUF"),
    "model.tflite": (b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
    "array.npy": (b"\x93NUMPY\x01\0", "the header of its array 'array.npy' cannot be read"),
    "flax_model.msgpack": (b"\x81\xa6params", "cannot be read as MessagePack of Flax"),
    "model.tar.gz": (b"\x1f\x8b\x08\0", "gzip"),
    "model.pth.tar": (b"\0" * 257 + b"ustar" + b"\0" * 300, "tar archive"),
    "page.bin": (b"<!DOCTYPE html><html>", "web page"),
    "README.md": (b"# model", "is text"),
    "config.json": (b'{"hidden_size": 3}', "is JSON, not weights"),
    "broken.json": (b"{'hidden_size': 3}", "not valid JSON"),
    "model.json": (b'{"weightsManifest": [{"paths": ["a"], "weights": []}]}', "TensorFlow.js"),
    "manifest.json": (b'[{"paths": ["a"], "weights": []}]', "TensorFlow.js"),
    "noise.bin": (bytes(range(200, 240)), "no known format .first bytes c8 c9.*Readable"),
    "one.pt": (b"\x08", "no known format"),
    "zero.pth": (b"\0" * 100, "no known format"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_format_is_named(name, tmp_path):
    content, match = FOREIGN[name]
    for kind, package in {"ONNX": "onnx", "HDF5": "h5py", "Flax": "msgpack", "no array": "onnx"}.items():
        if kind in match:
            pytest.importorskip(package)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, match)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "not a regular file")


def test_weights_without_any_float_are_refused(tmp_path):
    state = {"packed": torch.ones(8, dtype=torch.int8), "empty": torch.empty(0)}
    save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.pt")
    for source in (tmp_path / "m.safetensors", tmp_path / "m.pt"):
        refused(source, r"holds no floating-point tensor \(2 tensors: float32, int8\)")
    with pytest.raises(CheckpointError, match="no floating-point tensor"):
        open_checkpoint(state)


def test_a_key_for_a_file_without_nesting_is_refused(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="is a safetensors file: it has no state dict under the key 'model'"):
        open_checkpoint(tmp_path / "m.safetensors", key="model")


def test_a_broken_config_beside_the_weights_is_refused(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    for content in ("[1]", "{", "null"):
        (tmp_path / "config.json").write_text(content)
        refused(tmp_path, "config.json: ")
