"""Conventions of TensorFlow, Keras and Flax for the axes of kernels: which order brings them to `[out, in, ...]`."""

from collections.abc import Mapping, Sequence


KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel", "recurrent_kernel")
STATISTICS = ("moving_mean", "moving_variance")
# A dense layer whose input or output is split into heads: `[in, heads, size]` and `[heads, size, out]`.
TO_HEADS = ("query", "key", "value", "query_dense", "key_dense", "value_dense")
FROM_HEADS = ("out", "attention_output", "output_dense")
FLAX_CONV1D = ("c_attn", "c_fc", "c_proj")  # transformers' GPT-2 in Flax stores these `[out, in]`


def kernel_axes(
    shapes: Mapping[str, Sequence[int]], roles: Mapping[str, tuple[str, str]], *, flax: bool = False
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """The order of axes that brings each kernel to `[out, in, ...]`, for `array_contents`.

    Args:
        shapes: of all arrays.
        roles: name -> the module that an array is of, as a path with slashes, and its variable's name there ("kernel",
            "bias"); an array without is left as it is.
        flax: transposed and depthwise convolutions have their axes as others do, which in Keras they have not.

    Returns:
        name -> order; the names of kernels whose order cannot be told, which are left as they are.
    """
    of_role = {role: name for name, role in roles.items()}
    axes, unknown = {}, []
    for name, (module, leaf) in roles.items():
        shape = tuple(shapes[name])
        if leaf in KERNELS and len(shape) > 1:
            bias = of_role.get((module, "bias"))
            layer = module.rpartition("/")[2].lower()
            order = order_of(leaf, layer, shape, tuple(shapes[bias]) if bias else None, flax)
            if order is None:
                unknown.append(name)
            else:
                axes[name] = order
    return axes, unknown


def order_of(
    leaf: str, module: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, flax: bool
) -> tuple[int, ...] | None:
    """The order for one kernel, by its variable's and its module's name and the shape of its bias; None: unknown."""
    last = len(shape) - 1
    plain = (last, last - 1, *range(last - 1))  # [*space, in, out], and [in, out]
    turned = (
        last - 1,
        last,
        *range(last - 1),
    )  # a transposed convolution's [*space, out, in]
    if last == 1:
        stored_out_first = module in FLAX_CONV1D or (bias == shape[:1] and shape[0] != shape[1])
        return (0, 1) if stored_out_first and leaf == "kernel" else plain
    if leaf == "depthwise_kernel" or (not flax and ("depthwise" in module or "transpose" in module)):
        return turned
    if last == 2 and leaf == "kernel":
        if module in TO_HEADS or (bias is not None and len(bias) == 2 and bias == shape[1:]):
            return (1, 2, 0)
        if module in FROM_HEADS:
            return (2, 0, 1)
        if "conv" not in module:
            return None
    if bias is not None and leaf == "kernel" and bias == shape[-2:-1] and bias != shape[-1:]:
        return turned
    return plain


def axes_by_format(
    written_by: str, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """As `kernel_axes`, for tensors of a common format that "flax", "tf", "mlx" or "paddle" wrote; else none."""
    if written_by in ("flax", "tf"):
        paths = {name: name.partition(":")[0].replace(".", "/") for name in shapes}
        roles = {name: tuple(path.rpartition("/")[::2]) for name, path in paths.items()}
        return kernel_axes(shapes, roles, flax=written_by == "flax")
    axes, unknown = {}, []
    for name, shape in shapes.items() if written_by == "paddle" else ():
        if len(shape) == 2 and name.endswith(".weight"):  # a linear layer's [in, out], or an embedding
            if tuple(shapes.get(name.removesuffix("weight") + "bias", ())) == tuple(shape[1:]):
                axes[name] = (1, 0)
            elif "emb" not in name:
                unknown.append(name)
    for name, shape in shapes.items() if written_by == "mlx" else ():
        if len(shape) > 3 or (len(shape) == 3 and "conv" in name):
            axes[name] = (0, len(shape) - 1, *range(1, len(shape) - 1))  # of convolutions: [out, *space, in]
        elif len(shape) == 3 and name.endswith(".weight"):
            unknown.append(name)
    return axes, unknown


def unknown_axes(unknown: Sequence[str]) -> list[str]:
    """The line for `Contents.ignored` that says which kernels are left in the layout of the file."""
    if not unknown:
        return []
    listed = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
    return [f"the order of the axes of {listed}: it is not known, so they are as the file has them"]
