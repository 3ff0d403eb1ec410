"""Weights as the common libraries save them, in every dtype."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from case import Case, Made, State, weights
from safetensors.torch import save_file, save_model
from torch import nn


KIND = "Plain weights"


def safetensors_file(folder: Path, state: State, metadata: dict | None = None) -> Made:
    save_file(state, folder / "weights.safetensors", metadata)
    return folder / "weights.safetensors", state


def mixed() -> State:
    """Every dtype that weights are kept in, with a scalar, an empty tensor and integers beside."""
    state = weights()
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    state = {name: tensor.to(dtype) for (name, tensor), dtype in zip(state.items(), dtypes, strict=True)}
    more = {"scale": torch.tensor(0.5), "empty": torch.empty(0, 4), "bn.num_batches_tracked": torch.tensor(7)}
    return state | more | {"mask": torch.tensor([True, False])}


def torch_file(folder: Path, name: str = "weights.pt", *, legacy: bool = False, **beside: object) -> Made:
    """A state dict; under the key `model` of a training checkpoint where anything lies beside it."""
    state = weights()
    content = {"model": state, **beside} if beside else state
    torch.save(content, folder / name, _use_new_zipfile_serialization=not legacy)
    return folder / name, state


def sharded(folder: Path, suffix: str) -> Made:
    state = weights()
    names, kind = list(state), {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
    weight_map = {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        shard = f"{kind.partition('.')[0]}-{number:05d}-of-00002.{suffix}"
        content = {name: state[name] for name in part}
        save_file(content, folder / shard) if suffix == "safetensors" else torch.save(content, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, state


def tied_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(20, 12), "inner": nn.Linear(12, 12), "head": nn.Linear(12, 20, False)}
    )
    model["head"].weight = model["embed"].weight
    return model


def tied(folder: Path, save: Callable[[nn.Module, Path], object]) -> Made:
    model = tied_model()
    save(model, folder / "model.safetensors")
    return folder, dict(model.state_dict())


def transformers_folder(folder: Path) -> Made:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30
    )
    model = BertModel(config)
    model.save_pretrained(folder)
    return folder, dict(model.state_dict())


def timm_folder(folder: Path) -> Made:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 5}))
    return folder, dict(model.state_dict())


def peft_adapter(folder: Path) -> Made:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder, load_file(folder / "adapter_model.safetensors")


def module(folder: Path) -> Made:
    model = tied_model()
    return model, dict(model.state_dict())


def of_dtype(dtype: torch.dtype) -> Case:
    name = str(dtype).removeprefix("torch.")
    layout = f"one safetensors file, {name}"
    return Case(
        f"safetensors-{name}", KIND, layout, "safetensors", lambda f: safetensors_file(f, weights(dtype=dtype))
    )


def lies(folder: Path) -> Made:
    """A safetensors file whose last tensor ends behind the end of the file."""
    path, _ = safetensors_file(folder, weights())
    path.write_bytes(path.read_bytes()[:-8])
    return path, None


CASES = [
    *(of_dtype(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    *(of_dtype(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)),
    Case(
        "safetensors-mixed",
        KIND,
        "one safetensors file, all dtypes",
        "safetensors",
        lambda f: safetensors_file(f, mixed()),
    ),
    Case(
        "safetensors-sharded",
        KIND,
        "safetensors shards and their index",
        "safetensors",
        partial(sharded, suffix="safetensors"),
    ),
    Case("safetensors-cut", KIND, "a safetensors file that was cut off", "safetensors", lies, "refused", ("byte",)),
    Case("safetensors-tied", KIND, "tied weights, saved by save_model", "safetensors", partial(tied, save=save_model)),
    Case("torch-zip", KIND, "a state dict by torch.save", "torch", torch_file),
    Case("torch-legacy", KIND, "a state dict in torch's format before 1.6", "torch", partial(torch_file, legacy=True)),
    Case("torch-sharded", KIND, "torch shards and their index", "torch", partial(sharded, suffix="bin")),
    Case(
        "torch-training",
        KIND,
        "a state dict under a key, with epoch and loss beside",
        "torch",
        partial(torch_file, epoch=3, loss=0.5),
    ),
    Case("transformers", KIND, "a folder by save_pretrained", "transformers", transformers_folder),
    Case("timm", KIND, "a folder with timm's config.json", "timm", timm_folder),
    Case("peft-lora", KIND, "a LoRA adapter", "peft", peft_adapter, needs=("peft",)),
    Case("module", KIND, "an nn.Module in memory, weights tied", "torch", module),
]
