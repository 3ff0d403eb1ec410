"""A scale of the smallest sizes that the whole way works at, on scikit-learn's digits and a made-up text."""

import json
from pathlib import Path

import datasets
import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from trainers.reproduction.plan import Given


NET = {"group": "ResNet", "target": "resnet10t", "target_kwargs": {"stem_width": 4, "channels": [4, 4, 8, 8]}}
OTHER = {
    "group": "ConvNeXt",
    "target": "convnext_atto",
    "target_kwargs": {"dims": [4, 8, 8, 8], "depths": [1, 1, 1, 1]},
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 300,
    "n_positions": 16,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "architectures": ["GPT2LMHeadModel"],
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BACKBONE = {
    "recipe": "nano",
    "collection": "zoo",
    "options": {
        "max_steps": 2,
        "batch_size": 2,
        "mixed_precision": "no",
        "eval_steps": 0,
        "use_cpu": True,
        "model": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "latent_size": 8},
    },
}
FAST = {"epochs": 1, "batch_size": 8, "use_cpu": True}
TINY = {
    "about": "The smallest sizes that work.",
    "datasets": {"digits": {"options": {"image_size": 32, "max_train": 48, "max_validation": 16, "max_test": 16}}},
    "texts": {"words": {"options": {"vocab_size": 300, "block_size": 16, "max_train_tokens": 256}}},
    "architectures": {"net": NET, "other": OTHER, "gpt2": {"group": "GPT-2", "transformers": GPT2}},
    "zoos": {
        "cnns": {
            "dataset": "digits",
            "data": {"image_size": 28, "channels": 1, "max_train": 48, "max_validation": 16, "max_test": 16},
            "options": {"seeds": 8, "epochs": 2, "learning_rates": [1e-3, 1e-2], "batch_size": 16},
            "probe": {"target": ["test_accuracy", "epoch"]},
        },
        "trained elsewhere": {
            "given": "nets",
            "include": ["*net-*"],
            "probe": {"target": ["value"], "split": "leave-group-out", "properties": ""},
        },
    },
    "collections": {
        "cnns": {"zoo": "cnns", "tokenize": {"split_by": "model", "layer_normalization": True}},
        "zoo": {
            "trained": {"architectures": ["net"], "datasets": ["digits"], "seeds": [100, 101]},
            "tokenize": {"split_by": "model", "validation_fraction": 0.5},
        },
    },
    "backbones": {
        **dict.fromkeys(("hf-large", "sane-cifar10", "loss-token-masked"), BACKBONE),
        "of-the-zoo": {**BACKBONE, "collection": "cnns"},
    },
    "training": {"epochs": 1, "batch_size": 16, "use_cpu": True},
    "protocols": {
        "fine-tuning": {"protocol": "init", "seeds": 2, "num_candidates": 2, "finetune": {**FAST, "batch_size": 24}},
        "few-shot": {"protocol": "few-shot", "seeds": 1, "num_candidates": 3, "num_kept": 2, "finetune": FAST},
        "language-modeling": {"protocol": "init", "seeds": 1, "num_candidates": 2, "finetune": FAST},
        "probing": {"bootstrap": 20, "probes": ["ridge"], "baselines": ["statistics", "pca"]},
    },
    "tables": {
        "table7": {"architectures": ["net", "other"], "datasets": ["digits"], "difference": "Everything is tiny."},
        "table1": {
            "architectures": ["net"],
            "datasets": ["digits"],
            "rows": ["MLN"],
            "difference": "Everything is tiny.",
        },
        "table9": {
            "zoos": ["cnns"],
            "poolings": ["mean", "layers"],
            "rows": ["CIFAR10", "HF"],
            "backbones": {"CIFAR10": ["of-the-zoo"]},
            "difference": "Everything is tiny.",
        },
        "populations": {"zoos": ["trained elsewhere"], "poolings": ["mean"], "difference": "Everything is tiny."},
        "figure4": {"architectures": ["gpt2"], "datasets": ["words"], "difference": "Everything is tiny."},
        "figure6": {
            "architectures": ["net"],
            "datasets": ["digits"],
            "rows": ["Masked Normalization"],
            "difference": "Everything is tiny.",
        },
    },
}


def write_scale(folder: Path, **changes) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


def write_data(folder: Path) -> Given:
    """Digits as a folder of Parquet, a text of words, as the user would give them."""
    digits = load_digits()
    images = folder / "digits"
    images.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for split, rows in {"train": range(200), "test": range(200, 260)}.items():
        pictures = [Image.fromarray((digits.images[row] * 15.9).astype(np.uint8)) for row in rows]
        table = {"image": pictures, "label": [int(digits.target[row]) for row in rows]}
        datasets.Dataset.from_dict(table, features).to_parquet(images / f"{split}-00000-of-00001.parquet")
    text = folder / "words.txt"
    random = np.random.default_rng(0)
    words = np.array(
        [
            "the",
            "cat",
            "dog",
            "sees",
            "a",
            "house",
            "tree",
            "and",
            "runs",
            "to",
            "with",
            "old",
            "new",
            "small",
            "large",
            "river",
        ]
    )
    text.write_text("\n".join(" ".join(random.choice(words, 8)) + "." for _ in range(200)))
    write_population(folder / "nets")
    return Given({"digits": str(images)}, {"words": str(text)}, {"nets": str(folder / "nets")})


def write_population(folder: Path) -> None:
    """Nets whose mean weight tells a property of theirs, and one that is none of them."""
    random = np.random.default_rng(0)
    for index, name in enumerate([*(f"net-{number}" for number in range(12)), "other"]):
        (folder / name).mkdir(parents=True)
        weights = random.normal(index / 10, 0.1, (16, 24)).astype(np.float32)
        save_file({"layer.weight": weights}, folder / name / "model.safetensors")
        (folder / name / "properties.json").write_text(json.dumps({"value": index / 10}))
