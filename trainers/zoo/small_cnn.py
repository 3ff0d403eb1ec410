"""The small CNN of the model-zoo literature, one at a time and many at once (Unterthiner 2020; Schürholt 2022)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import create_act_layer, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional


__all__ = ["SmallCNN", "small_cnn", "stacked_logits"]
CHANNELS, KERNELS, HIDDEN = (8, 6, 4), (5, 5, 2), 20
# timm looks for this name in the module of a model that is registered.
default_cfgs = generate_default_cfgs(
    {"small_cnn": {"num_classes": 10, "input_size": (1, 28, 28), "first_conv": "conv1", "classifier": "fc2"}}
)


class SmallCNN(nn.Module):
    """Three convolutions (8, 6 and 4 channels), the first two pooled, and two linear layers.

    2,464 parameters on gray images of 28x28 pixels, 2,864 on colored ones.

    Args:
        num_classes, in_chans: classes; channels of the images.
        img_size: pixels a side, at least 20, or (height, width), as timm saves it.
        act_layer: name of an activation in timm.
        drop_rate: of the inputs of both linear layers.

    Raises:
        ValueError: images too small for it.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 28,
        act_layer: str = "relu",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (((size - 4) // 2 - 4) // 2 - 1 for size in to_2tuple(img_size))
        if min(height, width) < 1:
            raise ValueError(f"small_cnn takes images of at least 20 pixels a side, not {img_size}.")
        self.num_classes, self.num_features = num_classes, HIDDEN
        self.in_chans = in_chans  # for timm, which takes that of the default config else
        self.conv1 = nn.Conv2d(in_chans, CHANNELS[0], KERNELS[0])
        self.conv2 = nn.Conv2d(CHANNELS[0], CHANNELS[1], KERNELS[1])
        self.conv3 = nn.Conv2d(CHANNELS[1], CHANNELS[2], KERNELS[2])
        self.fc1 = nn.Linear(CHANNELS[2] * height * width, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, num_classes)
        self.act, self.drop = create_act_layer(act_layer), nn.Dropout(drop_rate)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, C, S, S]` to logits `[N, num_classes]`."""
        x = self.act(functional.max_pool2d(self.conv1(images), 2))
        x = self.act(functional.max_pool2d(self.conv2(x), 2))
        x = self.drop(self.act(self.conv3(x)).flatten(1))
        return self.fc2(self.drop(self.act(self.fc1(x))))


@register_model
def small_cnn(pretrained: bool = False, **options: Any) -> SmallCNN:
    """For `timm.create_model("small_cnn", ...)`, once this module is imported."""
    return build_model_with_cfg(SmallCNN, "small_cnn", pretrained, **options)


def stacked_logits(
    parameters: Mapping[str, Tensor], act: nn.Module, images: Tensor, dropouts: Sequence[Tensor] | None = None
) -> Tensor:
    """Logits of M small CNNs at once: their convolutions are groups of one.

    Channels come last in memory: the members' channels then fill the CPU's vectors, in the pooling above all. A step
    of 8 members and 64 images each takes about 0.8 of the time of a loop over members, and half of that of
    `torch.vmap`, which puts channels first; at 128 images it takes as long as the loop.

    Args:
        parameters: of a `SmallCNN`, stacked: name -> float32 `[M, ...]`.
        act: the activation that all share.
        images: float32 `[M, B, C, S, S]`, or `[B, C, S, S]` where all see the same ones.
        dropouts: what the inputs of the linear layers are multiplied by, `[M, B, inputs]` each; None: by nothing.

    Returns:
        `[M, B, num_classes]`.
    """
    members, shared = len(parameters["fc2.bias"]), images.ndim == 4
    if shared:
        x = images.contiguous(memory_format=torch.channels_last)
    else:
        x = images.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)  # [B, M * C, S, S]
    for name in ("conv1", "conv2", "conv3"):
        weight, bias = parameters[f"{name}.weight"].flatten(0, 1), parameters[f"{name}.bias"].flatten()
        weight = weight.contiguous(memory_format=torch.channels_last)
        x = functional.conv2d(x, weight, bias, groups=1 if shared and name == "conv1" else members)
        x = act(x if name == "conv3" else functional.max_pool2d(x, 2))
    x = x.reshape(len(x), members, -1).transpose(0, 1)  # [M, B, features]
    first, second = dropouts or (None, None)
    x = act(_linear(parameters, "fc1", x if first is None else x * first))
    return _linear(parameters, "fc2", x if second is None else x * second)


def _linear(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.baddbmm(parameters[f"{name}.bias"][:, None], x, parameters[f"{name}.weight"].mT)
