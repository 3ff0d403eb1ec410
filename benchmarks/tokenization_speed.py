"""Tokenizing and detokenizing against memcpy, and against a plain loop over tokens, in the same run.

The claim: weights become tokens, and tokens weights, at a large share of the speed at which memory can be copied.

    python benchmarks/tokenization_speed.py --output results/tokenization_speed.json
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from hf_wsl.files import write_json
from modeling_wsl import WSLFeatureExtractor, open_checkpoint
from modeling_wsl.tokens.layout import read_tokens


def share_of_copy(function, flat: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Median time of copying `flat` over that of `function`, run in turn so that both meet the same machine.

    Returns the share and the copy's seconds; the first run of each is not counted.
    """
    copies, times = [], []
    for _ in range(repeats + 1):
        for durations, call in ((copies, lambda: torch.empty_like(flat).copy_(flat)), (times, function)):
            start = time.perf_counter()
            call()
            durations.append(time.perf_counter() - start)
    copy = statistics.median(copies[1:])
    return copy / statistics.median(times[1:]), copy


def loop_over_tokens(state: dict[str, torch.Tensor], token_size: int) -> torch.Tensor:
    """What one writes first: flatten each tensor, take it apart token by token, pad, stack."""
    tokens = []
    for tensor in state.values():
        if tensor.is_floating_point():
            flat = tensor.reshape(-1)
            for start in range(0, len(flat), token_size):
                piece = flat[start : start + token_size]
                tokens.append(torch.nn.functional.pad(piece, (0, token_size - len(piece))))
    return torch.stack(tokens)


def tokens_alone(fx: WSLFeatureExtractor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens without mask, positions and check for NaN."""
    checkpoint = open_checkpoint(state)
    manifest = fx.layout(checkpoint.tensors, checkpoint.tied, checkpoint.tensor_order)
    tokens = torch.empty(manifest.num_tokens, manifest.token_size)
    for block in manifest.blocks:
        out = tokens[block.first_token : block.end_token]
        read_tokens(out, block, 0, block.num_tokens, lambda spec: state[spec.name])
    return tokens


def measure(name: str, tokenization: str, repeats: int, folder: Path) -> dict:
    state = {k: v.contiguous() for k, v in timm.create_model(name).state_dict().items()}
    path = folder / f"{name}.safetensors"
    save_file(state, path)
    fx = WSLFeatureExtractor(tokenization=tokenization, token_size=230 if tokenization == "dense" else 288)
    features = fx(state)
    tokens, manifest = features["tokens"], features["manifest"]
    flat = torch.randn(manifest.num_parameters)

    rows = {
        "tokens, mask, positions, finite check": lambda: fx(state),
        "tokens, mask, positions": lambda: fx(state, allow_nonfinite=True),
        "tokens alone": lambda: tokens_alone(fx, state),
        "streamed from safetensors": lambda: [None for _ in fx.stream(path)],
        "decoded": lambda: fx.decode(tokens, manifest),
        "plain loop over tokens (tokens alone)": lambda: loop_over_tokens(state, fx.token_size),
    }
    shares, copies = {}, []
    for row, function in rows.items():
        share, copy = share_of_copy(function, flat, 2 if row.startswith("plain") else repeats)
        shares[row] = round(share, 3)
        copies.append(copy)
    return {
        "model": name,
        "tokenization": tokenization,
        "parameters": manifest.num_parameters,
        "tokens": manifest.num_tokens,
        "padding": round(manifest.padding, 6),
        "memcpy_gb_per_s": round(flat.nbytes / statistics.median(copies) / 1e9, 2),
        "share_of_memcpy": shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_base_patch16_224"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(name, tokenization, arguments.repeats, Path(folder))
            for name in arguments.models
            for tokenization in ("dense", "sparse")
        ]
    report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
    print(json.dumps(report, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, report)


if __name__ == "__main__":
    main()
