"""Generating and embedding models beside the matmuls that neither can do without, in the same run.

The goal: a backbone of 4 + 4 layers, 256 wide, generates a ResNet-18 and a ResNet-50 in 1.5 times what the matmuls of
the same forward passes take at the best rate of this machine. results/generation_speed.json: 1.8 to 2.0 times.

    python benchmarks/generation_speed.py --output results/generation_speed.json

From an anchor in memory to a state dict: plan, encoding (in haloed windows, all of whose tokens count in the limit),
draw, decoding, weights, facts. The backbone has random weights in float32 and runs in bfloat16. "Matmuls alone" are
products of the same shapes, into memory that is there; "plain" is float32, one window a pass. Processor time is that
of all threads; where other programs use the machine too, its ratio is the steadier one.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from harness import machine, parser_of, publish
from torch import nn
from transformers import pipeline

from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel
from modeling_wsl.backbone.encoding import HaloedWindows


HALO, BATCH = 64, 8
# Products tried for the best rate: rows, columns of the first, columns of the second. The last two are a layer's own.
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (5120, 256, 1024), (5120, 1024, 256))
OURS = {"token_standardization": True, "linear_path": True}


def seconds_of(function: Callable[[], Any]) -> dict[str, float]:
    """Seconds on the clock, and of all processors together."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def forward_flops(config: WSLConfig, windows: HaloedWindows) -> dict[str, int]:
    """Of the matmuls that encode, and that decode, all rows of a model; a product and a sum are two."""
    width, length = config.hidden_size, windows.row_length
    layer = 4 * width**2 + 2 * width * config.intermediate_size + 2 * length * width
    content = config.latent_size - config.num_token_statistics
    linear = config.token_size * content if config.linear_path else 0
    ends = {
        "encode": config.token_size * width + width * content,
        "decode": config.latent_size * width + width * config.token_size,
    }
    tokens = len(windows) * length
    return {name: 2 * tokens * (config.num_hidden_layers * layer + linear + end) for name, end in ends.items()}


def best_rate(repeats: int = 5) -> dict[str, float]:
    """FLOPs a second of the best bfloat16 matmul of some sizes, on the clock and by processor time."""
    rates = defaultdict(list)
    for rows, inner, columns in PRODUCTS:
        left, right = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16()
        out = left @ right
        for _ in range(repeats):
            for clock, seconds in seconds_of(lambda: torch.mm(left, right, out=out)).items():  # noqa: B023
                rates[clock].append(2 * rows * inner * columns / seconds)
    return {clock: max(values) for clock, values in rates.items()}


def matmuls_alone(config: WSLConfig, windows: HaloedWindows, halves: int) -> Callable[[], None]:
    """The products of the passes that encode and, with 2 halves, decode all rows, by their shapes, batch by batch."""
    width, inner, length = config.hidden_size, config.intermediate_size, windows.row_length
    content = config.latent_size - config.num_token_statistics
    layer = [(width, width)] * 4 + [(width, inner), (inner, width)]
    ends = [[(config.token_size, width), (width, content)], [(config.latent_size, width), (width, config.token_size)]]
    if config.linear_path:
        ends = [[*ends[0], (config.token_size, content)], [*ends[1], (content, config.token_size)]]
    shapes = [layer * config.num_hidden_layers + end for end in ends[:halves]]
    inputs = {size: torch.randn(BATCH * length, size).bfloat16() for half in shapes for size, _ in half}
    outputs = {size: torch.empty(BATCH * length, size).bfloat16() for half in shapes for _, size in half}
    weights = {shape: torch.randn(*reversed(shape)).bfloat16() for half in shapes for shape in half}
    query = torch.randn(config.num_attention_heads, length, width // config.num_attention_heads).bfloat16()
    scores, attended = query @ query.mT, torch.empty_like(query)

    def multiply() -> None:
        for half in shapes:
            for first in range(0, len(windows), BATCH):
                rows = min(BATCH, len(windows) - first)
                for shape in half:
                    into = outputs[shape[1]][: rows * length]
                    torch.mm(inputs[shape[0]][: rows * length], weights[shape].T, out=into)
                for _ in range(rows * config.num_hidden_layers):
                    torch.bmm(query, query.mT, out=scores)
                    torch.bmm(scores, query, out=attended)

    return multiply


def median_ratios(runs: list[dict[str, float]], limits: list[dict[str, float]]) -> dict[str, float]:
    """Of what was measured beside what was measured next to it; `processor` by processor time."""
    return {
        clock: round(statistics.median(run[clock] / limit[clock] for run, limit in zip(runs, limits, strict=True)), 3)
        for clock in ("wall", "processor")
    }


def median_seconds(runs: list[dict[str, float]]) -> dict[str, float]:
    return {clock: round(statistics.median(run[clock] for run in runs), 3) for clock in ("wall", "processor")}


def measure(name: str, heads: int, options: dict[str, Any], repeats: int, plain: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    config = WSLConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=heads, **options)
    anchor: nn.Module = timm.create_model(name)
    parts = {"model": WSLModel(config).eval(), "feature_extractor": WSLFeatureExtractor(), "device": "cpu"}
    generator = pipeline("weight-generation", progress=False, **parts)
    embedder = pipeline("weight-embedding", progress=False, pooling="mean", **parts)
    manifest = parts["feature_extractor"].manifest(anchor)
    windows = HaloedWindows(manifest.num_tokens, config.window_size, HALO)
    flops = forward_flops(config, windows)

    def generate(num_samples: int = 1, dtype: str | None = "bfloat16", batch_size: int = BATCH) -> None:
        generator(name, anchors=[anchor], num_samples=num_samples, autocast_dtype=dtype, batch_size=batch_size)

    def embed() -> None:
        embedder(anchor, autocast_dtype="bfloat16", batch_size=BATCH)

    shapes = {"generation": matmuls_alone(config, windows, 2), "embedding": matmuls_alone(config, windows, 1)}
    work = {"generation": sum(flops.values()), "embedding": flops["encode"]}
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for round_number in range(repeats + 1):  # the first is not counted
        rates = [best_rate()]
        once = seconds_of(generate)
        embedding = seconds_of(embed)
        rates.append(best_rate())
        multiplied = {task: seconds_of(multiply) for task, multiply in shapes.items()}
        if round_number == 0:
            continue
        runs["generation"].append(once)
        runs["embedding"].append(embedding)
        for task, multiplied_seconds in multiplied.items():
            runs[f"{task} matmuls"].append(multiplied_seconds)
            limit = {clock: work[task] / max(rate[clock] for rate in rates) for clock in rates[0]}
            runs[f"{task} limit"].append(limit)
    once, five = median_seconds(runs["generation"]), seconds_of(lambda: generate(5))
    row = {
        "model": name,
        "layers_a_side": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": heads,
        "options": options,
        "parameters": manifest.num_parameters,
        "tokens": manifest.num_tokens,
        "tokens_with_halos": len(windows) * windows.row_length,
        "teraflops": {task: round(value / 1e12, 4) for task, value in work.items()},
        "seconds": {task: median_seconds(seconds) for task, seconds in runs.items()},
        "ratio_to_limit": {task: median_ratios(runs[task], runs[f"{task} limit"]) for task in work},
        "ratio_to_matmuls_alone": {task: median_ratios(runs[task], runs[f"{task} matmuls"]) for task in work},
        "seconds_of_each_further_draw": {clock: round((five[clock] - once[clock]) / 4, 3) for clock in once},
    }
    if plain:
        seconds = seconds_of(lambda: generate(dtype=None, batch_size=1))
        row["plain"] = {clock: round(value, 2) for clock, value in seconds.items()}
        row["times_faster_than_plain"] = {clock: round(seconds[clock] / once[clock], 2) for clock in once}
    return row


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--heads", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--ours", action="store_true", help="Tokens standardized, and a linear path, as in our sizes.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-plain", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    options = OURS if arguments.ours else {}
    results = [
        measure(name, heads, options, arguments.repeats, not arguments.no_plain)
        for name in arguments.models
        for heads in arguments.heads
    ]
    report = {
        **machine(),
        "batch_size": BATCH,
        "results": results,
    }
    publish(report, arguments.output)


if __name__ == "__main__":
    main()
