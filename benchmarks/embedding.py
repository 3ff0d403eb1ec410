"""Time and memory of embedding a model of 25 million, 86 million and 1.3 billion parameters.

    python benchmarks/embedding.py --output results/embedding.json

The claims: the time beside that of reading the file alone; memory that does not grow with the model; models of a few
tokens share forward passes. Each model is measured in a process of its own, with random weights, by a backbone of
random weights. The largest takes 2.7 GB of the temporary folder. Linux only: reads /proc.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from harness import PeakMemory, alone, machine, memory_mb, parser_of, publish
from safetensors.torch import save_file
from torch import nn

from datasets_scripts.embedding import METHODS, EmbedConfig
from datasets_scripts.embedding.embed_models import embed_models
from hf_wsl.files import write_json
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel, open_checkpoint
from modeling_wsl.loading import load_pipeline


MODELS = ("resnet50", "vit_base_patch16_224", "llama_1.3b")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=["backbone"], choices=["backbone", *METHODS])
    parser.add_argument("--backbone", help="Folder or Hub id; by default a nano backbone of random weights.")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--copies", type=int, default=2000, help="Small networks that share forward passes; 0 = skip.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backbone = arguments.backbone or write_backbone(Path(folder) / "backbone")
        report: dict[str, Any] = {
            **machine("cuda" if torch.cuda.is_available() else "cpu"),
            "backbone": arguments.backbone or "nano, random weights",
            "mixed_precision": arguments.mixed_precision,
            "models": [],
        }
        for name in arguments.models:
            path = Path(folder) / name
            alone(write_model, name, path)
            for method in arguments.methods:
                method = backbone if method == "backbone" else method
                row = alone(measure, method, path, arguments.mixed_precision)
                report["models"].append({"model": name, "method": Path(method).name, **row})
        if arguments.copies:
            report["small_models"] = alone(measure_small, backbone, Path(folder) / "small", arguments.copies)
    publish(report, arguments.output)


def write_backbone(folder: Path) -> str:
    torch.manual_seed(0)
    model = WSLModel(WSLConfig.from_size("nano"))
    nn.init.normal_(model.encoder.proj_out.weight, std=0.02)  # silent at its start; batches would not matter
    model.save_pretrained(folder)
    WSLFeatureExtractor().save_pretrained(folder)
    return str(folder)


def write_model(name: str, folder: Path) -> None:
    """A model of timm with its own initialization, or one laid out like LLaMA in bfloat16, a shard a block."""
    folder.mkdir()
    if name != "llama_1.3b":
        state = timm.create_model(name).state_dict()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
        return
    generator = torch.Generator().manual_seed(0)
    width, inner, vocabulary, layers = 2048, 5504, 32_000, 24
    block = {f"self_attn.{key}_proj.weight": (width, width) for key in "qkvo"}
    block |= {"mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width)}
    block |= {"mlp.down_proj.weight": (width, inner), "input_layernorm.weight": (width,)}
    shards = [{"model.embed_tokens.weight": (vocabulary, width)}, {"lm_head.weight": (vocabulary, width)}]
    shards[1:1] = [{f"model.layers.{i}.{key}": shape for key, shape in block.items()} for i in range(layers)]
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: 0.02 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / file)
        weight_map |= dict.fromkeys(shapes, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def measure(method: str, path: Path, mixed_precision: str) -> dict[str, Any]:
    """Embeds a model whose file lies in memory already, as reading it once has put it there."""
    transformers.logging.disable_progress_bar()
    config = EmbedConfig(precision={"no": "float32", "bf16": "bfloat16"}[mixed_precision])
    warm = {"warm.up": torch.randn(100_000)}
    save_file(warm, path.with_suffix(".warm.safetensors"))
    embed_models(method, [path.with_suffix(".warm.safetensors")], config)  # what the libraries do once
    read_alone(path)
    reading = read_alone(path)
    manifest = WSLFeatureExtractor().manifest(path)
    before, peak = memory_mb(), PeakMemory()
    start = time.perf_counter()
    embed_models(method, [path], config)
    seconds = time.perf_counter() - start
    return {
        "parameters": manifest.num_parameters,
        "tokens": manifest.num_tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(manifest.num_tokens / seconds),
        "seconds_reading_alone": round(reading, 3),
        "times_reading_alone": round(seconds / reading, 1),
        "anonymous_mb_above": round(peak.stop() - before, 1),
        "peak_rss_mb": round(memory_mb("VmHWM"), 1),
    }


def read_alone(path: Path) -> float:
    """Seconds to copy every tensor out of the file, one after the other."""
    start = time.perf_counter()
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name).clone()
    return time.perf_counter() - start


def measure_small(backbone: str, folder: Path, copies: int) -> dict[str, Any]:
    """Networks of 2,464 weights (13 tokens), noise apart: embedded together, and by one call of the pipeline each."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.Conv2d(8, 6, 5), nn.Conv2d(6, 4, 2), nn.Linear(36, 20), nn.Linear(20, 10)
    )
    for number in range(copies):
        noised = {key: tensor + 0.05 * torch.randn_like(tensor) for key, tensor in network.state_dict().items()}
        (folder / f"{number:05d}").mkdir(parents=True)
        save_file(noised, folder / f"{number:05d}" / "model.safetensors")
    embed_models(backbone, [folder / "00000"])
    start = time.perf_counter()
    table, _ = embed_models(backbone, [folder])
    together = time.perf_counter() - start
    embedder = load_pipeline("weight-embedding", backbone, progress=False, pooling="mean")
    start = time.perf_counter()
    rows = np.stack([embedder(str(folder / name))["embedding"] for name in table.model_ids])
    singly = time.perf_counter() - start
    return {
        "models": copies,
        "seconds_together": round(together, 2),
        "seconds_one_call_each": round(singly, 2),
        "ratio": round(singly / together, 2),
        "largest_difference": float(np.abs(rows - table.embeddings).max()),
    }


if __name__ == "__main__":
    main()
