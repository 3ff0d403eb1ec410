"""Tokenizing and detokenizing against memcpy, and against a plain loop over tokens, in the same run.

The claim: weights become tokens, and tokens weights, at a large share of the speed at which memory can be copied.

    python benchmarks/tokenization_speed.py --output results/tokenization_speed.json
"""

import tempfile
from pathlib import Path
from statistics import median

import timm
import torch
from harness import in_turn, machine, medians, parser_of, publish
from safetensors.torch import save_file

from modeling_wsl import WSLFeatureExtractor, open_checkpoint
from modeling_wsl.tokens.layout import read_tokens


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
    manifest = fx.layout_of(checkpoint)
    tokens = torch.empty(manifest.num_tokens, manifest.token_size)
    for block in manifest.blocks:
        out = tokens[block.first_token : block.end_token]
        read_tokens(out, block, 0, block.num_tokens, lambda spec, a, b: state[spec.name].view(-1)[a:b])
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
        pair = {"copy": lambda: torch.empty_like(flat).copy_(flat), "row": function}
        seconds = medians(in_turn(pair, 2 if row.startswith("plain") else repeats))
        shares[row] = round(seconds["copy"] / seconds["row"], 3)
        copies.append(seconds["copy"])
    return {
        "model": name,
        "tokenization": tokenization,
        "parameters": manifest.num_parameters,
        "tokens": manifest.num_tokens,
        "padding": round(manifest.padding, 6),
        "memcpy_gb_per_s": round(flat.nbytes / median(copies) / 1e9, 2),
        "share_of_memcpy": shares,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_base_patch16_224"])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(name, tokenization, arguments.repeats, Path(folder))
            for name in arguments.models
            for tokenization in ("dense", "sparse")
        ]
    report = {**machine(), "results": results}
    publish(report, arguments.output)


if __name__ == "__main__":
    main()
