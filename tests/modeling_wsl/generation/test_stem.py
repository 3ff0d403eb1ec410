"""Targets for images of other channels, or with other classes, than their anchors have."""

import json

import pytest
import timm
import torch
from generation_fixtures import EXTRACTOR, Net, generated, same, trained
from timm.models import adapt_input_conv
from torch import nn
from transformers import AutoModelForImageClassification, BertConfig, ResNetConfig, ViTConfig

from modeling_wsl.generation.anchors import adapt_input_channels, can_adapt
from modeling_wsl.generation.targets import resolve_target


RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": 4,
    "architectures": ["ResNetForImageClassification"],
}


@pytest.mark.parametrize(("channels", "inputs", "blocks"), [(1, 3, 1), (2, 3, 1), (4, 3, 1), (8, 3, 1), (1, 12, 4)])
def test_kernels_are_adapted_as_timm_does_it(channels, inputs, blocks):
    kernel = torch.randn(5, inputs, 3, 3, generator=torch.Generator().manual_seed(0))
    adapted = adapt_input_channels(kernel, blocks * channels, channels)
    assert adapted.shape == (5, blocks * channels, 3, 3)
    torch.testing.assert_close(adapted, adapt_input_conv(channels, kernel))


def test_an_image_of_equal_channels_gives_what_it_gave_before():
    kernel = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float16)
    image = torch.randn(1, 1, 9, 9, generator=torch.Generator().manual_seed(1))
    before = nn.functional.conv2d(image.expand(-1, 3, -1, -1), kernel.float())
    for channels in (1, 3, 6):
        adapted = adapt_input_channels(kernel, channels, channels)
        after = nn.functional.conv2d(image.expand(-1, channels, -1, -1), adapted)
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    one = kernel[:, :1]
    again = nn.functional.conv2d(image.expand(-1, 3, -1, -1), adapt_input_channels(one, 3, 3))
    torch.testing.assert_close(again, nn.functional.conv2d(image, one.float()), atol=1e-4, rtol=1e-4)


def test_only_kernels_that_differ_in_their_inputs_can_be_adapted():
    assert can_adapt((8, 3, 7, 7), (8, 1, 7, 7), 1)
    assert can_adapt((8, 12, 3, 3), (8, 4, 3, 3), 1)
    assert not can_adapt((8, 3, 7, 7), (9, 1, 7, 7), 1)
    assert not can_adapt((8, 3, 7, 7), (8, 1, 5, 5), 1)
    assert not can_adapt((8, 48), (8, 16), 1)  # which of the 48 is which channel?
    assert not can_adapt((8, 7, 3, 3), (8, 4, 3, 3), 1)


def test_an_anchor_for_three_channels_gives_a_model_for_one_and_provenance_says_how():
    anchor = trained(timm.create_model("test_resnet", num_classes=4))
    (model,) = generated("test_resnet", [anchor], num_classes=3, in_channels=1, bandwidth=0)
    provenance = json.loads(json.dumps(model.provenance))
    assert provenance["adapted"] == {
        "conv1.0.weight": {"anchor_shape": [16, 3, 3, 3], "shape": [16, 1, 3, 3], "how": "adapted", "anchors": [0]},
        "fc.weight": {"anchor_shape": [4, 96], "shape": [3, 96], "how": "initialized", "anchors": [0]},
        "fc.bias": {"anchor_shape": [4], "shape": [3], "how": "initialized", "anchors": [0]},
    }
    origins = provenance["tensors"]
    assert {name for name, origin in origins.items() if origin == "initialized"} == {"fc.weight", "fc.bias"}
    assert origins["conv1.0.weight"] == "sampled"
    assert model.instantiate()(torch.randn(2, 1, 32, 32)).shape == (2, 3)


def test_the_adapted_stem_is_what_is_encoded_and_of_several_anchors_only_the_other_ones_are_adapted():
    color, gray = trained(timm.create_model("test_vit", num_classes=3)), timm.create_model("test_vit", num_classes=3)
    by_hand = timm.create_model("test_vit", num_classes=3, in_chans=1)
    state = color.state_dict()
    state["patch_embed.proj.weight"] = adapt_input_conv(1, state["patch_embed.proj.weight"])
    by_hand.load_state_dict(state)
    (adapted,) = generated("test_vit", [color], num_classes=3, in_channels=1)
    (expected,) = generated("test_vit", [by_hand], num_classes=3, in_channels=1)
    assert same(adapted.state_dict, expected.state_dict)
    assert expected.provenance["adapted"] == {}
    both = generated("test_vit", [by_hand, gray, color], num_classes=3, in_channels=1)[0]
    assert {name: entry["anchors"] for name, entry in both.provenance["adapted"].items()} == {
        "patch_embed.proj.weight": [1, 2]
    }


def test_the_stem_is_initialized_where_that_is_asked_for():
    anchor = trained(timm.create_model("test_vit", num_classes=3))
    first, second = generated(
        "test_vit", [anchor], num_classes=3, in_channels=1, stem="initialize", num_samples=2, bandwidth=0
    )
    origins = {name for name, origin in first.provenance["tensors"].items() if origin == "initialized"}
    assert origins == set(first.provenance["adapted"]) == {"patch_embed.proj.weight"}
    assert first.provenance["adapted"]["patch_embed.proj.weight"]["how"] == "initialized"
    fresh = resolve_target("test_vit", 3, in_channels=1).build(first.provenance["draw_seed"]).state_dict()
    assert torch.equal(first.state_dict["patch_embed.proj.weight"], fresh["patch_embed.proj.weight"])
    assert not torch.equal(first.state_dict["patch_embed.proj.weight"], second.state_dict["patch_embed.proj.weight"])
    with pytest.raises(ValueError, match="stem='inherit'"):
        generated("test_vit", [anchor], num_classes=3, in_channels=1, stem="inherit")


def test_without_the_option_another_number_of_channels_is_refused_and_the_message_names_it():
    anchor = timm.create_model("test_resnet", num_classes=4)
    with pytest.raises(ValueError, match=r"conv1.* has shape .*3, 3, 3\].*in_channels="):
        generated("test_resnet", [anchor], target_kwargs={"in_chans": 1, "num_classes": 4})
    with pytest.raises(ValueError, match="in_channels is 0"):
        generated("test_resnet", [anchor], in_channels=0)


def test_transformers_targets_take_channels_and_classes_too():
    anchor = trained(AutoModelForImageClassification.from_config(ResNetConfig(**RESNET)))
    (model,) = generated(ResNetConfig(**RESNET), [anchor], num_classes=7, in_channels=1)
    assert model.instantiate()(torch.randn(1, 1, 32, 32)).logits.shape == (1, 7)
    assert {entry["how"] for entry in model.provenance["adapted"].values()} == {"adapted", "initialized"}
    # a module of the library says itself what its classifier and its stem are
    module = AutoModelForImageClassification.from_config(
        ResNetConfig(**{**RESNET, "num_channels": 1, "num_labels": 7})
    )
    (again,) = generated(module, [anchor])
    assert again.provenance["adapted"] == model.provenance["adapted"]
    with pytest.raises(ValueError, match="BertConfig has no num_channels"):
        generated(BertConfig(hidden_size=8, num_attention_heads=1), [anchor], in_channels=1)


def test_a_timm_module_says_itself_what_its_classifier_and_its_stem_are():
    anchor = trained(timm.create_model("test_resnet", num_classes=4))
    module = timm.create_model("test_resnet", num_classes=6, in_chans=1)
    (model,) = generated(module, [anchor])
    assert {name.rsplit(".", 1)[0] for name in model.provenance["adapted"]} >= {"fc"}
    assert model.instantiate()(torch.randn(1, 1, 32, 32)).shape == (1, 6)
    with pytest.raises(ValueError, match="num_classes=5 cannot be applied to the target ResNet.*fc.weight"):
        generated(module, [anchor], num_classes=5)


def test_of_any_other_module_the_options_say_that_its_ends_may_differ():
    class Gray(Net):
        def __init__(self):
            super().__init__(classes=9)
            self.conv = nn.Conv2d(1, 6, 3)

    anchor, target = trained(Net()), Gray()
    with pytest.raises(ValueError, match="num_classes= or in_channels="):
        generated(target, [anchor])
    (model,) = generated(target, [anchor], num_classes=9, in_channels=1)
    assert set(model.provenance["adapted"]) == {"conv.weight", "fc.weight", "fc.bias"}
    assert torch.equal(model.state_dict["fc.weight"], target.fc.weight)
    with pytest.raises(ValueError, match="in_channels=3 cannot be applied to the target Gray.*conv.weight"):
        generated(target, [anchor], in_channels=3)


def test_a_module_without_a_convolution_has_no_stem_that_could_be_adapted():
    class Flat(nn.Module):
        def __init__(self, channels: int):
            super().__init__()
            self.patches = nn.Linear(channels * 16, 8)
            self.fc = nn.Linear(8, 3)

    with pytest.raises(ValueError, match="in_channels=1 cannot be applied.*no first convolution"):
        generated(Flat(1), [Flat(3)], in_channels=1)


def test_images_of_other_channels_than_the_target_are_refused_before_any_work():
    anchor = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(ValueError, match="batch_norm_images have 3 channels, the target test_resnet takes 1"):
        generated("test_resnet", [anchor], num_classes=3, in_channels=1, batch_norm_images=torch.zeros(4, 3, 32, 32))


def test_a_model_for_other_channels_is_saved_as_its_library_loads_it(tmp_path):
    anchor = trained(timm.create_model("test_vit", num_classes=3))
    (model,) = generated("test_vit", [anchor], num_classes=5, in_channels=1)
    model.save_pretrained(tmp_path / "timm")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert same(loaded.state_dict(), model.state_dict)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        architectures=["ViTForImageClassification"],
    )
    (vit,) = generated(config, [AutoModelForImageClassification.from_config(config)], num_classes=4, in_channels=1)
    vit.save_pretrained(tmp_path / "transformers")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "transformers")
    assert same(dict(sorted(loaded.state_dict().items())), dict(sorted(vit.state_dict.items())))
    assert EXTRACTOR.manifest(loaded).num_parameters == vit.provenance["entries"]["sampled"] + 68


def test_sizes_that_a_module_does_not_have_are_refused():
    module = timm.create_model("test_resnet", num_classes=20)
    for option in ({"num_classes": 10}, {"in_channels": 1}):
        with pytest.raises(ValueError, match="a module's shapes are given"):
            resolve_target(module, **option)
    assert resolve_target(module, 20, in_channels=3).in_channels == 3
