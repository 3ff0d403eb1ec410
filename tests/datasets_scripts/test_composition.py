"""Composition: the facts that config, card and tags state of a model, and the table and the picture made of them."""

import random

import pytest
import timm
from PIL import Image
from transformers.models.auto import modeling_auto

from datasets_scripts.card.architectures import FAMILIES, GROUPS
from datasets_scripts.card.composition import (
    composition_figure,
    composition_table,
    describe,
    family_shares,
    group_of,
    merge_rest,
    training_data_shares,
)


# id, config -> family, group
STATED = [
    ("a/x", {"architecture": "resnet50d"}, "resnet", "ConvNet"),
    ("a/x", {"architecture": "seresnextaa101d_32x8d"}, "resnet", "ConvNet"),
    ("a/x", {"model_type": "bit"}, "resnet", "ConvNet"),
    ("a/x", {"architecture": "tf_efficientnetv2_s"}, "efficientnet", "ConvNet"),
    ("a/x", {"model_type": "convnextv2"}, "convnext", "ConvNet"),
    ("a/x", {"model_type": "dinov3_convnext"}, "convnext", "ConvNet"),
    ("a/x", {"architecture": "vgg16_bn"}, "other", "ConvNet"),
    ("a/x", {"architecture": "inception_resnet_v2"}, "other", "ConvNet"),
    ("a/x", {"model_type": "mobilenet_v2"}, "other", "ConvNet"),
    ("a/x", {"architecture": "repvit_m1"}, "other", "ConvNet"),
    ("a/x", {"architecture": "vit_base_patch16_clip_224"}, "vit", "Transformer"),
    ("a/x", {"model_type": "dinov2"}, "vit", "Transformer"),
    ("a/x", {"model_type": "yolos"}, "vit", "Transformer"),
    ("a/x", {"architecture": "deit3_small_patch16_224"}, "deit", "Transformer"),
    ("a/x", {"architecture": "beitv2_base_patch16_224"}, "beit", "Transformer"),
    ("a/x", {"architecture": "swinv2_cr_tiny_ns_224"}, "swin", "Transformer"),
    ("a/x", {"architecture": "hiera_base_abswin_256"}, "other", "Transformer"),
    ("a/x", {"model_type": "segformer"}, "other", "Transformer"),
    ("a/x", {"architecture": "coat_tiny"}, "hybrid", "Hybrid"),
    ("a/x", {"architecture": "coatnet_0_224"}, "hybrid", "Hybrid"),
    ("a/x", {"architecture": "maxvit_tiny_tf_224"}, "hybrid", "Hybrid"),
    ("a/x", {"model_type": "mobilevitv2"}, "hybrid", "Hybrid"),
    ("a/x", {"architecture": "vit_small_r26_s32_224"}, "hybrid", "Hybrid"),
    ("a/x", {"architecture": "lambda_resnet26t"}, "hybrid", "Hybrid"),
    ("a/x", {"model_type": "detr", "backbone": "resnet50"}, "hybrid", "Hybrid"),
    ("a/x", {"model_type": "mask2former", "backbone_config": {"model_type": "swin"}}, "swin", "Transformer"),
    ("a/x", {"model_type": "mask2former", "backbone_config": {"model_type": "resnet"}}, "resnet", "ConvNet"),
    ("a/x", {"model_type": "mask2former"}, "unknown", "unknown"),
    ("a/x", {"model_type": "upernet", "backbone_config": {"model_type": "convnext"}}, "convnext", "ConvNet"),
    ("a/x", {"model_type": "vision-encoder-decoder", "encoder": {"model_type": "deit"}}, "deit", "Transformer"),
    ("a/x", {"model_type": "timm_wrapper", "architecture": "resnet18"}, "resnet", "ConvNet"),
    ("a/x", {"architecture": "mixer_b16_224"}, "other", "Other"),
    ("a/x", {"model_type": "poolformer"}, "other", "Other"),
    ("a/x", {"model_type": "gpt2"}, "language", "Transformer"),
    ("a/x", {"model_type": "deberta-v2"}, "language", "Transformer"),
    ("a/x", {"model_type": "mamba2"}, "language", "Other"),
    ("a/x", {"model_type": "brandnew", "architectures": ["BrandNewForCausalLM"]}, "language", "Transformer"),
    ("a/x", {"architectures": ["ResNetForImageClassification"]}, "resnet", "ConvNet"),
    ("a/vit-like", {"model_type": "convnext"}, "convnext", "ConvNet"),
    ("a/resnet50-mine", {"model_type": "house-made"}, "unknown", "unknown"),  # a repository may be called anything
    ("a/mine", {"model_type": "house-made"}, "unknown", "unknown"),
    ("a/mine", {"architecture": "vitality_net"}, "unknown", "unknown"),
    ("timm/resnet18.a1_in1k", {}, "unknown", "unknown"),
    ("a/mine", {}, "unknown", "unknown"),
]


@pytest.mark.parametrize(("model_id", "config", "family", "group"), STATED)
def test_the_architecture_decides_on_family_and_group(model_id, config, family, group):
    found = describe(model_id, config=config)
    assert (found.family, found.group) == (family, group)


def test_a_name_tag_or_base_model_tells_no_family_but_a_stated_task_of_language_does():
    assert describe("google/vit-base-patch16-224", tags=["pytorch", "swin"]).family == "unknown"
    assert describe("a/beit-killer", card={"base_model": "microsoft/resnet-50"}).family == "unknown"
    assert describe("a/b", tags=["text-generation"]).family == "language"


def test_the_architectures_of_timm_are_known():
    neither = ("gmixer", "gmlp", "mixer", "resmlp", "poolformer", "sequencer", "efficientvim")
    found = {name: describe("a/b", config={"architecture": name}) for name in timm.list_models()}
    assert all(name.startswith(neither) for name, it in found.items() if it.group == "Other")
    lost = [name for name, it in found.items() if it.group == "unknown"]
    assert len(lost) <= 0.02 * len(found), lost  # a newer timm has architectures that nobody has seen yet
    assert {it.group for it in found.values()} - {"unknown"} == set(GROUPS) - {"unknown"}
    paper = {"resnet", "convnext", "efficientnet", "vit", "swin", "beit", "deit"}
    assert {it.family for it in found.values()} - {"unknown"} == paper | {"hybrid", "other"}
    assert all(it.family in FAMILIES for it in found.values())
    words = {"convnext": "convnext", "efficientnet": "efficientnet", "swinv2": "swin", "deit": "deit", "beit": "beit"}
    for start, family in words.items():
        assert {it.family for name, it in found.items() if name.startswith(start)} == {family}


def test_vision_models_of_transformers_have_a_group():
    tasks = ("IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "DEPTH_ESTIMATION", "SEMANTIC_SEGMENTATION", "MASKED_LM")
    types = {t for task in tasks for t in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")}
    found = {name: describe("a/b", config={"model_type": name}) for name in sorted(types)}
    lost = [name for name, it in found.items() if it.group in ("Other", "unknown")]
    assert len(lost) <= 0.1 * len(types), lost


@pytest.mark.parametrize(
    ("said", "data"),
    [
        ({"card": {"datasets": ["imagenet-1k", "imagenet-21k"]}}, "imagenet-1k"),
        ({"card": {"datasets": "ILSVRC/imagenet-1k"}}, "imagenet-1k"),
        ({"card": {"datasets": ["timm/imagenet-12k-wds"]}}, "imagenet-12k"),
        ({"card": {"datasets": ["zh-plus/tiny-imagenet"]}}, "tiny-imagenet"),
        ({"card": {"datasets": ["Somebody/Odd_Things"]}}, "somebody/odd_things"),
        ({"tags": ["vit", "dataset:scene_parse_150", "dataset:ade20k"]}, "scene_parse_150"),
        ({"card": {"datasets": ["imagefolder"]}, "tags": ["dataset:coco"]}, "coco"),
        # No statement of what it was trained on: what it was measured on, its labels, its name, and a tag of timm's,
        # which a user's own network inherits from the architecture that it began with.
        ({"card": {"datasets": ["imagefolder"]}, "model_id": "a/vit-finetuned-eurosat"}, None),
        ({"card": {"model-index": [{"results": [{"dataset": {"name": "CIFAR-10", "type": "cifar10"}}]}]}}, None),
        ({"config": {"architecture": "resnet18", "pretrained_cfg": {"tag": "a1_in1k"}}}, None),
        ({"model_id": "timm/resnet50.fb_swsl_ig1b_ft_in1k"}, None),
        ({"config": {"id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}}}, None),
        ({}, None),
    ],
)
def test_training_data_is_the_first_that_card_or_tags_name(said, data):
    assert describe(said.pop("model_id", "a/b"), **said).training_data == data


@pytest.mark.parametrize(
    ("said", "task"),
    [
        ({"task": "mine", "card": {"pipeline_tag": "object-detection"}}, "mine"),
        ({"card": {"pipeline_tag": "object-detection"}, "tags": ["image-classification"]}, "object-detection"),
        ({"tags": ["pytorch", "depth-estimation"]}, "depth-estimation"),
        ({"config": {"architectures": ["ViTForImageClassification"]}}, "image-classification"),
        ({"config": {"architectures": ["GPT2LMHeadModel"]}}, "text-generation"),
        ({"config": {"architectures": ["ViTModel"]}}, None),
    ],
)
def test_the_task_is_the_one_that_is_stated_or_that_of_the_class(said, task):
    assert describe("a/b", **said).task == task


@pytest.mark.parametrize(
    ("said", "base"),
    [
        ({"card": {"base_model": ["org/base", "org/other"]}}, "org/base"),
        ({"tags": ["base_model:finetune:org/base", "base_model:org/base"]}, "org/base"),
        ({"tags": ["base_model:org/base"]}, "org/base"),
        ({"config": {"peft_type": "LORA", "base_model_name_or_path": "org/base"}}, "org/base"),
        ({"config": {"base_model_name_or_path": "/home/ada/base"}}, None),
        ({"config": {"_name_or_path": "org/base"}}, "org/base"),
        ({"config": {"_name_or_path": "a/b"}}, None),  # itself
        ({"config": {"_name_or_path": "./results"}}, None),
        ({"config": {"_name_or_path": "results/checkpoint-500"}}, None),  # a folder of the author's
        ({"config": {"_name_or_path": "ada/checkpoint-500"}}, None),
        ({}, None),
    ],
)
def test_the_base_model_is_a_hub_id_that_is_stated(said, base):
    assert describe("a/b", **said).base_model == base


def test_an_adapter_has_the_architecture_of_its_kind_and_no_family():
    config = {"peft_type": "LORA", "base_model_name_or_path": "google/vit-base-patch16-224"}
    found = describe("a/b", config=config)
    assert (found.architecture, found.family, found.base_model) == ("lora", "unknown", "google/vit-base-patch16-224")


def test_entries_of_the_wrong_type_say_nothing():
    broken = [None, 3, {"a": 1}, [None], [[]], True, ""]
    draw = random.Random(0)
    keys = ["architecture", "architectures", "model_type", "peft_type", "backbone", "backbone_config", "encoder"]
    keys += ["id2label", "pretrained_cfg", "_name_or_path", "base_model_name_or_path"]
    for _ in range(200):
        config = {key: draw.choice(broken) for key in keys}
        card = {key: draw.choice(broken) for key in ("datasets", "pipeline_tag", "tags", "base_model", "model-index")}
        found = describe("a/b", config=config, card=card, tags=draw.sample([None, 3, "", "x:y"], 2))
        assert (found.family, found.training_data, found.base_model) == ("unknown", None, None)


def row(number: int, family: str | None, architecture: str | None = None, data: str | None = None, **columns) -> dict:
    names = {"model_id": f"o/m{number}", "task": None, "base_model": None, "status": "accepted"}
    return {
        **names,
        "family": family,
        "architecture": architecture,
        "training_data": data,
        "num_parameters": 10,
        **columns,
    }


@pytest.mark.parametrize(
    ("family", "architecture", "group"),
    [
        ("resnet", None, "ConvNet"),
        ("other", "vgg16", "ConvNet"),
        ("other", "segformer", "Transformer"),
        ("other", "thing", "Other"),
        ("hybrid", "thing", "Hybrid"),
        ("language", "mamba", "Other"),
        ("language", "thing", "Transformer"),
        ("cnn-small", None, "ConvNet"),  # the word of a list of models
        ("toy", None, "Other"),
        ("unknown", "thing", "unknown"),
        (None, None, "unknown"),
    ],
)
def test_a_row_s_group_follows_from_its_family_and_architecture(family, architecture, group):
    assert group_of(row(0, family, architecture)) == group


def test_description_and_row_agree_on_the_group():
    for model_id, config, _, group in STATED:
        found = describe(model_id, config=config)
        columns = {"model_id": model_id, "task": found.task, "base_model": found.base_model}
        assert group_of(row(0, found.family, found.architecture, **columns)) == group


def some_rows(seed: int, count: int) -> list[dict]:
    draw = random.Random(seed)
    kinds = [("vit", "vit"), ("swin", "swin"), ("other", "segformer"), ("resnet", "resnet"), ("unknown", None)]
    kinds += [(f"family-{i}", None) for i in range(30)]
    data = ["imagenet-1k", None, *(f"data-{i}" for i in range(40))]
    return [row(i, *draw.choice(kinds), draw.choice(data)) for i in range(count)] + [
        row(count, "vit", status="refused")
    ]


def test_shares_count_every_accepted_model_once():
    rows = some_rows(0, 500)
    for shares in (family_shares(rows), training_data_shares(rows)):
        for parts in (shares, merge_rest(shares, 14), merge_rest(shares, 2)):
            assert sum(part.models for part in parts) == 500
            assert sum(part.parameters for part in parts) == 5000
            assert sum(part.share for part in parts) == pytest.approx(1)
        assert len(merge_rest(shares, 14)) == 14
        assert merge_rest(shares, 14)[-1].name == shares[-1].name == "unknown"
        assert len({(part.name, part.group) for part in shares}) == len(shares)
    groups = [share.group for share in family_shares(rows)]
    assert groups == sorted(groups, key=GROUPS.index)


def test_the_table_gives_models_shares_and_parameters():
    rows = [
        row(0, "vit", "vit", "imagenet-1k"),
        row(1, "vit", "vit"),
        row(2, "odd|one"),
        row(3, "resnet", data="coco"),
    ]
    text = composition_table(rows)
    assert "| Transformer | vit | 2 | 50.0% | 20 |" in text
    assert "| ConvNet | resnet | 1 | 25.0% | 10 |" in text
    assert "| Other | odd\\|one | 1 | 25.0% | 10 |" in text
    assert "| imagenet-1k | 1 | 25.0% | 10 |" in text
    assert "| unknown | 2 | 50.0% | 20 |" in text
    assert "| 15 more | 121 | 24.2% | 1,210 |" in composition_table(some_rows(0, 500), limit=28)


@pytest.mark.parametrize("count", [1, 3, 2200])
def test_the_picture_is_small_fits_a_card_and_has_the_same_bytes_every_time(tmp_path, count):
    rows = some_rows(1, count)
    for name in ("a.png", "b.png"):
        composition_figure(rows, tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    assert len(first) < 200_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert 1000 < picture.width < 1500
        assert picture.height < 900
        assert "Software" not in picture.info
