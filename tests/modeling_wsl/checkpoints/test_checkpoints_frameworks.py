"""Checkpoints of other frameworks: values and names are kept, axes come as `[out, in, ...]`."""

import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from datasets_scripts.sources import expand_sources
from modeling_wsl import WeightManifest, WSLFeatureExtractor
from modeling_wsl.checkpoints.checkpoint import CheckpointError, open_checkpoint


RNG = np.random.default_rng(0)


def array(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def original(checkpoint, name):
    """The array as the file has it."""
    tensor, axes = checkpoint.read(name), checkpoint.layouts.get(name)
    return (tensor if axes is None else tensor.permute(axes)).numpy()


def check_exact(path, stored, axes):
    """Every array has its values; those in `axes` come permuted so."""
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.tensors) == set(stored)
        for name, value in stored.items():
            assert np.array_equal(original(checkpoint, name), value), name
            order = axes.get(name, range(value.ndim))
            assert np.array_equal(checkpoint.read(name).numpy(), value.transpose(order)), name
            assert checkpoint.tensors[name].shape == value.transpose(order).shape
        assert set(checkpoint.layouts) == set(axes)
        return checkpoint


# --- NumPy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_numpy_archive_is_read_by_name_with_flax_kernels_turned(save, tmp_path):
    stored = {
        "embedding/kernel": array(3, 3, 2, 5),
        "embedding/bias": array(5),
        "Encoder/Dense_0/kernel": array(5, 4, dtype=np.float64),
        "Encoder/Attention_0/query/kernel": array(6, 2, 3),
        "Encoder/Attention_0/out/kernel": array(2, 3, 6),
        "pos_embedding": array(1, 7, 6),
        "by_columns": np.asfortranarray(array(3, 4)),
        "swapped": array(5).astype(">f4"),
        "steps": np.arange(3),
    }
    save(tmp_path / "vit.npz", **stored)
    axes = {
        "embedding/kernel": (3, 2, 0, 1),
        "Encoder/Dense_0/kernel": (1, 0),
        "Encoder/Attention_0/query/kernel": (1, 2, 0),
        "Encoder/Attention_0/out/kernel": (2, 0, 1),
    }
    checkpoint = check_exact(tmp_path / "vit.npz", stored, axes)
    assert list(checkpoint.tensors) == list(stored)
    check_exact(tmp_path, stored, axes)  # its folder is the same model


def test_a_kernel_whose_axes_are_not_known_is_left_as_it_is_and_said(tmp_path):
    np.savez(tmp_path / "w.npz", **{"mix/kernel": array(3, 4, 5)})
    checkpoint = check_exact(tmp_path / "w.npz", {"mix/kernel": open_original(tmp_path / "w.npz")}, {})
    assert "mix/kernel: it is not known" in checkpoint.ignored[0]


def open_original(path):
    return np.load(path)["mix/kernel"]


def test_a_lone_array_is_named_array(tmp_path):
    value = array(3, 4)
    np.save(tmp_path / "w.npy", value)
    check_exact(tmp_path / "w.npy", {"array": value}, {})


def test_python_objects_in_numpy_files_are_never_unpickled(tmp_path):
    class Exploit:
        def __reduce__(self):
            return (tmp_path / "marker").touch, ()

    np.save(tmp_path / "o.npy", np.array([Exploit()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "o.npz", w=array(3), o=np.array([Exploit()], dtype=object))
    for name in ("o.npy", "o.npz"):
        with pytest.raises(CheckpointError, match="Python objects, which are pickled"):
            open_checkpoint(tmp_path / name)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("shape", ["(99999999999, 9)", "(-1, 3)", "(3"])
def test_an_array_that_claims_more_than_the_file_holds_is_refused(shape, tmp_path):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    data = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + b"\0" * 12
    (tmp_path / "w.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "w.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", data)
    for name in ("w.npy", "w.npz"):
        with pytest.raises(CheckpointError, match="w.np"):
            open_checkpoint(tmp_path / name)


def test_a_row_of_a_zoo_matrix_is_a_model(tmp_path):
    kernel, bias = array(4, 3, 3, 1, 2), array(4, 2)
    np.save(tmp_path / "weights.npy", np.concatenate([bias, kernel.reshape(4, -1)], axis=1))
    layout = 'varname,start_idx,end_idx,shape\nseq/conv2d/bias:0,0,2,"(2,)"\nseq/conv2d/kernel:0,2,20,"(3, 3, 1, 2)"\n'
    (tmp_path / "layout.csv").write_text(layout)
    with open_checkpoint(tmp_path / "weights.npy", key="2", min_parameters=0) as checkpoint:
        assert np.array_equal(original(checkpoint, "seq/conv2d/kernel:0"), kernel[2])
        assert np.array_equal(original(checkpoint, "seq/conv2d/bias:0"), bias[2])
        assert checkpoint.tensors["seq/conv2d/kernel:0"].shape == (2, 1, 3, 3)
    for key in (None, "4", "-1", "x"):
        with pytest.raises(CheckpointError, match="matrix of 4 models, a row each"):
            open_checkpoint(tmp_path / "weights.npy", key=key)
    (tmp_path / "layout.csv").write_text(layout.replace("2,20", "3,21"))
    with pytest.raises(CheckpointError, match="do not fit"):
        open_checkpoint(tmp_path / "weights.npy", key="2")


# --- Keras -----------------------------------------------------------------------------------------------------------

KERAS_2 = {
    "stem/stem/kernel:0": ((3, 3, 2, 4), (3, 2, 0, 1)),
    "stem/stem/bias:0": ((4,), None),
    "norm/norm/gamma:0": ((4,), None),
    "norm/norm/beta:0": ((4,), None),
    "norm/norm/moving_mean:0": ((4,), None),
    "norm/norm/moving_variance:0": ((4,), None),
    "up/up/kernel:0": ((3, 3, 4, 4), (2, 3, 0, 1)),  # its config says that it is transposed
    "up/up/bias:0": ((4,), None),
    "conv2d_transpose_1/conv2d_transpose_1/kernel:0": ((3, 3, 5, 4), (2, 3, 0, 1)),
    "depthwise_conv2d/depthwise_conv2d/depthwise_kernel:0": ((3, 3, 5, 1), (2, 3, 0, 1)),
    "lstm/lstm/lstm_cell/kernel:0": ((5, 16), (1, 0)),
    "lstm/lstm/lstm_cell/recurrent_kernel:0": ((4, 16), (1, 0)),
    "embed/embed/embeddings:0": ((7, 5), None),
    "head/head/kernel:0": ((5, 3), (1, 0)),
    "head/head/bias:0": ((3,), None),
}


def write_keras_2(path, root="", compression=None):
    h5py = pytest.importorskip("h5py")
    stored = {}
    with h5py.File(path, "w") as file:
        group = file.create_group(root) if root else file
        group.attrs["layer_names"] = list(dict.fromkeys(name.split("/")[0] for name in KERAS_2))
        for layer in group.attrs["layer_names"]:
            names = [name.partition("/")[2] for name in KERAS_2 if name.startswith(f"{layer}/")]
            group.create_group(layer).attrs["weight_names"] = names
        for name, (shape, _) in KERAS_2.items():
            stored[name] = array(*shape)
            group.create_dataset(name, data=stored[name], compression=compression)
        layers = [{"class_name": "Conv2DTranspose", "config": {"name": "up"}}]
        file.attrs["model_config"] = json.dumps(
            {"class_name": "Sequential", "config": {"name": "m", "layers": layers}}
        )
        file.create_dataset("optimizer_weights/adam/m", data=array(3))
    return stored


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("root", ["", "model_weights"])
def test_a_keras_2_file_has_its_kernels_turned_and_its_order_kept(root, compression, tmp_path):
    stored = write_keras_2(tmp_path / "m.h5", root, compression)
    checkpoint = check_exact(tmp_path / "m.h5", stored, {n: axes for n, (_, axes) in KERAS_2.items() if axes})
    assert list(checkpoint.tensors) == list(KERAS_2)
    assert checkpoint.constants == {"norm/norm/moving_mean:0", "norm/norm/moving_variance:0"}
    assert "optimizer_weights: state of training" in checkpoint.ignored


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_keras_archive_is_read_and_the_code_in_its_config_is_not(packing, tmp_path):
    h5py = pytest.importorskip("h5py")
    stored = {
        "layers/conv2d/vars/0": array(3, 3, 2, 4),
        "layers/conv2d/vars/1": array(4),
        "layers/batch_normalization/vars/0": array(4),
        "layers/batch_normalization/vars/1": array(4),
        "layers/batch_normalization/vars/2": array(4),
        "layers/batch_normalization/vars/3": array(4),
        "layers/my_block/expand/vars/0": array(4, 6),
        "layers/my_block/expand/vars/1": array(6),
        "layers/embedding/vars/0": array(9, 4),
    }
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for name, value in stored.items():
            file.create_dataset(name, data=value)
        file.create_dataset("optimizer/vars/0", data=array(3))
    with zipfile.ZipFile(tmp_path / "m.keras", "w", packing) as archive:
        archive.writestr("config.json", '{"class_name": "Lambda", "config": {"function": "code"}}')
        archive.write(tmp_path / "w.h5", "model.weights.h5")
    axes = {"layers/conv2d/vars/0": (3, 2, 0, 1), "layers/my_block/expand/vars/0": (1, 0)}
    checkpoint = check_exact(tmp_path / "m.keras", stored, axes)
    assert checkpoint.constants == {f"layers/batch_normalization/vars/{index}" for index in (2, 3)}
    assert any("Lambda" in line for line in checkpoint.ignored)


def test_links_and_data_elsewhere_are_refused_in_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["w"] = array(9)
    (tmp_path / "secret").write_bytes(b"x" * 64)

    def soft(file):
        file["w"] = array(9)
        file["l"] = h5py.SoftLink("/w")

    def external(file):
        file["l"] = h5py.ExternalLink("other.h5", "/w")

    def outside(file):
        file.create_dataset("w", (9,), "f4", external=[(str(tmp_path / "secret"), 0, 36)])

    def virtual(file):
        layout = h5py.VirtualLayout((9,), "f4")
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "w", (9,))
        file.create_virtual_dataset("w", layout)

    def circle(file):
        group = file.create_group("a")
        group["b"] = group

    def unwritten(file):
        file.create_dataset("w", (1 << 40,), "f4", chunks=(1 << 20,))

    def object_reference(file):
        file["w"] = array(9)
        file["r"] = np.array([file["w"].ref], dtype=h5py.ref_dtype)

    cases = {
        soft: "link to another place",
        external: "link to another file",
        outside: "lies in other files",
        virtual: "lies in other files",
        circle: "linked twice",
        unwritten: "of which 0 are stored",
    }
    for write, match in cases.items():
        with h5py.File(tmp_path / "m.h5", "w") as file:
            write(file)
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "w") as file:
        object_reference(file)
    assert list(open_checkpoint(tmp_path / "m.h5").tensors) == ["w"]


def test_codes_of_keras_quantization_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = np.ones((4, 5), np.int8)
        file["layers/dense/vars/1"] = array(5)
    with pytest.raises(CheckpointError, match="quantized by Keras"):
        open_checkpoint(tmp_path / "m.weights.h5")


# --- Flax ------------------------------------------------------------------------------------------------------------


def flax_array(value, dtype=None):
    msgpack = pytest.importorskip("msgpack")
    entries = (value.shape, dtype or value.dtype.name, value.tobytes())
    return msgpack.ExtType(1, msgpack.packb(entries, use_bin_type=True))


def test_a_flax_checkpoint_is_read_with_its_statistics_and_without_its_optimizer(tmp_path):
    msgpack = pytest.importorskip("msgpack")
    big, half = array(4, 6), torch.randn(6).bfloat16()
    chunks = {str(i): flax_array(part) for i, part in enumerate(np.split(big.reshape(-1), 3))}
    stored = {
        "params/Conv_0/kernel": array(3, 3, 2, 4),
        "params/ConvTranspose_0/kernel": array(3, 3, 2, 4),
        "params/c_fc/kernel": array(8, 2),
        "batch_stats/BatchNorm_0/mean": array(4),
    }
    tree = {
        "params": {name.split("/")[1]: {"kernel": flax_array(v)} for name, v in list(stored.items())[:3]},
        "batch_stats": {"BatchNorm_0": {"mean": flax_array(stored["batch_stats/BatchNorm_0/mean"])}},
        "opt_state": {"0": {"mu": flax_array(array(3))}},
        "step": 7,
    }
    tree["params"]["Dense_0"] = {
        "kernel": {"__msgpack_chunked_array__": True, "shape": {"0": 4, "1": 6}, "chunks": chunks},
        "bias": flax_array(half.view(torch.int16).numpy(), "bfloat16"),
    }
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(tree, strict_types=True))
    stored["params/Dense_0/kernel"] = big
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("params/Dense_0/bias"), half)
        for name, value in stored.items():
            assert np.array_equal(original(checkpoint, name), value), name
        assert checkpoint.layouts == {
            "params/Conv_0/kernel": (2, 3, 1, 0),
            "params/ConvTranspose_0/kernel": (2, 3, 1, 0),
            "params/Dense_0/kernel": (1, 0),
        }
        assert checkpoint.constants == {"batch_stats/BatchNorm_0/mean"}
        assert checkpoint.ignored == ("opt_state: state of training",)
    renamed = tmp_path / "renamed.bin"
    (tmp_path / "flax_model.msgpack").rename(renamed)
    assert "params/Dense_0/bias" in open_checkpoint(renamed).tensors


def test_hostile_msgpack_is_refused(tmp_path):
    msgpack = pytest.importorskip("msgpack")
    path = tmp_path / "flax_model.msgpack"
    lie = msgpack.ExtType(1, msgpack.packb(((1 << 40,), "float32", b"\0" * 8)))
    deep = b"\x81\xa1a" * 100_000
    claims = {b"\x81\xa1w\xc9" + struct.pack(">I", 1 << 31) + b"\x01", msgpack.packb({"w": lie}), deep}
    for content in (*claims, msgpack.packb({"w": flax_array(array(9))})[:-4], b"\xdf\xff\xff\xff\xff\xa1a\x01"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="flax_model.msgpack: "):
            open_checkpoint(path)


# --- ONNX ------------------------------------------------------------------------------------------------------------


def onnx_model(path, nodes, tensors):
    onnx = pytest.importorskip("onnx")
    made = [onnx.helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes]
    stored = [t if isinstance(t, onnx.TensorProto) else onnx.numpy_helper.from_array(t, name) for name, t in tensors]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(made, "g", [], [], stored)), path)


def test_factors_of_an_onnx_model_are_turned_and_kernels_are_not(tmp_path):
    onnx = pytest.importorskip("onnx")
    stored = {
        "w": array(4, 5),
        "g": array(6, 5, dtype=np.float16),
        "h": array(6, 3),
        "k": array(4, 2, 3, 3),
        "e": array(9, 4),
    }
    constant = array(3, 7)
    nodes = [
        ("Conv", ["x", "k"], ["a"]),
        ("Gather", ["e", "i"], ["b"]),
        ("MatMul", ["b", "w"], ["c"]),
        ("Gemm", ["c", "g"], ["d"], {"transB": 1}),
        ("Gemm", ["d", "h"], ["f"]),
        ("Constant", [], ["const"], {"value": onnx.numpy_helper.from_array(constant)}),
        ("Constant", [], ["eps"], {"value": onnx.numpy_helper.from_array(np.float32(1))}),
        ("MatMul", ["f", "const"], ["l"]),
        ("Add", ["l", "eps"], ["m"]),
    ]
    onnx_model(tmp_path / "m.onnx", nodes, stored.items())
    axes = {"w": (1, 0), "h": (1, 0), "const": (1, 0)}
    checkpoint = check_exact(tmp_path / "m.onnx", stored | {"const": constant}, axes)
    assert checkpoint.ignored == ("1 small constants of the graph",)


def test_codes_of_an_onnx_model_are_dequantized_and_said(tmp_path):
    onnx = pytest.importorskip("onnx")
    codes, scale = RNG.integers(-128, 127, (4, 6), dtype=np.int8), np.abs(array(6))
    zero = RNG.integers(-9, 9, 6, dtype=np.int8)
    nibbles = RNG.integers(-8, 7, (4, 8))
    blocks = np.abs(array(4, 2))
    packed = onnx.helper.make_tensor("q4", onnx.TensorProto.INT4, (4, 8), nibbles.flatten())
    nodes = [
        ("DequantizeLinear", ["q", "s", "z"], ["w"], {"axis": 1}),
        ("MatMul", ["x", "w"], ["y"]),
        ("DequantizeLinear", ["q4", "s4"], ["w4"], {"axis": 1, "block_size": 4}),
        ("Gemm", ["y", "w4"], ["o"], {"transB": 1}),
    ]
    onnx_model(tmp_path / "m.onnx", nodes, [("q", codes), ("s", scale), ("z", zero), ("q4", packed), ("s4", blocks)])
    with open_checkpoint(tmp_path / "m.onnx") as checkpoint:
        assert set(checkpoint.tensors) == {"q", "q4"}
        expected = (codes.astype(np.float32) - zero) * scale
        assert np.array_equal(original(checkpoint, "q"), expected) and checkpoint.tensors["q"].shape == (6, 4)
        assert np.array_equal(checkpoint.read("q4").numpy(), nibbles.astype(np.float32) * blocks.repeat(4, 1))
        assert checkpoint.stored_as == {"q": "onnx int8, a scale for each of axis 1", "q4": "onnx int4, blocks of 4"}


@pytest.mark.parametrize("operation", ["MatMulInteger", "QLinearMatMul", "MatMulNBits"])
def test_codes_without_a_scale_of_their_own_are_refused(operation, tmp_path):
    onnx_model(
        tmp_path / "m.onnx", [(operation, ["x", "w"], ["y"])], [("w", np.ones((4, 5), np.int8)), ("s", array(5))]
    )
    with pytest.raises(CheckpointError, match=f"is quantized: 'w' is codes for {operation}"):
        open_checkpoint(tmp_path / "m.onnx")


def test_external_data_stays_in_the_folder_of_its_model(tmp_path):
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "model"
    folder.mkdir()
    value = array(4, 5)
    (folder / "m.data").write_bytes(b"\0" * 3 + value.tobytes())
    (tmp_path / "secret").write_bytes(bytes(99))
    (folder / "link").symlink_to(tmp_path / "secret")

    def model(location, length=80, offset=3):
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[4, 5], data_location=1)
        for key, told in {"location": location, "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(told))
        (folder / "m.onnx").unlink(missing_ok=True)
        onnx_model(folder / "m.onnx", [("MatMul", ["x", "w"], ["y"])], [("w", tensor)])
        return folder / "m.onnx"

    check_exact(model("m.data"), {"w": value}, {"w": (1, 0)})
    for location in ("../secret", "link", str(tmp_path / "secret"), "missing"):
        with pytest.raises(CheckpointError, match="folder|lacks"):
            open_checkpoint(model(location))
    for lie in ({"length": 84}, {"offset": 4}, {"offset": 1 << 50}, {"offset": -1}):
        with pytest.raises(CheckpointError, match="does not have the size|ends before"):
            open_checkpoint(model("m.data", **lie))


def test_an_onnx_tensor_that_claims_more_entries_than_it_has_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    for given in ({"raw_data": b"\0" * 80}, {"float_data": [1.0] * 20}):
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[1 << 30, 1 << 30], **given)
        onnx_model(tmp_path / "m.onnx", [], [("w", tensor)])
        with pytest.raises(CheckpointError, match="has 20 entries"):
            open_checkpoint(tmp_path / "m.onnx")


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_follow_outputs_first_and_decode_to_the_file_s_layout_bit_for_bit(tmp_path):
    stored = {"Dense_0/kernel": array(5, 4), "Dense_0/bias": array(4), "Conv_0/kernel": array(3, 3, 4, 2)}
    np.savez(tmp_path / "m.npz", **stored)
    fx = WSLFeatureExtractor(token_size=7, tokenization="sparse")
    batch = fx(tmp_path / "m.npz")
    assert np.array_equal(batch["tokens"][0, :6].numpy(), [*stored["Dense_0/kernel"][:, 0], stored["Dense_0/bias"][0]])
    manifest = WeightManifest.from_json(batch["manifest"].to_json())
    state = fx.decode(batch["tokens"], manifest)
    assert state["Conv_0/kernel"].shape == (2, 4, 3, 3)
    back = manifest.in_file_layout(state)
    assert list(back) == list(stored)
    assert all(np.array_equal(back[name].numpy(), value) for name, value in stored.items())


def test_a_manifest_of_torch_s_layout_says_nothing_of_layouts(tmp_path):
    manifest = WSLFeatureExtractor().manifest({"weight": torch.ones(3, 4)})
    assert "layouts" not in manifest.to_json() and manifest.in_file_layout({}) == {}


# --- safetensors of other frameworks ---------------------------------------------------------------------------------


def test_safetensors_say_which_framework_wrote_them(tmp_path):
    state = {
        "a.conv.weight": torch.randn(4, 3, 3, 2),
        "a.dense.kernel": torch.randn(4, 3),
        "a.dense.bias": torch.randn(3),
    }
    expected = {
        "flax": {"a.dense.kernel": (1, 0)},
        "mlx": {"a.conv.weight": (0, 2, 3, 1)},
        "pt": {},
    }
    for written_by, layouts in expected.items():
        save_file(state, tmp_path / "model.safetensors", metadata={"format": written_by})
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.layouts == layouts
            for name, tensor in state.items():
                assert np.array_equal(original(checkpoint, name), tensor.numpy())


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(CheckpointError, match=r"needs the package h5py.*pip install 'hf-wsl\[formats\]'"):
        open_checkpoint(tmp_path / "m.h5")


# --- TensorFlow ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensorflow_folder(tmp_path):
    """A checkpoint that TensorFlow's own Saver wrote, from the conformance table."""
    files = Path(__file__).parents[2] / "fixtures" / "checkpoints" / "tensorflow-1" / "files"
    return Path(shutil.copytree(files, tmp_path / "bert"))


def test_a_folder_with_a_tensorflow_checkpoint_is_its_model(tensorflow_folder):
    (tensorflow_folder / "checkpoint").write_text('model_checkpoint_path: "bert_model.ckpt"\n')
    with open_checkpoint(tensorflow_folder) as checkpoint:
        assert checkpoint.layouts["stem/conv/kernel"] == (2, 3, 1, 0)
        assert checkpoint.ignored == ("11 variables of the optimizer",)
    assert [model.path for model in expand_sources([tensorflow_folder.parent])] == [tensorflow_folder]


def test_a_tensorflow_table_without_its_data_or_damaged_is_refused(tensorflow_folder):
    index = tensorflow_folder / "bert_model.ckpt.index"
    data = tensorflow_folder / "bert_model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="ends before what bert_model.ckpt.index places in it"):
        open_checkpoint(index)
    data.unlink()
    with pytest.raises(CheckpointError, match="lacks the shard bert_model.ckpt.data-00000-of-00001"):
        open_checkpoint(index)
    index.write_bytes(b"\0" * 99 + index.read_bytes()[-8:])
    with pytest.raises(CheckpointError, match="cannot be read as a table of TensorFlow"):
        open_checkpoint(index)
