"""Weights for architectures of other sizes: resized, fitted, with a classifier of their own."""

import logging

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, pipeline

from modeling_wsl.generation.donors.generation import DonorSettings, generate_from_donors
from modeling_wsl.generation.targets import resolve_target


class Block(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.added = stride, out - width

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.added:  # padded channels instead of a projection
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return functional.relu(x + y)


class ResNet(nn.Module):
    """A residual network whose shortcuts are padded (He et al. 2015, option A)."""

    def __init__(self, width, blocks, num_classes=4, channels=3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(Block(width, width, 1) for _ in range(blocks)))
        later = [Block(width, 2 * width, 2), *(Block(2 * width, 2 * width, 1) for _ in range(blocks - 1))]
        self.layer2, self.linear = nn.Sequential(*later), nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x)))))
        return self.linear(x.mean((2, 3)))


def trained(module, seed=0):
    """As after training: no tensor is all ones or zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise - 0.5 if name.endswith(("bias", "mean")) else noise / 2 + 0.75)
    return module.eval()


def images(count=96, channels=3, seed=0, size=16):
    coarse = torch.randn(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(coarse, (size, size), mode="bilinear")


def vit(width, depth, heads, size=16):
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=size,
        patch_size=4,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=4,
    )


def convnext(widths, depths):
    return timm.create_model("convnext_atto", patch_size=2, dims=widths, depths=depths, num_classes=4)


def densenet(growth):
    return timm.create_model("densenet121", growth_rate=growth, block_config=(2, 3), num_classes=4)


def resnext(groups, width, layers):
    return timm.create_model(
        "resnext50_32x4d", layers=layers, cardinality=groups, base_width=width, num_classes=4, stem_width=8
    )


def gpt2(width, depth, heads):
    sizes = {"n_embd": width, "n_layer": depth, "n_head": heads, "n_positions": 32, "vocab_size": 50}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama(width, depth, heads, groups):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=heads, num_key_value_heads=groups, **sizes))


GROWING = {
    "residual, padded shortcuts": lambda: (ResNet(6, 2), ResNet(10, 3)),
    "patches, whole heads": lambda: (vit(24, 2, 3), vit(48, 3, 6)),
    "patches, larger heads": lambda: (vit(24, 2, 3), vit(48, 2, 3)),
    "depthwise, layer scale": lambda: (
        convnext([8, 12, 16, 20], [1, 1, 2, 1]),
        convnext([16, 24, 32, 40], [2, 1, 3, 1]),
    ),
    "two stages of one width": lambda: (
        timm.create_model("mobilenetv2_035", num_classes=4),  # 8, 8, 16 wide where the other one is 8, 16, 16
        timm.create_model("mobilenetv2_050", num_classes=4),
    ),
    "stages of many more blocks": lambda: (
        timm.create_model("resnet18", channels=[4, 6, 8, 10], layers=[1, 1, 2, 1], num_classes=4),
        timm.create_model("resnet18", channels=[6, 8, 12, 20], layers=[2, 3, 6, 2], num_classes=4),
    ),
    "concatenated": lambda: (densenet(8), densenet(12)),
    "more groups": lambda: (resnext(4, 16, (1, 1, 1, 1)), resnext(8, 16, (2, 1, 1, 1))),
    "wider groups": lambda: (resnext(4, 16, (1, 1, 1, 1)), resnext(4, 32, (1, 1, 1, 1))),
    "tied embedding, packed attention": lambda: (gpt2(24, 2, 3), gpt2(48, 4, 6)),
    "grouped queries, rotary, gated": lambda: (llama(32, 2, 4, 2), llama(64, 3, 8, 4)),
    "more queries a key": lambda: (llama(32, 2, 4, 2), llama(64, 2, 8, 2)),
}


@pytest.mark.parametrize("networks", GROWING.values(), ids=GROWING)
def test_growth_leaves_the_function_as_it_was(networks):
    donor, target = networks()
    (model,) = generate_from_donors(target, trained(donor), DonorSettings(progress=False))
    assert model.provenance["output_error"] < 1e-5
    assert set(model.state_dict) == set(target.state_dict())
    assert all(
        not torch.equal(value, target.state_dict()[name])
        for name, value in model.state_dict.items()
        if value.dim() > 1
    )


def error(model, donor, x):
    with torch.no_grad():
        wanted = donor(x)
        return float((model.instantiate()(x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "networks",
    [
        lambda: (ResNet(16, 3), ResNet(12, 2)),
        lambda: (vit(48, 3, 6), vit(32, 2, 4)),
        lambda: (densenet(12), densenet(9)),
    ],
    ids=["batch norm", "layer norm", "concatenated"],
)
def test_a_fit_is_nearer_to_the_donor_than_what_was_resized(networks):
    donor, target = networks()
    x, unseen = images(), images(seed=1)
    trained(donor)
    errors = {}
    for method in ("resize", "fit", "select"):
        settings = DonorSettings(method, x, progress=False)
        (model,) = generate_from_donors(target, donor, settings)
        errors[method] = error(model, donor, unseen)
        again = generate_from_donors(target, donor, settings)[0].state_dict
        assert all(torch.equal(value, again[name]) for name, value in model.state_dict.items())
    assert errors["fit"] < 0.8 * min(errors["resize"], errors["select"])


def test_provenance_names_the_donor_s_tensor_blocks_and_images():
    (model,) = generate_from_donors(
        ResNet(12, 2), trained(ResNet(16, 4)), DonorSettings(images=images(), progress=False)
    )
    facts = model.provenance
    last = facts["donor_tensors"]["layer1.1.conv2.weight"]
    assert last["tensor"] == "layer1.3.conv2.weight" and last["shape"] == [16, 16, 3, 3]
    assert facts["donor_tensors"]["layer1.0.conv1.weight"]["blocks"] == ["layer1.0", "layer1.1"]
    assert last["fitted"]["rows"] > 1000 and last["fitted"]["error_after"] < last["fitted"]["error_before"]
    assert facts["tensors"]["layer1.1.conv2.weight"] == "fitted: ResNet"
    assert facts["tensors"]["bn1.running_var"] == "re-estimated"
    assert (facts["num_images"], facts["method"], facts["donor"]) == (96, "fit", 0)


def test_selection_takes_evenly_spaced_entries_of_the_first_blocks():
    donor = trained(ResNet(16, 3))
    (model,) = generate_from_donors(ResNet(8, 2), donor, DonorSettings("select", progress=False))
    assert torch.equal(
        model.state_dict["layer1.1.conv1.weight"], donor.state_dict()["layer1.1.conv1.weight"][::2, ::2]
    )


def test_other_classes_channels_and_resolution():
    donor, x = trained(ResNet(16, 2)), images(channels=1)
    labels = (x.mean((1, 2, 3)) > 0).long() + 2 * (x[:, :, :8].mean((1, 2, 3)) > 0).long()
    target = ResNet(12, 2, num_classes=5, channels=1)
    (model,) = generate_from_donors(
        target, donor, DonorSettings(images=x, labels=labels, progress=False), in_channels=1
    )
    assert model.provenance["tensors"]["linear.weight"] == "fitted: labels"
    assert model.provenance["head"]["held_out_accuracy"] > 0.5
    (model,) = generate_from_donors(target, donor, DonorSettings(images=x, progress=False), in_channels=1)
    assert model.provenance["initialized"] == ["linear.bias", "linear.weight"]
    small, large = trained(vit(24, 2, 3)), vit(48, 2, 6, size=32)
    (model,) = generate_from_donors(large, small, DonorSettings(images=images(size=32), progress=False))
    assert model.provenance["donor_tensors"]["pos_embed"]["shape"] == [1, 17, 24]


def test_language_models_take_batches_of_tokens():
    tokens = {"input_ids": torch.randint(0, 50, (64, 24), generator=torch.Generator().manual_seed(0))}
    donor = trained(gpt2(48, 3, 6))
    (model,) = generate_from_donors(gpt2(32, 2, 4), donor, DonorSettings(images=tokens, progress=False))
    fitted = {name: facts["fitted"] for name, facts in model.provenance["donor_tensors"].items() if "fitted" in facts}
    assert len(fitted) == 8  # four matrices a block; the tied embedding stays
    assert all(facts["error_after"] < facts["error_before"] for facts in fitted.values())


def test_the_best_of_several_donors_comes_first():
    donors = [trained(ResNet(16, 2), seed) for seed in range(3)]
    settings = DonorSettings(rank=lambda module: module.bn1.weight[0].item(), num_samples=2, progress=False)
    models = generate_from_donors(ResNet(16, 2), donors, settings)
    best = sorted((float(donor.bn1.weight[0]) for donor in donors), reverse=True)[:2]
    assert [model.provenance["score"] for model in models] == pytest.approx(best)


def test_distillation_goes_on_from_there():
    donor, x = trained(ResNet(16, 2)), images()
    plain, distilled = (
        generate_from_donors(ResNet(8, 2), donor, DonorSettings("resize", x, distill_epochs=epochs, progress=False))[0]
        for epochs in (0, 3)
    )
    assert distilled.provenance["distillation"]["epochs"] == 3
    assert error(distilled, donor, x) < error(plain, donor, x)


def test_the_pipeline_takes_donors_without_a_backbone_of_its_own():
    generator = pipeline("weight-generation")
    (model,) = generator(ResNet(12, 2), anchors=[trained(ResNet(16, 3))], images=images(), progress=False)
    assert model.provenance["method"] == "fit"


class NoClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.stem(x)


BAD = {
    "nothing to pair": ({"target": NoClassifier()}, {}, "nothing to pair with the target NoClassifier.*stem.weight"),
    "no partner": (
        {"target": nn.Sequential(nn.Conv2d(3, 4, 3)), "donors": [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())]},
        {"initialize": ["1"]},
        "initialize='1' names no stored tensor",
    ),
    "no images": ({}, {"method": "fit"}, "method='fit' needs images="),
    "labels without images": ({}, {"labels": [1, 2]}, "labels needs images="),
    "labels of another number": ({}, {"images": images(8), "labels": [0, 1]}, "labels has 2 entries for 8 images"),
    "labels of other classes": (
        {},
        {"images": images(8), "labels": [9] * 8, "method": "resize"},
        "from 9 to 9, do not fit 8 images and a classifier of 4 classes. Pass num_classes=",
    ),
    "images of other channels": (
        {},
        {"images": images(8, channels=1)},
        "images have 1 channels.*takes 3.*in_channels=",
    ),
    "images of another shape": ({}, {"images": torch.randn(3, 16)}, r"images has shape \[3, 16\]"),
    "tensors alone": ({"donors": [ResNet(16, 2).state_dict()]}, {}, "known by its tensors only.*anchor_modules="),
    "no donor": ({"donors": []}, {}, "anchors is empty"),
    "no such method": ({}, {"method": "grow"}, "method"),
}


@pytest.mark.parametrize(("arguments", "settings", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line(arguments, settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        chosen = {"target": ResNet(8, 2), "donors": [ResNet(16, 2)], **arguments}
        generate_from_donors(settings=DonorSettings(**settings, progress=False), **chosen)
    assert "\n" not in str(raised.value)


def test_few_images_are_warned_about(caplog):
    logging.getLogger("transformers").propagate = True
    generate_from_donors(ResNet(8, 1), ResNet(16, 1), DonorSettings(images=images(8), progress=False))
    assert "8 images are few for a fit" in caplog.text


def test_a_folder_is_meant_where_timm_has_an_architecture_of_its_name(tmp_path, monkeypatch):
    target = resolve_target("resnet10t", 3, {"stem_width": 4, "channels": [4, 4, 8, 8]})
    (tmp_path / "resnet10t").mkdir()
    target.save(target.build(0).state_dict(), tmp_path / "resnet10t")
    monkeypatch.chdir(tmp_path)
    (model,) = generate_from_donors(target, ["resnet10t"], DonorSettings(progress=False))
    assert model.provenance["output_error"] < 1e-5
