"""Seconds in float32, bfloat16 and whichever of the two `auto` takes, of all that runs a backbone.

    python benchmarks/precision.py --output results/precision.json
    ONEDNN_MAX_CPU_ISA=AVX512_CORE python benchmarks/precision.py --output results/precision_without_units.json

The second line is for a CPU with matrix units for bfloat16 and keeps torch from using them.

- embedding (the backbone's mean; the default embedding, which needs no backbone, once) and generating a ResNet-18 and
  a ResNet-50 of random weights with the default backbone, from a state dict in memory; `auto` with the time that its
  choice takes. Shares are of the rate of a large matmul in either arithmetic, matmuls and attention of the backbone
  counted (a generated model goes through both halves).
- a training step by our trainer in each, beside a plain one and one of the form of the paper's code
  (`training_step.py`), for nano, tiny and two layers a side of hf-small.

The fastest of some rounds counts. Where others use the machine: --threads 1 --processor-time.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import transformers
from accelerate.state import AcceleratorState
from harness import machine, parser_of, publish
from torch.utils.flop_counter import FlopCounterMode
from training_step import drawn_batch, large_matmul, make_trainer, one_step, plain_step, two_passes_step

from modeling_wsl import WSLConfig, WSLModel
from modeling_wsl.backbone.encoding import HaloedWindows
from modeling_wsl.backbone.precision import choose_precision
from modeling_wsl.loading import load_pipeline


PRECISIONS = ("float32", "bfloat16", "auto")
HALO = 64
BATCHES = {"nano": 16, "tiny": 8, "hf-small": 2}  # windows of a step
CPU = torch.device("cpu")


def fastest(functions: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each function in its fastest round, all in turn."""
    seconds = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            began = clock()
            function()
            seconds[name] = min(seconds[name], clock() - began)
    return seconds


def summary(seconds: dict[str, float]) -> dict[str, Any]:
    """Rounded, and how much longer `auto` takes than the better one of the two that it chooses from."""
    above = seconds["auto"] / min(seconds["float32"], seconds["bfloat16"]) - 1
    return {"seconds": {name: round(value, 3) for name, value in seconds.items()}, "auto_above": round(above, 3)}


def operations_of_a_row(model: WSLModel, length: int) -> dict[str, int]:
    """Of one window with its halo: through the encoder, and through both halves."""
    tokens = torch.randn(1, length, model.config.token_size)
    mask, positions = torch.ones_like(tokens, dtype=torch.bool), torch.zeros(1, length, 3, dtype=torch.long)
    config, counted = model.config, {}
    attention = (
        4 * length**2 * config.hidden_size * config.num_hidden_layers
    )  # which the counter does not know on CPUs
    passes = {
        "embedding": lambda: model.token_features(tokens, mask, positions),
        "generating": lambda: model.code.refine(model, tokens, mask, positions),
    }
    for stacks, (task, run) in enumerate(passes.items(), start=1):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        counted[task] = counter.get_total_flops() + stacks * attention
    return counted


def measure_model(name: str, rates: dict[str, float], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    torch.manual_seed(0)
    state = timm.create_model(name).state_dict()
    embedder, generator = load_pipeline("weight-embedding"), load_pipeline("weight-generation")
    windows = HaloedWindows(
        embedder.feature_extractor.manifest(state).num_tokens, embedder.model.config.window_size, HALO
    )
    operations = operations_of_a_row(embedder.model, windows.row_length)

    def with_choice(task: str, precision: str) -> Callable[[], None]:
        def run() -> None:
            if precision == "auto":
                choose_precision.cache_clear()  # as the first call of a process
            if task == "embedding":
                embedder(state, progress=False, precision=precision, pooling="mean")
            else:
                generator(name, anchors=[state], num_samples=1, progress=False, precision=precision)

        return run

    row: dict[str, Any] = {"model": name, "tokens": windows.num_tokens}
    default = fastest({"default": lambda: embedder(state, progress=False)}, rounds, clock)
    row["default_embedding_seconds"] = round(default["default"], 3)
    for task, one in operations.items():
        seconds = fastest({each: with_choice(task, each) for each in PRECISIONS}, rounds, clock)
        total = one * len(windows)
        share = {kind: round(total / rate / seconds["auto"], 3) for kind, rate in rates.items()}
        row[task] = {"teraflop": round(total / 1e12, 3), **summary(seconds), "auto_share_of_rate": share}
    return row


def measure_step(size: str, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    cut = {"num_hidden_layers": 2} if size.startswith("hf-") else {}
    config, seconds = WSLConfig.from_size(size, **cut), {}
    batch = drawn_batch(config, BATCHES[size], short=0.0)
    options = argparse.Namespace(
        optimizer="adamw_torch_fused", use_cpu=True, compile=False, activation_checkpointing=False
    )
    for precision in PRECISIONS:
        AcceleratorState._reset_state(reset_partial_state=True)
        chosen = choose_precision("cpu", config.hidden_size)[0] if precision == "auto" else precision
        step = partial(one_step, make_trainer(config, BATCHES[size], options, chosen), batch)
        step()
        seconds |= fastest({precision: step}, rounds, clock)
    for name, make in {"plain": plain_step, "two passes": two_passes_step}.items():
        step = make(config, batch, CPU)
        step()
        seconds |= fastest({name: step}, rounds, clock)
    return {"size": size, "layers_a_side": config.num_hidden_layers, "windows": BATCHES[size], **summary(seconds)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="*", default=["resnet18", "resnet50"])
    parser.add_argument("--sizes", nargs="*", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0 = as torch finds them")
    parser.add_argument("--processor-time", action="store_true", help="the process's own time; with one thread")
    options = parser.parse_args()
    if options.processor_time and options.threads != 1:
        parser.error("--processor-time adds up what all threads take: give --threads 1 with it")
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    clock = time.process_time if options.processor_time else time.perf_counter
    rates = {}
    for kind in (torch.float32, torch.bfloat16):
        multiply, operations = large_matmul(CPU, kind)
        multiply()
        rates[str(kind).removeprefix("torch.")] = operations / fastest({"large": multiply}, 5, clock)["large"]
    report = {
        **machine(),
        "clock": "processor time" if options.processor_time else "wall time",
        "large_matmul_tflop_per_s": {kind: round(rate / 1e12, 3) for kind, rate in rates.items()},
        "chosen": choose_precision("cpu", 384)[0],
        "models": [measure_model(name, rates, options.rounds, clock) for name in options.models],
        "steps": [measure_step(size, options.rounds, clock) for size in options.sizes],
    }
    publish(report, options.output)


if __name__ == "__main__":
    main()
