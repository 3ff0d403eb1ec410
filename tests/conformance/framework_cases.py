"""Checkpoints of other frameworks: values bit for bit, axes as `[out, in, ...]`."""

import json
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from case import Case, Made, State
from safetensors.torch import save_file
from torch import nn


KIND = "Other frameworks"
DENSE, CONV, CONV1D = (1, 0), (3, 2, 0, 1), (2, 1, 0)  # [in, out], [h, w, in, out] and [w, in, out], outputs first
TURNED_CONV = (2, 3, 0, 1)  # [h, w, out, in], and a depthwise kernel's [h, w, in, multiple]
TO_HEADS, FROM_HEADS = (1, 2, 0), (2, 0, 1)


def tensor(array: Any) -> torch.Tensor:
    """The entries of an array, whatever library it is of; bfloat16 by its bits."""
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def outputs_first(arrays: dict[str, Any], axes: dict[str, tuple[int, ...]]) -> State:
    tensors = {name: tensor(array) for name, array in arrays.items()}
    return {name: t.permute(axes[name]) if name in axes else t for name, t in tensors.items()}


def numbers(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


# --- Keras -----------------------------------------------------------------------------------------------------------


def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras as library

    library.backend.clear_session()
    library.utils.set_random_seed(0)
    return library


# Layer name -> how its variables are numbered and turned, in `keras_network`.
KERAS_LAYERS = {
    "stem": ("conv2d", {0: CONV}),
    "norm": ("batch_normalization", {}),
    "deep": ("depthwise_conv2d", {0: TURNED_CONV}),
    "apart": ("separable_conv2d", {0: TURNED_CONV, 1: CONV}),
    "up": ("conv2d_transpose", {0: TURNED_CONV}),
    "head": ("dense", {0: DENSE}),
}


def keras_network(*, compiled: bool = False, code: bool = False, up: int = 5) -> Any:
    library = keras()
    layers = library.layers
    inputs = x = library.Input((8, 8, 3))
    for layer in (
        layers.Conv2D(4, 3, name="stem"),
        layers.BatchNormalization(name="norm"),
        layers.DepthwiseConv2D(3, name="deep"),
        layers.SeparableConv2D(5, 2, name="apart"),
        layers.Conv2DTranspose(up, 2, name="up"),  # five outputs as five inputs: no shape tells them apart
        layers.GlobalAveragePooling2D(name="pool"),
        *([layers.Lambda(lambda x: x * 2, name="code")] if code else []),
        layers.Dense(7, name="head"),
    ):
        x = layer(x)
    model = library.Model(inputs, x)
    for number, weight in enumerate(model.weights):  # biases and statistics are not all zeros and ones
        weight.assign(np.random.default_rng(number).normal(size=weight.shape))
    if compiled:
        model.compile("adam", "mse")
        model.fit(numbers(2, 8, 8, 3), numbers(2, 7), verbose=0)
    return model


def keras_truth(model: Any, *, by_number: bool) -> State:
    arrays, axes = {}, {}
    for layer, (path, turns) in KERAS_LAYERS.items():
        for number, weight in enumerate(model.get_layer(layer).weights):
            name = f"layers/{path}/vars/{number}" if by_number else f"{layer}/{layer}/{weight.name}"
            arrays[name] = weight.numpy()
            axes |= {name: turns[number]} if number in turns else {}
    return outputs_first(arrays, axes)


def keras_archive(folder: Path, **options: bool) -> Made:
    model = keras_network(**options)
    model.save(folder / "model.keras")
    return folder / "model.keras", keras_truth(model, by_number=True)


def keras_weights(folder: Path) -> Made:
    model = keras_network()
    model.save_weights(folder / "model.weights.h5")
    return folder / "model.weights.h5", keras_truth(model, by_number=True)


def keras_legacy(folder: Path) -> Made:
    model = keras_network(compiled=True)
    model.save(folder / "model.h5")
    return folder / "model.h5", keras_truth(model, by_number=False)


def keras_sequence(folder: Path) -> Made:
    library = keras()
    layers = library.layers
    inputs = library.Input((6,))
    x = layers.Embedding(9, 6)(inputs)
    x = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.Conv1D(5, 3)(x)
    x = layers.LayerNormalization()(layers.LSTM(4, return_sequences=True)(x))
    model = library.Model(inputs, layers.GRU(3)(x))
    model.save(folder / "model.keras")
    attention, stem = model.layers[2], "layers/multi_head_attention"
    arrays = {f"{stem}/{part}_dense/vars/{i}": getattr(attention, f"{part}_dense").weights[i].numpy()
              for part in ("query", "key", "value") for i in (0, 1)}  # fmt: skip
    axes = {name: TO_HEADS for name in arrays if name.endswith("/0")}
    arrays |= {f"{stem}/output_dense/vars/{i}": w.numpy() for i, w in enumerate(attention.output_dense.weights)}
    axes[f"{stem}/output_dense/vars/0"] = FROM_HEADS
    for layer, path, turns in (
        (model.layers[1], "embedding", {}),
        (model.layers[3], "conv1d", {0: CONV1D}),
        (model.layers[4], "lstm/cell", {0: DENSE, 1: DENSE}),
        (model.layers[5], "layer_normalization", {}),
        (model.layers[6], "gru/cell", {0: DENSE, 1: DENSE}),
    ):
        for number, weight in enumerate(layer.weights):
            arrays[f"layers/{path}/vars/{number}"] = weight.numpy()
            axes |= {f"layers/{path}/vars/{number}": turns[number]} if number in turns else {}
    return folder / "model.keras", outputs_first(arrays, axes)


def keras_bfloat16(folder: Path) -> Made:
    library = keras()
    model = library.Sequential([library.Input((6,)), library.layers.Dense(40, dtype="bfloat16")])
    model.save_weights(folder / "model.weights.h5")
    kernel, bias = (np.asarray(weight.value) for weight in model.weights)
    arrays = {"layers/dense/vars/0": kernel, "layers/dense/vars/1": bias}
    return folder / "model.weights.h5", outputs_first(arrays, {"layers/dense/vars/0": DENSE})


def keras_quantized(folder: Path) -> Made:
    library = keras()
    model = library.Sequential([library.Input((6,)), library.layers.Dense(40)])
    model.quantize("int8")
    model.save(folder / "model.keras")
    return folder / "model.keras", None


def tf_model_h5(folder: Path) -> Made:
    """The layout in which transformers saved TensorFlow models."""
    import h5py

    arrays = {
        "bert/tf_model/bert/embeddings/weight:0": numbers(9, 6),
        "bert/tf_model/bert/layer_._0/query/kernel:0": numbers(6, 6),
        "bert/tf_model/bert/layer_._0/query/bias:0": numbers(6),
        "classifier/tf_model/classifier/kernel:0": numbers(6, 3),
    }
    with h5py.File(folder / "tf_model.h5", "w", track_order=True) as file:
        file.attrs["layer_names"] = ["bert", "classifier"]
        for layer in ("bert", "classifier"):
            names = [name.partition("/")[2] for name in arrays if name.startswith(layer)]
            file.create_group(layer).attrs["weight_names"] = names
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
    return folder, outputs_first(arrays, {name: DENSE for name in arrays if "kernel" in name})


def hdf5_link(folder: Path) -> Made:
    import h5py

    with h5py.File(folder / "model.h5", "w") as file:
        file["stem/kernel"] = numbers(6, 3)
        file["head"] = h5py.ExternalLink("elsewhere.h5", "/head")
    return folder / "model.h5", None


# --- Flax, MLX, NumPy ------------------------------------------------------------------------------------------------


def flax_variables() -> tuple[Any, dict[str, tuple[int, ...]]]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import flax.linen as fnn
    import jax
    import jax.numpy as jnp

    class Network(fnn.Module):
        @fnn.compact
        def __call__(self, x: Any) -> Any:
            x = fnn.BatchNorm(use_running_average=True)(fnn.Conv(4, (3, 3))(x))
            x = fnn.ConvTranspose(6, (2, 2))(x).reshape(1, -1, 6)
            x = fnn.MultiHeadDotProductAttention(2, qkv_features=4)(fnn.Conv(6, (3,), name="conv_1d")(x))
            x = fnn.LayerNorm()(x) + fnn.Embed(5, 6)(jnp.zeros((1, 1), int))
            return fnn.Dense(7, param_dtype=jnp.bfloat16)(x)

    heads = "params/MultiHeadDotProductAttention_0"
    axes = {f"params/{name}/kernel": CONV for name in ("Conv_0", "ConvTranspose_0")}
    axes |= {f"{heads}/{name}/kernel": TO_HEADS for name in ("query", "key", "value")}
    axes |= {f"{heads}/out/kernel": FROM_HEADS, "params/conv_1d/kernel": CONV1D, "params/Dense_0/kernel": DENSE}
    return Network().init(jax.random.PRNGKey(0), jnp.ones((1, 4, 4, 3))), axes


def flax_file(folder: Path, *, trained: bool = False, chunks: bool = False) -> Made:
    variables, axes = flax_variables()
    from flax import serialization
    from flax.traverse_util import flatten_dict

    content = dict(variables)
    if trained:
        content |= {"step": 3, "opt_state": {"0": {"mu": variables["params"]}}}
    limit, serialization.MAX_CHUNK_SIZE = serialization.MAX_CHUNK_SIZE, 128 if chunks else 1 << 30
    try:
        (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(content, in_place=False))
    finally:
        serialization.MAX_CHUNK_SIZE = limit
    return folder, outputs_first(flatten_dict(variables, sep="/"), axes)


def flax_shards(folder: Path) -> Made:
    """The layout in which transformers saved large Flax models."""
    import msgpack

    arrays = {f"encoder/{layer}/kernel": numbers(12, 12 + layer) for layer in range(2)}
    shards = {}
    for number, (name, array) in enumerate(arrays.items(), start=1):
        packed = msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))
        layer = name.split("/")[1]
        shards[name] = f"flax_model-{number:05d}-of-00002.msgpack"
        (folder / shards[name]).write_bytes(msgpack.packb({"encoder": {layer: {"kernel": packed}}}))
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder, outputs_first(arrays, dict.fromkeys(arrays, DENSE))


def flax_safetensors(folder: Path) -> Made:
    state = {"encoder.query.kernel": torch.randn(4, 6), "encoder.query.bias": torch.randn(6)}
    state["embed.embedding"] = torch.randn(9, 4)
    save_file(state, folder / "model.safetensors", {"format": "flax"})
    return folder, state | {"encoder.query.kernel": state["encoder.query.kernel"].T}


def mlx_safetensors(folder: Path) -> Made:
    state = {"patch_embed.proj.weight": torch.randn(8, 2, 2, 3), "fc.weight": torch.randn(5, 8)}
    save_file(state, folder / "model.safetensors", {"format": "mlx"})
    return folder, state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"].permute(0, 3, 1, 2)}


def paddle_file(folder: Path) -> Made:
    """The layout of paddle.save: NumPy arrays by name, pickled, and a table of names."""
    arrays = {"conv.weight": numbers(4, 3, 2, 2), "fc.weight": numbers(6, 5), "fc.bias": numbers(5)}
    arrays |= {"emb.weight": numbers(9, 6), "bn._mean": numbers(4), "head.weight": numbers(6, 7)}
    content = {**arrays, "StructuredToParameterName@@": {name: f"{name}_0" for name in arrays}}
    (folder / "model.pdparams").write_bytes(pickle.dumps(content, protocol=2))
    return folder, outputs_first(arrays, {"fc.weight": DENSE})


def numpy_archive(folder: Path, save: Any = np.savez) -> Made:
    """Names as those of the vision transformers that Google published."""
    arrays = {
        "embedding/kernel": numbers(2, 2, 3, 8),
        "embedding/bias": numbers(8),
        "Transformer/posembed_input/pos_embedding": numbers(1, 5, 8),
        "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": numbers(8, 12, dtype=np.float16),
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel": numbers(8, 2, 4),
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel": numbers(2, 4, 8),
        "head/kernel": np.asfortranarray(numbers(8, 3)),
    }
    kernels = [name for name in arrays if name.endswith("kernel")]
    save(folder / "vit.npz", **arrays)
    turns = (CONV, DENSE, TO_HEADS, FROM_HEADS, DENSE)
    return folder / "vit.npz", outputs_first(arrays, dict(zip(kernels, turns, strict=True)))


def numpy_objects(folder: Path) -> Made:
    np.savez(folder / "w.npz", w=numbers(9), names=np.array([{"a": 1}], dtype=object))
    return folder / "w.npz", None


def numpy_array(folder: Path) -> Made:
    np.save(folder / "w.npy", numbers(9, 4).astype(">f8"))
    return folder / "w.npy", {"array": torch.from_numpy(numbers(9, 4)).double()}


def zoo_row(folder: Path) -> Made:
    """The layout of the Small CNN Zoo: a model a row of a matrix."""
    np.save(folder / "weights.npy", numbers(5, 38))
    rows = ['varname,start_idx,end_idx,shape', 'sequential/conv2d/bias:0,0,2,"(2,)"']  # fmt: skip
    rows += ['sequential/conv2d/kernel:0,2,38,"(3, 3, 2, 2)"', ""]
    (folder / "layout.csv").write_text("\n".join(rows))
    bias, kernel = numbers(5, 38)[3, :2], numbers(5, 38)[3, 2:].reshape(3, 3, 2, 2)
    arrays = {"sequential/conv2d/bias:0": bias, "sequential/conv2d/kernel:0": kernel}
    return folder / "weights.npy", outputs_first(arrays, {"sequential/conv2d/kernel:0": CONV})


# --- ONNX ------------------------------------------------------------------------------------------------------------


class Exported(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.up = nn.Embedding(9, 6), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.up(self.conv(x)).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x[:, None] + self.embed(ids))))


def onnx_exported(folder: Path, *, factors: dict[str, str], axes: dict[str, list[int]], **options: Any) -> Made:
    """An export of torch.

    Args:
        factors: the names that the exporter gives to weights whose own it loses.
        axes: the integers that it stores beside the weights.
    """
    torch.manual_seed(0)
    model = Exported().eval()
    inputs = torch.rand(2, 3, 6, 6), torch.zeros(2, 4, dtype=torch.int64)
    torch.onnx.export(model, inputs, str(folder / "model.onnx"), verbose=False, **options)
    truth = {factors.get(name, name): t for name, t in model.state_dict().items()}
    return folder / "model.onnx", truth | {name: torch.tensor(value) for name, value in axes.items()}


def onnx_graph(folder: Path, nodes: list[tuple], tensors: dict[str, Any]) -> Path:
    import onnx

    made = [onnx.helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes]
    stored = [
        value if isinstance(value, onnx.TensorProto) else onnx.numpy_helper.from_array(value, name)
        for name, value in tensors.items()
    ]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(made, "g", [], [], stored)), folder / "model.onnx")
    return folder / "model.onnx"


def onnx_quantized(folder: Path) -> Made:
    codes = np.random.default_rng(0).integers(-128, 127, (4, 20), dtype=np.int8)
    scale, zero = np.abs(numbers(20)), np.arange(20, dtype=np.int8)
    nodes = [("DequantizeLinear", ["w", "s", "z"], ["float"], {"axis": 1}), ("MatMul", ["x", "float"], ["y"])]
    path = onnx_graph(folder, nodes, {"w": codes, "s": scale, "z": zero})
    return path, {"w": torch.from_numpy((codes.astype(np.float32) - zero) * scale).T}


def onnx_integers(folder: Path) -> Made:
    """What onnxruntime's dynamic quantization leaves: the scale is an input of another node."""
    codes = np.ones((4, 20), np.int8)
    nodes = [("MatMulInteger", ["x", "w_quantized"], ["y"]), ("Mul", ["y", "w_scale"], ["z"])]
    return onnx_graph(folder, nodes, {"w_quantized": codes, "w_scale": numbers(1)}), None


def onnx_halves(folder: Path) -> Made:
    """Half precision in the fields that raw bytes replaced, and a weight that was folded into a constant."""
    import onnx

    half, brain = numbers(4, 6, dtype=np.float16), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    folded = onnx.numpy_helper.from_array(numbers(3, 9))
    tensors = {
        "half": onnx.helper.make_tensor("half", onnx.TensorProto.FLOAT16, half.shape, half.flatten()),
        "brain": onnx.helper.make_tensor(
            "brain", onnx.TensorProto.BFLOAT16, brain.shape, brain.bfloat16().float().flatten().tolist()
        ),
    }
    nodes = [
        ("MatMul", ["x", "half"], ["a"]),
        ("Gemm", ["a", "brain"], ["b"], {"transB": 1}),
        ("Constant", [], ["folded"], {"value": folded}),
        ("MatMul", ["b", "folded"], ["c"]),
    ]
    truth = {"half": torch.from_numpy(half).T, "brain": brain.bfloat16(), "folded": torch.from_numpy(numbers(3, 9)).T}
    return onnx_graph(folder, nodes, tensors), truth


# --- TensorFlow ------------------------------------------------------------------------------------------------------


def tensorflow_2(folder: Path) -> Made:
    model = keras_network(compiled=True, up=6)
    import tensorflow as tf

    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "model.ckpt"))
    names = {weight.path: weight for weight in model.weights}
    expected = keras_truth(model, by_number=False)
    arrays = {}
    trainable = [weight.path for weight in model.trainable_weights]
    for place, weight in names.items():
        value = "/.ATTRIBUTES/VARIABLE_VALUE"
        if place in trainable:
            name = f"optimizer/_trainable_variables/{trainable.index(place)}{value}"
        else:
            name = f"model/_operations/2/{weight.name}{value}"
        layer, _, leaf = place.partition("/")
        arrays[name] = expected[f"{layer}/{layer}/{leaf}"]
    return f"{path}.index", arrays


def tensorflow_1(folder: Path) -> Made:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    arrays = {
        "bert/embeddings/word_embeddings": numbers(9, 6),
        "bert/encoder/layer_0/attention/self/query/kernel": numbers(6, 6),
        "bert/encoder/layer_0/attention/self/query/bias": numbers(6),
        "cls/predictions/output_bias": numbers(9),
        "stem/conv/kernel": numbers(3, 3, 2, 4),
    }
    slots = {f"{name}/{slot}": array for name, array in arrays.items() for slot in ("adam_m", "adam_v")}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, array in {**arrays, **slots, "global_step": np.int64(7)}.items():
            tf.compat.v1.get_variable(name, initializer=array)
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver()
        path = saver.save(session, str(folder / "bert_model.ckpt"), write_meta_graph=False, write_state=False)
    turns = {"bert/encoder/layer_0/attention/self/query/kernel": DENSE, "stem/conv/kernel": CONV}
    return f"{path}.index", outputs_first(arrays, turns)


def saved_model(folder: Path) -> Made:
    (folder / "saved_model.pb").write_bytes(b"\x08\x01\x12\x8c\x01\n\x0b")
    (folder / "variables").mkdir()
    return folder, None


def foreign_archive(folder: Path) -> Made:
    with zipfile.ZipFile(folder / "model.mlpackage.zip", "w") as archive:
        archive.writestr("Manifest.json", "{}")
    return folder / "model.mlpackage.zip", None


def case(name: str, layout: str, maker: str, make: Any, *more: Any, **options: Any) -> Case:
    return Case(name, KIND, layout, maker, make, *more, **options)


KERAS = {"needs": ("keras", "tensorflow"), "reads_with": ("h5py",)}
FLAX = {"needs": ("flax", "msgpack"), "reads_with": ("msgpack",)}
ONNX = {"needs": ("onnx",), "reads_with": ("onnx",)}
EXPORT = {"needs": ("onnx", "onnxscript"), "reads_with": ("onnx",)}
SCRIPTED = {"fc1.weight": "onnx::MatMul_24", "fc2.weight": "onnx::MatMul_25"}
TRACED = {"fc1.weight": "val_4", "fc2.weight": "val_6"}

CASES = [
    case("keras-archive", ".keras", "keras", keras_archive, **KERAS),
    case("keras-lambda", ".keras with code in a Lambda layer", "keras", partial(keras_archive, code=True), "read",
         ("config.json",), **KERAS),
    case("keras-sequence", ".keras: attention, recurrence, embedding", "keras", keras_sequence, **KERAS),
    case("keras-weights", ".weights.h5", "keras", keras_weights, **KERAS),
    case("keras-legacy", ".h5 of a whole model, with its optimizer", "keras", keras_legacy, "read",
         ("optimizer_weights", "moving_mean"), **KERAS),
    case("keras-bfloat16", ".weights.h5 in bfloat16", "keras", keras_bfloat16, **KERAS),
    case("keras-int8", ".keras after quantize('int8')", "keras", keras_quantized, "refused", ("quantized",), **KERAS),
    case("transformers-tf", "tf_model.h5 of transformers, packed", "by hand", tf_model_h5, needs=("h5py",),
         reads_with=("h5py",)),
    case("hdf5-link", "HDF5 with a link to another file", "h5py", hdf5_link, "refused", ("link",), needs=("h5py",),
         reads_with=("h5py",)),
    case("flax", "msgpack: parameters and statistics, bfloat16", "flax", flax_file, **FLAX),
    case("flax-training", "msgpack of a training state", "flax", partial(flax_file, trained=True), "read",
         ("opt_state",), **FLAX),
    case("flax-chunks", "msgpack with arrays in chunks", "flax", partial(flax_file, chunks=True), **FLAX),
    case("flax-sharded", "msgpack shards and their index", "by hand", flax_shards, needs=("msgpack",),
         reads_with=("msgpack",)),
    case("flax-safetensors", "safetensors, format flax", "safetensors", flax_safetensors),
    case("mlx-safetensors", "safetensors, format mlx", "safetensors", mlx_safetensors),
    case("paddle", ".pdparams", "by hand", paddle_file, "read", ("bn._mean", "head.weight: it is not known")),
    case("numpy-archive", ".npz with Flax's names", "numpy", numpy_archive),
    case("numpy-packed", ".npz, compressed", "numpy", partial(numpy_archive, save=np.savez_compressed)),
    case("numpy-array", ".npy in the other byte order", "numpy", numpy_array),
    case("numpy-objects", ".npz with Python objects", "numpy", numpy_objects, "refused", ("objects",)),
    case("small-cnn-zoo", "a row of a zoo's matrix", "by hand", zoo_row, options={"key": "3", "min_parameters": 0}),
    case("onnx-scripted", "ONNX by torch's first exporter", "torch",
         partial(onnx_exported, factors=SCRIPTED, axes={}, dynamo=False), **EXPORT),
    case("onnx-external", "ONNX with its data beside it", "torch",
         partial(onnx_exported, factors=TRACED, axes={"val_2": [2, 3], "val_3": [1]}, dynamo=True, external_data=True),
         **EXPORT),
    case("onnx-halves", "ONNX: float16, bfloat16, a folded constant", "onnx", onnx_halves, **ONNX),
    case("onnx-dequantize", "ONNX: int8 behind DequantizeLinear", "onnx", onnx_quantized, "dequantized",
         ("onnx int8, a scale for each of axis 1",), **ONNX),
    case("onnx-integer", "ONNX of dynamic quantization", "onnx", onnx_integers, "refused", ("MatMulInteger",), **ONNX),
    case("tensorflow-2", "tf.train.Checkpoint with its optimizer", "tensorflow", tensorflow_2, "read", ("optimizer",),
         needs=("keras", "tensorflow")),
    case("tensorflow-1", "Saver of TensorFlow 1, as BERT's", "tensorflow", tensorflow_1, "read", ("optimizer",),
         needs=("tensorflow",)),
    case("tensorflow-saved-model", "a SavedModel", "by hand", saved_model, "refused", ("saved_model.pb",)),
    case("coreml", "a zip of a Core ML package", "by hand", foreign_archive, "refused", ("torch.save did not write",)),
]  # fmt: skip
