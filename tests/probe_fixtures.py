"""A population of small models whose weights tell what is to be predicted."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


MEMBERS, EPOCHS = 12, 3


def write_population(folder: Path) -> Path:
    """12 members, 3 checkpoints each: the accuracy grows with the weights' scale, the activation is in the bias."""
    for member in range(MEMBERS):
        generator = torch.Generator().manual_seed(member)
        base = torch.randn(24, 16, generator=generator)
        for epoch in range(EPOCHS):
            scale = 1 + member / MEMBERS + epoch / 2
            is_relu = member % 2 == 0
            name = f"member_{member:04d}/epoch_{epoch:03d}"
            state = {"fc.weight": base * scale, "fc.bias": torch.full((24,), 2.0 if is_relu else -2.0) + base[:, 0]}
            properties = {
                "model_id": name,
                "member": f"member_{member:04d}",
                "epoch": epoch,
                "test_accuracy": 0.3 + scale / 10,
                "activation": "relu" if is_relu else "tanh",
                "split": ("train", "validation", "test")[2 if member % 4 == 3 else member % 4 // 2],
                "always": 1,
            }
            (folder / name).mkdir(parents=True)
            save_file(state, folder / name / "model.safetensors")
            (folder / name / "properties.json").write_text(json.dumps(properties))
    return folder
