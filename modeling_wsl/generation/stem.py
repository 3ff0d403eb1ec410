"""A trained stem for images of another number of channels, before it is encoded (timm's `adapt_input_conv`)."""

import torch
from torch import Tensor


def can_adapt(shape: tuple[int, ...], wanted: tuple[int, ...], in_channels: int) -> bool:
    """Whether `adapt_input_channels` can turn a tensor of one shape into one of another: kernels, no flat matrices.

    A matrix `[out, patch entries]` does not say in which order the entries of a patch lie.
    """
    if len(shape) < 3 or len(shape) != len(wanted) or (shape[0], *shape[2:]) != (wanted[0], *wanted[2:]):
        return False
    return wanted[1] % in_channels == 0 and shape[1] % (wanted[1] // in_channels) == 0


def adapt_input_channels(kernel: Tensor, num_inputs: int, in_channels: int) -> Tensor:
    """A convolution's kernel for images of another number of channels.

    For images of one channel, the kernel's channels are added up: an image whose channels are equal then gives what
    it gave before. Otherwise they are repeated in their order as often as needed and divided by how much more input
    there is, so that activations keep their size. This is timm's rule, for any two numbers of channels; a
    space-to-depth stem, whose inputs are several blocks of the image's channels, is adapted block by block.

    Args:
        kernel: `[out, blocks * channels, ...]`, see `can_adapt`.
        num_inputs: blocks * `in_channels`.
        in_channels: of the images that the new kernel is for.

    Returns:
        `[out, num_inputs, ...]`, at least float32.
    """
    blocks = num_inputs // in_channels
    parts = kernel.to(torch.promote_types(kernel.dtype, torch.float32)).unflatten(1, (blocks, -1))
    channels = parts.shape[2]
    if in_channels == 1:
        return parts.sum(2)
    order = torch.arange(in_channels) % channels
    return (parts[:, :, order] * (channels / in_channels)).flatten(1, 2)
