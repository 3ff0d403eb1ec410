"""Tiny real models of timm, transformers and PEFT, as the files that the libraries' own saving writes."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save


Files = dict[str, bytes]

TRANSFORMER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
TIMM_ARGUMENTS = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8, "num_classes": 10},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8), "stem_width": 8, "num_classes": 10},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24), "num_classes": 10},
    "vit_small_patch16_224": TRANSFORMER,
    "beit_base_patch16_224": TRANSFORMER,
    "deit_tiny_distilled_patch16_224": TRANSFORMER,
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 12,
        "depths": (1, 1),
        "num_heads": (2, 4),
        "num_classes": 10,
    },
    "test_efficientnet": {"num_classes": 10},
    "mobilenetv2_035": {"num_classes": 10},
}
IMAGE = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXT = {"vocab_size": 120, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
GPT = {"vocab_size": 120, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32}
TRANSFORMERS_FIELDS = {  # by model_type
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]},
    "vit": IMAGE | {"intermediate_size": 48},
    "beit": IMAGE | {"intermediate_size": 48, "use_relative_position_bias": True},
    "deit": IMAGE | {"intermediate_size": 48},
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 12,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "bert": TEXT | {"intermediate_size": 48, "max_position_embeddings": 32},
    "gpt2": GPT | {"bos_token_id": 0, "eos_token_id": 0},
}


def files_in(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved(save_to: Callable[[Path], None]) -> Files:
    with tempfile.TemporaryDirectory(prefix="tests-hub-models-") as folder:
        save_to(Path(folder))
        return files_in(Path(folder))


def make(build: Callable[[], torch.nn.Module], seed: int, dtype: torch.dtype | None) -> torch.nn.Module:
    """A model with weights that a seed fixes; the generator of the caller stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():  # biases and norms of a trained model are not all zeros and ones
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.02 * torch.randn(tensor.shape).abs())
    return model if dtype is None else model.to(dtype)


def timm_files(architecture: str, seed: int, dtype: torch.dtype | None = None, safe: bool = True) -> Files:
    """What timm.models.save_for_hf writes: `pytorch_model.bin` unless `safe`."""
    import timm

    model = make(lambda: timm.create_model(architecture, **TIMM_ARGUMENTS[architecture]), seed, dtype)
    return saved(lambda folder: timm.models.save_for_hf(model, folder, safe_serialization=safe))


def transformers_files(
    architecture: str,
    seed: int,
    dtype: torch.dtype | None = None,
    shard_size: str = "5GB",
    safe: bool = True,
    **fields: int,
) -> Files:
    """What save_pretrained writes for a class of transformers, such as BertForMaskedLM.

    Unless `safe`, the weights are in `pytorch_model.bin`, as versions of transformers before 5 wrote them.
    """
    import transformers

    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**TRANSFORMERS_FIELDS[model_class.config_class.model_type] | fields)
    model = make(lambda: model_class(config), seed, dtype)

    def write(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=shard_size)
        if not safe:
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")

    return saved(write)


def adapter_files(base_id: str, seed: int) -> Files:
    """What PEFT writes for a LoRA adapter of a BERT; its weights are not those that it starts from."""
    import peft
    import transformers

    config = transformers.BertConfig(**TRANSFORMERS_FIELDS["bert"])
    lora = peft.LoraConfig(r=8, target_modules=["query", "value"])

    def build() -> torch.nn.Module:
        return peft.get_peft_model(transformers.BertForMaskedLM(config), lora)

    model = make(build, seed, None)
    files = saved(lambda folder: model.save_pretrained(folder, save_embedding_layers=False))
    adapter = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": base_id}
    return files | {"adapter_config.json": json.dumps(adapter, indent=2).encode()}


def change_weights(files: Files, change: Callable[[dict[str, torch.Tensor]], None]) -> Files:
    """The files after `change` has edited the tensors of their one safetensors file."""
    state = load(files["model.safetensors"])
    change(state)
    return files | {"model.safetensors": save(state, {"format": "pt"})}


def change_config(files: Files, **fields: object) -> Files:
    config = json.loads(files["config.json"]) | fields
    return files | {"config.json": json.dumps(config, indent=2).encode()}


def fine_tuned(files: Files, seed: int, size: float = 0.01) -> Files:
    """Every floating-point tensor moved by noise of `size` times its root mean square."""
    generator = torch.Generator().manual_seed(seed)

    def move(state: dict[str, torch.Tensor]) -> None:
        for name, tensor in sorted(state.items()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                state[name] = tensor + size * tensor.square().mean().sqrt() * noise

    return change_weights(files, move)
