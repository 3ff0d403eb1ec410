import pytest
import torch
from generation_fixtures import Net, generated, trained
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig

from modeling_wsl.generation.ranking import Ensemble, accuracy


def test_the_logits_of_an_ensemble_are_the_mean_of_its_members():
    models = generated(Net(), [trained(Net())], num_samples=3)
    members = [model.instantiate() for model in models]
    ensemble = Ensemble(members).eval()
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sum(member(images) for member in members) / 3
        torch.testing.assert_close(ensemble(images), expected)
    labels = expected.argmax(-1)
    assert accuracy(ensemble, [(images, labels)]) == 1.0


def test_members_may_be_models_of_transformers():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    members = [AutoModelForImageClassification.from_config(config).eval() for _ in range(2)]
    images = torch.randn(2, 3, 16, 16)
    expected = (members[0](images).logits + members[1](pixel_values=images).logits) / 2
    torch.testing.assert_close(Ensemble(members)(pixel_values=images), expected)


def test_an_ensemble_without_members_or_with_members_for_other_classes_is_refused():
    with pytest.raises(ValueError, match="members is empty"):
        Ensemble([])
    with pytest.raises(ValueError, match="logits differ in shape"):
        Ensemble([nn.Linear(2, 3), nn.Linear(2, 1)])(torch.zeros(1, 2))
