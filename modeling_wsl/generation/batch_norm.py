"""Batch-norm conditioning: running statistics re-estimated on images (paper, appendix B.2.2).

Running means and variances are not weights: they follow from the weights and the data. A generated model that inherits
them from an anchor normalizes by what another network saw.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Batch and instance norms, everything in torch that keeps running statistics by this protocol.
from torch.nn.modules.batchnorm import _NormBase


def tracked_norms(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules that keep running statistics, by name."""
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, _NormBase) and child.running_mean is not None
    }


def statistics_names(module: nn.Module) -> list[str]:
    """The state-dict names that `reestimate_batch_norm` sets."""
    return [
        f"{name}.{buffer}" if name else buffer
        for name, norm in tracked_norms(module).items()
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    ]


def reestimate_batch_norm(
    module: nn.Module, images: Tensor | Iterable[Any], batch_size: int = 128
) -> tuple[list[str], int]:
    """Sets the running statistics of all batch norms to what they are on these images.

    The statistics are reset; every image passes once, without gradients, through the model with its batch norms (and
    only these: dropout would change what they see) in train mode, so that each layer sees inputs normalized by their
    own batch; and the running values become the mean over the batches, each weighted by its number of images. Modes
    and momenta are as before afterwards.

    Args:
        module: changed in place; runs on the device where its parameters are.
        images: Tensor `[N, C, H, W]`, or an iterable (a DataLoader) of batches: a tensor, a tuple or list whose first
            item it is, or a mapping of keyword arguments (`labels` is left out).
        batch_size: images per pass where `images` is a tensor; it is cut into equal batches.

    Returns:
        The state-dict names that were set, and how many images were used; ([], 0) if the model has no batch norm.

    Raises:
        ValueError: no image at all, or a tensor that is not `[N, C, H, W]`.
    """
    norms = list(tracked_norms(module).values())
    if not norms:
        return [], 0
    if isinstance(images, Tensor):
        if images.dim() != 4 or len(images) == 0:
            raise ValueError(
                f"batch_norm_images has shape {tuple(images.shape)}; give images [N, C, H, W], one or more."
            )
        images = images.tensor_split(-(-len(images) // batch_size))
    device = next(module.parameters()).device
    modes = {child: child.training for child in module.modules()}
    momenta = [norm.momentum for norm in norms]
    seen = 0
    try:
        module.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        with torch.no_grad():
            for batch in images:
                args, kwargs = model_inputs(batch, device)
                count = len(args[0] if args else next(iter(kwargs.values())))
                seen += count
                for norm in norms:
                    norm.momentum = count / seen  # cumulative mean: momentum=None would weigh a short batch fully
                module(*args, **kwargs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for child, mode in modes.items():
            child.training = mode
    if seen == 0:
        raise ValueError(
            "batch_norm_images yielded no batch. Give images, or None to inherit the anchor's statistics."
        )
    return statistics_names(module), seen


def model_inputs(batch: Any, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """(positional, keyword) arguments of a model for a batch: a tensor, a tuple that begins with one, or a mapping."""
    if isinstance(batch, Mapping):
        return (), {name: value.to(device) for name, value in batch.items() if name not in ("labels", "label")}
    if isinstance(batch, tuple | list):
        batch = batch[0]
    return (batch.to(device),), {}
