"""ONNX models: their initializers, and the larger constants of their graph; no node is run.

Data in the file is read with it; data beside it (external data) is mapped. Weights keep their names. The second
factor of a product (`MatMul`, `Gemm`) is brought from `[in, out]` to `[out, in]`; kernels of convolutions have torch's
order already, those of transposed ones (`[in, out, ...]`) too.
"""

import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, shorten
from ..folders import check_inside, find_shard
from .axes import unknown_axes
from .container import (
    Contents,
    StoredArray,
    array_contents,
    mapped_tensor,
    optional_package,
    tensor_of,
    torch_dtype_name,
)


TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
FACTORS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")  # their second input is a weight, if it is stored
# Operations on codes whose scales are inputs of their own, or of other nodes.
ON_CODES = re.compile(
    "^QLinear|^Q(Gemm|Attention|MoE)|Integer|NBits|Bnb4|FpQ4|^DynamicQuantize(MatMul|LSTM)|BlockQuant"
)
SMALL = 16  # a constant of fewer entries is a number of the graph (a shape, an epsilon), not a weight ...
WITH_WEIGHTS = re.compile("Conv|Gemm|MatMul|Normalization|PRelu|LSTM|GRU|RNN")  # ... unless one of these takes it
DAMAGED = "The file is damaged or forged; fetch or export it again"


@dataclass
class Graph:
    """All that is read off the nodes of a model, its subgraphs and functions included.

    Attributes:
        tensors: name -> the stored tensor.
        constants: names of tensors of `Constant` nodes.
        used: name -> how nodes use it: (operation, number of the input, the node).
        scales: name of codes -> (scale, zero point, axis, block size) of the node that dequantizes them.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    used: dict[str, list[tuple[str, int, Any]]] = field(default_factory=dict)
    scales: dict[str, tuple[str, str, int, int]] = field(default_factory=dict)


def onnx_contents(path: Path, key: str | None) -> Contents:
    """Contents of an ONNX model.

    Raises:
        CheckpointError: onnx is missing, the file is damaged or larger than 2 GB, names data outside of its folder,
            holds sparse weights, or codes whose scales cannot be told.
    """
    if key is not None:
        raise CheckpointError(path, f"is an ONNX model: it has nothing under key={key!r}", "Leave the key out")
    onnx = optional_package(path, "onnx", "formats")
    optional_package(path, "onnx.numpy_helper", "formats")
    model = onnx.load_model(str(path), format="protobuf", load_external_data=False)
    graph = Graph()
    collect(path, graph, model.graph, "", {})
    for function in model.functions:
        visit(path, graph, function.node, f"{function.name}/", {})
    ignored = ["training_info: state of training"] if model.training_info else []
    arrays, axes, stored_as, unknown = {}, {}, {}, []
    helpers = {name for codes in graph.scales.values() for name in codes[:2]}
    small = [name for name in graph.constants if not is_weight(onnx, graph, name)]
    if small:
        ignored.append(f"{len(small)} small constants of the graph")
    for name, tensor in graph.tensors.items():
        if name in small or name in helpers:
            continue
        refuse_codes(onnx, path, graph, name)
        if name in graph.scales:
            arrays[name], stored_as[name] = dequantized(onnx, path, graph, name)
        elif (kind := dtype_of(onnx, tensor)) is None:
            ignored.append(f"{shorten(name, 60)}: no array of numbers")
            continue
        else:
            arrays[name] = stored_array(onnx, path, name, tensor, kind)
        uses = graph.used.get(name, [])
        turns = {turned(operation, at, node, arrays[name]) for operation, at, node in uses} - {None}
        if turns == {"turn"}:
            axes[name] = (1, 0)
        elif "turn" in turns or "unknown" in turns:
            unknown.append(name)
    statistics = {
        name
        for name, uses in graph.used.items()
        if any(operation == "BatchNormalization" and at in (3, 4) for operation, at, _ in uses)
    }
    return array_contents(
        path,
        arrays,
        axes,
        stored_as=stored_as,
        constants=statistics & set(arrays),
        ignored=ignored + unknown_axes(unknown),
    )


def collect(path: Path, graph: Graph, part: Any, prefix: str, scope: dict[str, str]) -> None:
    """Reads one graph: its initializers, then its nodes; `scope` maps the names that are seen here to unique ones."""
    if part.sparse_initializer:
        reason = f"stores sparse weights ({shorten(part.sparse_initializer[0].values.name)})"
        raise CheckpointError(path, reason, "Export the model with dense weights")
    scope = dict(scope)
    for tensor in part.initializer:
        define(graph, tensor.name, prefix, scope, tensor)
    visit(path, graph, part.node, prefix, scope)


def visit(path: Path, graph: Graph, nodes: Any, prefix: str, scope: dict[str, str]) -> None:
    """Notes how nodes use stored tensors, and what they store themselves."""
    for node in nodes:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        for at, name in enumerate(node.input):
            if name in scope:
                graph.used.setdefault(scope[name], []).append((node.op_type, at, node))
        first = scope.get(node.input[0]) if node.input else None
        if node.op_type == "Constant" and "value" in attributes:
            graph.constants.add(define(graph, node.output[0], prefix, scope, attributes["value"].t))
        elif node.op_type == "Identity" and first:
            scope[node.output[0]] = first
        elif node.op_type == "DequantizeLinear" and first and scope.get(node.input[1]):
            zero = scope.get(node.input[2], "") if len(node.input) > 2 else ""
            axis = attributes["axis"].i if "axis" in attributes else 1
            block = attributes["block_size"].i if "block_size" in attributes else 0
            graph.scales[first] = (scope[node.input[1]], zero, axis, block)
            scope[node.output[0]] = first
        for attribute in node.attribute:
            for index, inner in enumerate([attribute.g, *attribute.graphs] if attribute.type in (5, 10) else []):
                collect(path, graph, inner, f"{prefix}{node.name or node.output[0]}/{attribute.name}{index}/", scope)


def define(graph: Graph, name: str, prefix: str, scope: dict[str, str], tensor: Any) -> str:
    """Gives a stored tensor a unique name: its own, behind the node that its graph is of where that is taken."""
    unique = prefix + name if name in graph.tensors else name
    scope[name] = unique
    graph.tensors[unique] = tensor
    return unique


def is_weight(onnx: Any, graph: Graph, name: str) -> bool:
    """Whether a constant of the graph is a weight: floating-point, and large or taken by a node that has weights."""
    tensor = graph.tensors[name]
    kind = dtype_of(onnx, tensor)
    if name in graph.scales or kind is None:
        return name in graph.scales
    operations = " ".join(operation for operation, _, _ in graph.used.get(name, []))
    is_float = getattr(torch, kind).is_floating_point
    return is_float and (prod(tensor.dims) >= SMALL or bool(WITH_WEIGHTS.search(operations)))


def turned(operation: str, at: int, node: Any, array: StoredArray) -> str | None:
    """How an operation takes a stored matrix as its input number `at`: "turn" `[in, out]`, "keep", or "unknown"."""
    if operation in FACTORS and at == 1 and len(array.shape) > 1:
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        return "keep" if transposed else "turn" if len(array.shape) == 2 else "unknown"
    if operation == "Attention" and node.domain == "com.microsoft" and at == 1:
        return "turn"
    return "keep" if operation.startswith(("Conv", "Gather")) else None


def dtype_of(onnx: Any, tensor: Any) -> str | None:
    """The dtype of a stored tensor by torch's name; None: text, numbers of less than a byte, or unknown."""
    try:
        return torch_dtype_name(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
    except (KeyError, ValueError, TypeError):
        return None


def stored_array(onnx: Any, path: Path, name: str, tensor: Any, kind: str) -> StoredArray:
    """A stored tensor, checked to have as many entries as its shape says."""
    shape = tuple(tensor.dims)
    if any(size < 0 for size in shape):
        raise CheckpointError(path, f"tensor {shorten(name)} has the shape {list(shape)[:8]}", DAMAGED)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        place, offset = external(path, name, tensor, prod(shape) * getattr(torch, kind).itemsize)
        return StoredArray(shape, kind, lambda: mapped_tensor(place, offset, shape, kind))
    entries = prod(shape) * (2 if kind.startswith("complex") else 1)
    given = len(tensor.raw_data) // getattr(torch, kind).itemsize if tensor.raw_data else None
    if given is None:
        given = sum(len(getattr(tensor, typed)) for typed in TYPED_FIELDS)
    if given != (prod(shape) if tensor.raw_data else entries):
        raise CheckpointError(path, f"tensor {shorten(name)} of {list(shape)} has {given:,} entries", DAMAGED)
    return StoredArray(shape, kind, lambda: tensor_of(onnx.numpy_helper.to_array(tensor)))


def external(path: Path, name: str, tensor: Any, size: int) -> tuple[Path, int]:
    """The file beside the model, and the first byte in it, of external data of `size` bytes.

    Raises:
        CheckpointError: it lies outside of the model's folder, is missing, or too short.
    """
    told = {entry.key: entry.value for entry in tensor.external_data}
    location, offset, length = told.get("location", ""), told.get("offset", "0"), told.get("length", str(size))
    check_inside(path, location)
    place = find_shard(path, location)
    if not (offset.isdecimal() and length.isdecimal()) or int(length) != size:
        raise CheckpointError(path, f"the data of tensor {shorten(name)} does not have the size of its shape", DAMAGED)
    if int(offset) + size > place.stat().st_size:
        raise CheckpointError(place, f"ends before the data of tensor {shorten(name)} does", DAMAGED)
    return place, int(offset)


def refuse_codes(onnx: Any, path: Path, graph: Graph, name: str) -> None:
    """Refuses integers that a quantized operation takes, where no node of the graph tells their scale.

    Raises:
        CheckpointError: naming the operation.
    """
    kind = dtype_of(onnx, graph.tensors[name])
    if kind is not None and getattr(torch, kind).is_floating_point:
        return
    operation = next((use[0] for use in graph.used.get(name, []) if ON_CODES.search(use[0])), None)
    if operation or (kind is None and name not in graph.scales and graph.tensors[name].data_type != 8):
        reason = f"is quantized: {shorten(name)} is codes" + f" for {operation}" * bool(operation)
        raise CheckpointError(path, reason, "Pass the model as it was before quantization")


def dequantized(onnx: Any, path: Path, graph: Graph, name: str) -> tuple[StoredArray, str]:
    """Codes by the scale and zero point of their `DequantizeLinear`, and how to call that."""
    scale_name, zero_name, axis, block = graph.scales[name]
    codes, scale = graph.tensors[name], graph.tensors[scale_name]
    shape, kind = tuple(codes.dims), dtype_of(onnx, scale)
    axis = axis % max(len(shape), 1)
    broadcast = list(scale.dims)
    if prod(broadcast) == 1 and not block:
        broadcast = [1] * len(shape)
    elif not block and broadcast == list(shape[axis : axis + 1]):
        broadcast = [size if at == axis else 1 for at, size in enumerate(shape)]
    elif not block or [-(-size // block) if at == axis else size for at, size in enumerate(shape)] != broadcast:
        broadcast = None
    if broadcast is None or kind is None:
        reason = f"the scale of tensor {shorten(name)} has the shape {list(scale.dims)}, its codes {list(shape)}"
        raise CheckpointError(path, reason, DAMAGED)
    bits = onnx.TensorProto.DataType.Name(codes.data_type).lower()
    check_codes(onnx, path, name, codes, bits)

    def spread(tensor: Any) -> torch.Tensor:
        values = tensor_of(values_of(onnx, path, tensor).astype("float32")).reshape(broadcast)
        return values.repeat_interleave(block, axis).narrow(axis, 0, shape[axis]) if block else values

    def read() -> torch.Tensor:
        values = tensor_of(values_of(onnx, path, codes).astype("float32"))
        if zero_name:
            values -= spread(graph.tensors[zero_name])
        return values.mul_(spread(scale)).to(getattr(torch, kind))

    grain = "one scale" if prod(broadcast) == 1 else f"a scale for each of axis {axis}"
    grain = f"blocks of {block}" if block else grain
    return StoredArray(shape, kind, read), f"onnx {bits}, {grain}"


def check_codes(onnx: Any, path: Path, name: str, codes: Any, bits: str) -> None:
    """Refuses codes that are fewer or more than their shape says, as `stored_array` does."""
    if kind := dtype_of(onnx, codes):
        stored_array(onnx, path, name, codes, kind)
        return
    size = -(-prod(codes.dims) // 2)
    given = len(codes.raw_data) or len(codes.int32_data)
    if codes.data_location == onnx.TensorProto.EXTERNAL:
        external(path, name, codes, size)
    elif bits not in ("int4", "uint4") or given != size:
        raise CheckpointError(path, f"tensor {shorten(name)} of {bits} {list(codes.dims)} cannot be read", DAMAGED)


def values_of(onnx: Any, path: Path, tensor: Any) -> Any:
    """The entries of a stored tensor as a NumPy array, wherever they lie."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        kind = dtype_of(onnx, tensor)
        size = prod(tensor.dims) * getattr(torch, kind).itemsize if kind else -(-prod(tensor.dims) // 2)
        place, offset = external(path, tensor.name, tensor, size)
        inside = onnx.TensorProto()
        inside.CopyFrom(tensor)
        inside.data_location, inside.raw_data = 0, mapped_tensor(place, offset, (size,), "uint8").numpy().tobytes()
        tensor = inside
    return onnx.numpy_helper.to_array(tensor)
