"""The anonymous memory that streaming a 1.3-billion-parameter model takes: that of a window, not that of the model.

    python benchmarks/stream_memory.py --output results/stream_memory.json

Writes a safetensors file of that size into a temporary folder first (2.6 GB in bfloat16), or with `--gguf Q4_0` a
GGUF file of quantized blocks. Linux only: reads /proc.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from harness import PeakMemory, alone, machine, memory_mb, parser_of, publish
from safetensors.torch import save_file

from modeling_wsl import WSLFeatureExtractor


def write_model(path: Path, arguments: argparse.Namespace) -> None:
    if arguments.gguf is None:
        save_file(large_model(arguments.layers, arguments.width, getattr(torch, arguments.dtype)), path)
        return
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    kind = gguf.GGMLQuantizationType[arguments.gguf]
    for name, value in large_model(arguments.layers, arguments.width, torch.float32).items():
        if value.dim() == 1:
            writer.add_tensor(name, value.numpy())
        else:
            writer.add_tensor(name, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def large_model(layers: int, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A GPT-like stack: an embedding of 50,257 rows, then `layers` blocks of 12 width^2 weights."""
    block = torch.randn(4 * width, width).to(dtype)
    shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "fc1": (4 * width, width)}
    state = {"wte.weight": torch.randn(50_257, width).to(dtype)}
    for layer in range(layers):
        for name, (rows, columns) in shapes.items():
            state[f"blocks.{layer}.{name}.weight"] = block[:rows, :columns].clone()
        state[f"blocks.{layer}.fc2.weight"] = block.t().contiguous()
        state[f"blocks.{layer}.fc2.bias"] = torch.zeros(width, dtype=dtype)
    return state


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--gguf", choices=["Q8_0", "Q4_0", "Q5_1"], help="Kind of the blocks of a GGUF file.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model.safetensors" if arguments.gguf is None else "model.gguf")
        alone(write_model, path, arguments)  # its memory must not be mistaken for the reader's
        fx = WSLFeatureExtractor()
        fx({"warm.up": torch.randn(10_000)})  # what the libraries allocate once is the interpreter's own
        before, peak = memory_mb(), PeakMemory()
        start, weights, tokens = time.perf_counter(), 0, 0
        for window in fx.stream(path):
            tokens += len(window["tokens"])
            weights = window["manifest"].num_parameters
        elapsed = time.perf_counter() - start
        report = {
            **machine(),
            "parameters": weights,
            "tokens": tokens,
            "file_gb": round(path.stat().st_size / 1e9, 2),
            "anonymous_mb_before": round(before, 1),
            "anonymous_mb_above": round(peak.stop() - before, 1),
            "seconds": round(elapsed, 1),
        }
    publish(report, arguments.output)


if __name__ == "__main__":
    main()
