"""The models of the mixed Hub that a collection takes, and the bit-for-bit copies that it refuses as duplicates."""

import torch
from hub_mixed_model import GENERATION, IMAGES, MASKED, MixedModel, mixed_model
from hub_model_files import Files, adapter_files, fine_tuned, timm_files, transformers_files


def good_models(seed: int) -> list[MixedModel]:
    """27 models to accept, then 3 copies. Seeds from `seed` on."""
    models = timm_models(seed) + transformers_models(seed + 100)
    files = {model.repo_id: {name: file.data for name, file in model.files.items()} for model in models}
    return models + near_copies(files, seed + 200) + exact_copies(files)


def timm_models(seed: int) -> list[MixedModel]:
    names = {
        "timm/resnet18.a1_in1k": "resnet18",
        "timm/resnet18.a2_in1k": "resnet18",
        "timm/resnet50.a1_in1k": "resnet50",
        "timm/convnext_tiny.in12k_ft_in1k": "convnext_tiny",
        "timm/vit_small_patch16_224.augreg_in1k": "vit_small_patch16_224",
        "timm/swin_tiny_patch4_window7_224.ms_in1k": "swin_tiny_patch4_window7_224",
        "timm/beit_base_patch16_224.in22k_ft_in1k": "beit_base_patch16_224",
        "timm/deit_tiny_distilled_patch16_224.fb_in1k": "deit_tiny_distilled_patch16_224",
        "timm/test_efficientnet.r160_in1k": "test_efficientnet",
    }
    models = [
        mixed_model(repo_id, timm_files(architecture, seed + number))
        for number, (repo_id, architecture) in enumerate(names.items())
    ]
    half = timm_files("mobilenetv2_035", seed + 50, torch.float16)
    old = timm_files("resnet18", seed + 51, safe=False)
    return [
        *models,
        mixed_model("mobile-lab/mobilenetv2_035.fp16_in1k", half, license="mit"),
        mixed_model("old-lab/resnet18_2021", old, license="bsd-3-clause"),
    ]


def transformers_models(seed: int) -> list[MixedModel]:
    plain = [
        ("microsoft/resnet-18", "ResNetForImageClassification", IMAGES),
        ("facebook/convnext-tiny-224", "ConvNextForImageClassification", IMAGES),
        ("google/vit-base-patch16-224", "ViTForImageClassification", IMAGES),
        ("microsoft/swin-tiny-patch4-window7-224", "SwinForImageClassification", IMAGES),
        ("microsoft/beit-base-patch16-224", "BeitForImageClassification", IMAGES),
        ("facebook/deit-tiny-patch16-224", "DeiTForImageClassification", IMAGES),
        ("google-bert/bert-tiny-uncased", "BertForMaskedLM", MASKED),
        ("openai-community/gpt2-tiny", "GPT2LMHeadModel", GENERATION),
    ]
    models = [
        mixed_model(repo_id, transformers_files(architecture, seed + number), task)
        for number, (repo_id, architecture, task) in enumerate(plain)
    ]
    sharded = transformers_files("BertForMaskedLM", seed + 50, shard_size="30KB")
    bfloat16 = transformers_files("GPT2LMHeadModel", seed + 51, torch.bfloat16)
    old = transformers_files("ViTForImageClassification", seed + 52, safe=False)
    base = "google-bert/bert-tiny-uncased"
    lora = {"library": "peft", "base_model": base, "license": "mit"}
    return [
        *models,
        mixed_model("ada/bert-tiny-sharded", sharded, MASKED, license="cc-by-4.0"),
        mixed_model("ada/gpt2-tiny-bf16", bfloat16, GENERATION, license="mit"),
        mixed_model("old-lab/vit-2020", old, license="mit"),
        mixed_model("lora-lab/bert-tiny-lora", adapter_files(base, seed + 53), MASKED, **lora),
    ]


def near_copies(files: dict[str, Files], seed: int) -> list[MixedModel]:
    """Fine-tunes: the weights of a base and a little noise, with the base named in the card."""
    names = [
        ("ada/resnet18-cifar10", "timm/resnet18.a1_in1k", IMAGES),
        ("grace/resnet18-cifar10", "timm/resnet18.a1_in1k", IMAGES),
        ("grace/vit-cifar10", "google/vit-base-patch16-224", IMAGES),
        ("linus/bert-tiny-sst2", "google-bert/bert-tiny-uncased", MASKED),
    ]
    return [
        mixed_model(repo_id, fine_tuned(files[base], seed + number), task, base_model=base, relation="finetune")
        for number, (repo_id, base, task) in enumerate(names)
    ]


def exact_copies(files: dict[str, Files]) -> list[MixedModel]:
    """Weights of others under another owner: later, less downloaded and later in the alphabet than what they copy."""
    names = [
        ("zoe-mirror/resnet18.a1_in1k", "timm/resnet18.a1_in1k", IMAGES),
        ("zoe-mirror/bert-tiny-uncased", "google-bert/bert-tiny-uncased", MASKED),
        ("zz-backup/gpt2", "openai-community/gpt2-tiny", GENERATION),
    ]
    return [mixed_model(repo_id, files[base], task, "duplicate") for repo_id, base, task in names]
