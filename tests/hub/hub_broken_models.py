"""The models of the mixed Hub that a collection refuses, each for one defect and with the outcome due."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from hub_mixed_model import GENERATION, MASKED, MixedModel, mixed_model
from hub_model_files import Files, change_config, change_weights, saved, timm_files, transformers_files
from hub_state import HubFile


HUGE = 2 * 10**9  # parameters of the model that is too large
CODE = b"from transformers import PreTrainedModel\n\n\nclass OddModel(PreTrainedModel):\n    pass\n"


def broken_models(seed: int, folder: Path) -> list[MixedModel]:
    """30 models. `folder` takes the one that is too large to be made in memory."""
    seeds = iter(range(seed, seed + 100))

    def vit() -> Files:
        return transformers_files("ViTForImageClassification", next(seeds))

    def bert(**options) -> Files:
        return transformers_files("BertForMaskedLM", next(seeds), **options)

    def gpt2(**fields) -> Files:
        return transformers_files("GPT2LMHeadModel", next(seeds), **fields)

    def resnet() -> Files:
        return timm_files("resnet18", next(seeds))

    return [
        *refused_by_metadata(vit, bert, resnet),
        *refused_by_formats(vit, gpt2, folder),
        *refused_by_header(vit, bert, resnet),
        *refused_by_weights(vit, bert, resnet),
    ]


Build = Callable[..., Files]


def refused_by_metadata(vit: Build, bert: Build, resnet: Build) -> list[MixedModel]:
    odd = change_config(vit(), model_type="odd", architectures=["OddModel"], auto_map={"AutoModel": "odd.OddModel"})
    return [
        mixed_model("lab/vit-gated", vit(), outcome="gated", options={"gated": "auto"}),
        mixed_model("lab/bert-on-request", bert(), MASKED, "gated", options={"gated": "manual"}),
        mixed_model("lab/vit-disabled", vit(), outcome="disabled", options={"disabled": True}),
        mixed_model("ghost/vit-vanished", vit(), outcome="vanished", options={"vanished": True}),
        mixed_model("ghost/resnet-always-500", resnet(), outcome="network", always_fails=True),
        mixed_model("strict/vit-nc-nd", vit(), outcome="license", license="cc-by-nc-nd-4.0"),
        mixed_model("strict/bert-own-terms", bert(), MASKED, "license", license="other", license_name="own-terms"),
        mixed_model("odd/remote-code", odd | {"odd.py": CODE}, outcome="remote_code"),
        mixed_model("packed/bert-gptq", packed(bert()), MASKED, "quantized"),
    ]


def refused_by_formats(vit: Build, gpt2: Build, folder: Path) -> list[MixedModel]:
    config = {"config.json": vit()["config.json"]}
    small = gpt2(vocab_size=4, n_embd=2, n_layer=1, n_head=1, n_positions=2)
    huge = change_config(gpt2(), vocab_size=HUGE // 100000, n_embd=100000)
    return [
        mixed_model("other-formats/vit-onnx", config | {"model.onnx": b"\x08\x07" * 500}, outcome="no_weights"),
        mixed_model("other-formats/vit-keras", config | {"tf_model.h5": b"\x89HDF\r\n" * 99}, outcome="no_weights"),
        mixed_model("other-formats/gpt2-gguf", {"gpt2.Q4_0.gguf": b"GGUF" * 99}, GENERATION, "no_weights"),
        mixed_model("tiny/gpt2", small, GENERATION, "too_small"),
        mixed_model("huge/gpt2", huge | {"model.safetensors": sparse_file(folder)}, GENERATION, "too_large"),
    ]


def refused_by_header(vit: Build, bert: Build, resnet: Build) -> list[MixedModel]:
    no_config = vit()
    del no_config["config.json"]
    unknown = change_config(vit(), model_type="flubber", architectures=["FlubberForImageClassification"])
    timm_unknown = change_config(resnet(), architecture="resnet18_of_the_future")
    sharded = bert(shard_size="30KB")
    del sharded[next(name for name in sharded if name.startswith("model-00002"))]
    text, truncated, other = resnet(), vit(), vit()
    text["model.safetensors"] = struct.pack("<Q", 60) + b"{" * 60 + text["model.safetensors"][68:]
    truncated["model.safetensors"] = truncated["model.safetensors"][:-1000]
    stated = HubFile(other["model.safetensors"], sha256=HubFile(vit()["model.safetensors"]).sha256)
    return [
        mixed_model("nobody/no-config", no_config, outcome="unloadable"),
        mixed_model("nobody/broken-config", vit() | {"config.json": b'{"model_type": "vit",'}, outcome="unloadable"),
        mixed_model("nobody/flubber", unknown, outcome="unloadable"),
        mixed_model("nobody/resnet-future", timm_unknown, outcome="unloadable"),
        mixed_model("bad-disk/header", text, outcome="damaged"),
        mixed_model("bad-disk/truncated", truncated, outcome="damaged"),
        mixed_model("bad-disk/other-bytes", other | {"model.safetensors": stated}, outcome="damaged"),
        mixed_model("bad-disk/missing-shard", sharded, MASKED, "damaged"),
        mixed_model("evil/pickle", with_code(vit()), outcome="unloadable"),  # its weights are read, its loader refuses
    ]


def refused_by_weights(vit: Build, bert: Build, resnet: Build) -> list[MixedModel]:
    dense = "bert.encoder.layer.1.intermediate.dense.weight"

    def drop(state: dict[str, torch.Tensor]) -> None:
        del state[dense]

    def extend(state: dict[str, torch.Tensor]) -> None:
        state["layer5.0.conv1.weight"] = torch.ones(8, 8, 3, 3)

    def reshape(state: dict[str, torch.Tensor]) -> None:
        state["layer1.0.conv1.weight"] = torch.ones(12, 8, 3, 3)

    def fill(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(state: dict[str, torch.Tensor]) -> None:
            matrix = next(name for name in sorted(state) if state[name].dim() == 2)
            state[matrix].view(-1)[7] = value

        return change

    def to_integers(state: dict[str, torch.Tensor]) -> None:
        for name, tensor in state.items():
            state[name] = (tensor * 1000).to(torch.int32)

    return [
        mixed_model("careless/bert-missing", change_weights(bert(), drop), MASKED, "missing_weights"),
        mixed_model("careless/resnet-extra", change_weights(resnet(), extend), outcome="unexpected_weights"),
        mixed_model("careless/resnet-shape", change_weights(resnet(), reshape), outcome="mismatched_weights"),
        mixed_model("diverged/vit-nan", change_weights(vit(), fill(float("nan"))), outcome="not_finite"),
        mixed_model("diverged/bert-inf", change_weights(bert(), fill(float("inf"))), MASKED, "not_finite"),
        mixed_model("diverged/vit-1e6", change_weights(vit(), fill(1e6)), outcome="overflow"),
        mixed_model("packed/vit-integers", change_weights(vit(), to_integers), outcome="not_tokenizable"),
    ]


def packed(files: Files) -> Files:
    """Linear layers as GPTQ writes them: packed integers with scales."""

    def pack(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith("dense.weight")]:
            rows, columns = state.pop(name).shape
            layer = name.removesuffix("weight")
            state[layer + "qweight"] = torch.arange(rows * columns // 8, dtype=torch.int32).view(columns // 8, rows)
            state[layer + "scales"] = torch.full((1, rows), 0.01, dtype=torch.float16)

    quantization = {"bits": 4, "group_size": 128, "quant_method": "gptq"}
    return change_config(change_weights(files, pack), quantization_config=quantization)


def with_code(files: Files) -> Files:
    """A pickle that would run a command if it were loaded without care."""

    class Command:
        def __reduce__(self):
            return print, ("the pickle of a model was executed",)

    def write(path: Path) -> None:
        torch.save({"weight": torch.ones(2000), "command": Command()}, path / "pytorch_model.bin")

    return {"config.json": files["config.json"], **saved(write)}


def sparse_file(folder: Path) -> HubFile:
    """A safetensors file of `HUGE` float32 zeros that takes no room on disk."""
    header = {"wte.weight": {"dtype": "F32", "shape": [HUGE // 100000, 100000], "data_offsets": [0, 4 * HUGE]}}
    text = json.dumps(header).encode()
    path = folder / "huge.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + 4 * HUGE)
    return HubFile(path, sha256="0" * 64)
