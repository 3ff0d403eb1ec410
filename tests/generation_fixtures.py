"""A backbone of some kilobytes, small models to generate with it, and the call that does it."""

from functools import cache
from typing import Any

import torch
from torch import nn

from modeling_wsl import GeneratedModel, WSLConfig, WSLFeatureExtractor, WSLModel
from modeling_wsl.generation import generate
from modeling_wsl.generation_plan import plan_generation
from modeling_wsl.generation_settings import GenerationSettings


EXTRACTOR = WSLFeatureExtractor(token_size=64)


class Net(nn.Module):
    """Convolution, batch norm, a tied pair of matrices, dropout and a classifier."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.mix.weight
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(6, classes)

    def forward(self, images):
        hidden = self.norm(self.conv(images)).relu().mean((2, 3))
        return self.fc(self.dropout(self.again(self.mix(hidden).relu())))


@cache
def small_backbone() -> WSLModel:
    """With random weights: nothing of what is tested depends on what it learned."""
    torch.manual_seed(0)
    config = WSLConfig(
        token_size=64,
        latent_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        window_size=64,
        token_standardization=True,
        linear_path=True,
    )
    return WSLModel(config).eval()


def generated(target: Any, anchors: Any, **options: Any) -> list[GeneratedModel]:
    """Plans and generates; `options` are those of `GenerationSettings` and of `plan_generation`."""
    settings = {name: options.pop(name) for name in list(options) if name in GenerationSettings.__dataclass_fields__}
    settings = GenerationSettings(**{"progress": False, "halo": 8, **settings})
    return generate(small_backbone(), plan_generation(EXTRACTOR, target, anchors, settings, **options))


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """Stands for a trained model: every float is moved, running statistics too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.1)
    return module.eval()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(value, second[name]) for name, value in first.items())
