"""How close a pretraining step comes to the rate of the matmuls that it consists of.

The step is the trainer's own (`PretrainTrainer`: two views, bfloat16 autocast, backward, clipping, optimizer) on drawn
tokens. In turn with it, so that all meet the same machine:
- limit: the step's floating-point operations at the rate of one large bfloat16 matmul. Counted are matmuls and
  attention, forward and backward; what a kernel recomputes, and everything else, is not.
- own matmuls: exactly the step's matmuls, of the same shapes, in bfloat16, attention's batched, and nothing between.
- plain: what one writes first: float32, textbook attention, AdamW and clipping one tensor at a time.
- two passes: the form of the paper's code: as plain, each view through the model on its own, torch's attention.
Shares are given of the float32 rate of a large matmul too: on a CPU without matrix units it is the higher one.

python benchmarks/training_step.py --sizes nano tiny hf-small --output results/training_step.json
On a GPU hf-small and hf-large are whole, and the hours of the paper's runs (Table 4) at this speed stand beside its
own. On a CPU they have 2 layers a side. On a machine shared with others: --threads 1 --processor-time.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from harness import in_turn, machine, medians, parser_of, publish
from torch import nn

from modeling_wsl import WSLConfig, WSLForPreTraining
from modeling_wsl.backbone.losses import nt_xent, reconstruction_loss
from modeling_wsl.backbone.stack import WSLAttention
from modeling_wsl.backbone.views import two_views
from trainers.data.windows.dataset_source import SplitSize
from trainers.pretraining.pretrain_config import PretrainConfig
from trainers.pretraining.pretrain_trainer import PretrainTrainer


LIMIT_SIDE = {"cpu": 2048, "cuda": 8192}  # of the large matmul
BATCHES = {"nano": (16, 64), "tiny": (32, 64), "hf-small": (2, 64), "hf-large": (2, 64)}  # windows on a CPU, on a GPU
# The paper's: epochs, accumulation, hours on one H100 (Table 4), and tokens in windows of 4096 (section D.3).
PAPER_RUNS = {"hf-small": [(100, 54), (300, 144)], "hf-large": [(300, 198)]}
PAPER_CROPS_PER_EPOCH = 600e6 / 4096


class DrawnWindows:
    """Stands where the trainer takes its training windows: it asks a benchmark for their number only."""

    size = SplitSize(1024, 1024 * 4096)

    def __len__(self) -> int:
        return self.size.windows


def drawn_batch(config: WSLConfig, batch_size: int, short: float) -> dict[str, torch.Tensor]:
    """A batch as the dataset gives it: every 20th token is the padded end of a layer.

    Args:
        short: share of the windows that are half empty.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config.window_size)
    tokens = 0.05 * torch.randn(*shape, config.token_size, generator=generator)
    valid = torch.full(shape, config.token_size)
    valid[:, ::20] = config.token_size // 2
    valid[: round(short * batch_size), config.window_size // 2 :] = 0
    tokens *= torch.arange(config.token_size) < valid[..., None]
    n = torch.arange(config.window_size) + torch.randint(0, 1_000_000, (batch_size, 1), generator=generator)
    return {
        "tokens": tokens.half(),
        "valid_entries": valid.int(),
        "positions": torch.stack([n, n // 1000, n % 1000], dim=-1),
    }


def matmul_shapes(
    config: WSLConfig, batch: dict[str, torch.Tensor], options: argparse.Namespace
) -> list[tuple[int, int, int, int, int]]:
    """Every product of one step as (batch, m, k, n, times): linear maps, their two gradients, attention's six."""
    plain = argparse.Namespace(**{**vars(options), "compile": False, "activation_checkpointing": False})
    trainer = make_trainer(config, len(batch["tokens"]), plain)
    shapes: list[tuple[int, int, int, int, int]] = []

    def of_linear(module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        rows, k, n = inputs[0].numel() // module.in_features, module.in_features, module.out_features
        shapes.extend([(1, rows, k, n, 1), (1, k, rows, n, 1)])
        if inputs[0].requires_grad:
            shapes.append((1, rows, n, k, 1))

    def of_attention(module: WSLAttention, inputs: tuple[torch.Tensor], output: Any) -> None:
        rows, tokens, width = inputs[0].shape
        heads, depth = width // module.head_dim, module.head_dim
        shapes.append((rows * heads, tokens, depth, tokens, 2))  # scores, and the gradient of the attention
        shapes.append((rows * heads, tokens, tokens, depth, 4))  # the output, the gradients of value, query and key

    kinds = {nn.Linear: of_linear, WSLAttention: of_attention}
    for module in trainer.model.modules():
        if type(module) in kinds:
            module.register_forward_hook(kinds[type(module)])
    one_step(trainer, batch)
    return shapes


def operations(shapes: list[tuple[int, int, int, int, int]]) -> int:
    return sum(2 * batch * m * k * n * times for batch, m, k, n, times in shapes)


def own_matmuls(shapes: list[tuple[int, int, int, int, int]], device: torch.device) -> Callable[[], None]:
    """A function that multiplies matrices of these shapes; attention's windows a few at a time, as in the model."""
    operands = {}
    for batch, m, k, n, _ in set(shapes):
        some = max(1, min(batch, 6_000_000 // (m * n))) if device.type == "cpu" else batch
        pair = (torch.randn(some, *side, device=device).bfloat16() for side in ((m, k), (k, n)))
        operands[batch, m, k, n] = (*(x[0] if batch == 1 else x for x in pair), batch / some)

    def run() -> None:
        for batch, m, k, n, times in shapes:
            left, right, chunks = operands[batch, m, k, n]
            for _ in range(round(times * chunks)):
                left @ right

    return run


def large_matmul(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Callable[[], None], int]:
    """A function that multiplies two large matrices, and its floating-point operations."""
    if device.type not in LIMIT_SIDE:
        raise SystemExit(f"This measures CPUs and CUDA devices, not {device.type}.")
    side = LIMIT_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right, 2 * side**3


def plain_step(config: WSLConfig, batch: dict[str, torch.Tensor], device: torch.device) -> Callable[[], None]:
    """The step in float32 with textbook attention."""
    return _float32_step(config, batch, device, "eager", lambda model, inputs: model(**inputs).loss)


def two_passes_step(config: WSLConfig, batch: dict[str, torch.Tensor], device: torch.device) -> Callable[[], None]:
    """The step in float32 with a pass of its own for each of the two views."""

    def loss_of(model: WSLForPreTraining, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        views, targets = two_views(
            inputs["tokens"], inputs["token_mask"], config.noise_std, config.mask_ratio, config.denoise
        )
        attended = inputs["token_mask"].any(-1)
        losses, projections = [], []
        for view, target in zip(views.chunk(2), targets.chunk(2), strict=True):
            output = model.wsl(**{**inputs, "tokens": view})
            losses.append(reconstruction_loss(output.reconstruction, target, inputs["token_mask"]))
            projections.append(model.projection(output.features, attended))
        contrast = nt_xent(torch.cat(projections), config.temperature)
        return (1 - config.contrastive_weight) * sum(losses) / 2 + config.contrastive_weight * contrast

    return _float32_step(config, batch, device, "sdpa", loss_of)


def _float32_step(
    config: WSLConfig,
    batch: dict[str, torch.Tensor],
    device: torch.device,
    attention: str,
    loss_of: Callable[[WSLForPreTraining, dict[str, torch.Tensor]], torch.Tensor],
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = WSLForPreTraining._from_config(config, attn_implementation=attention).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)

    def run() -> None:
        tokens, valid, positions = (batch[name].to(device) for name in ("tokens", "valid_entries", "positions"))
        mask = torch.arange(config.token_size, device=device) < valid[..., None]
        loss_of(model, {"tokens": tokens.float(), "token_mask": mask, "positions": positions}).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()

    return run


def make_trainer(
    config: WSLConfig, batch_size: int, options: argparse.Namespace, precision: str = "bfloat16"
) -> PretrainTrainer:
    """A trainer that is ready for `one_step`."""
    torch.manual_seed(0)
    model = WSLForPreTraining._from_config(config)
    run = PretrainConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        max_steps=1000,
        max_grad_norm=1.0,
        optim=options.optimizer,
        precision=precision,
        use_cpu=options.use_cpu,
        torch_compile=options.compile,
    )
    trainer = PretrainTrainer(model, run, DrawnWindows())
    if options.activation_checkpointing:
        model.activation_checkpointing_enable()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(model, trainer.create_optimizer())
    return trainer


def one_step(trainer: PretrainTrainer, batch: dict[str, torch.Tensor]) -> None:
    """What `Trainer` does for an optimizer step of one pass."""
    passes, counted = trainer.get_batch_samples(iter([batch]), 1, trainer.accelerator.device)
    trainer.training_step(trainer.model_wrapped, passes[0], counted)
    trainer._clip_grad_norm(trainer.model_wrapped)
    trainer.optimizer.step()
    trainer.model_wrapped.zero_grad()


def peak_memory_of_a_step(trainer: PretrainTrainer, batch: dict[str, torch.Tensor], device: torch.device) -> float:
    """GB that the second step takes at most: the first one makes the optimizer's state."""
    one_step(trainer, batch)
    torch.cuda.reset_peak_memory_stats(device)
    one_step(trainer, batch)
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)


def measure(size: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    cut = {"num_hidden_layers": 2} if size.startswith("hf-") and not on_gpu else {}
    config = WSLConfig.from_size(size, **cut)
    batch_size = options.batch_size or BATCHES[size][on_gpu]
    batch = drawn_batch(config, batch_size, options.short_windows)
    trainer = make_trainer(config, batch_size, options)
    shapes = matmul_shapes(config, batch, options)
    total = operations(shapes)
    peak = peak_memory_of_a_step(trainer, batch, device) if on_gpu else None  # before the operands of the limits exist
    multiply, multiply_operations = large_matmul(device)
    functions = {
        "large_matmul": multiply,
        "large_float32_matmul": large_matmul(device, torch.float32)[0],
        "own_matmuls": own_matmuls(shapes, device),
        "step": lambda: one_step(trainer, batch),
    }
    clock = time.process_time if options.processor_time else time.perf_counter
    seconds = medians(in_turn(functions, options.rounds, clock, device))
    plain = two_passes = None
    if options.plain_rounds:
        functions = {"step": lambda: one_step(trainer, batch), "plain": plain_step(config, batch, device)}
        functions["two_passes"] = two_passes_step(config, batch, device)
        both = medians(in_turn(functions, options.plain_rounds, clock, device))
        plain, two_passes = (round(both[name] / both["step"], 2) for name in ("plain", "two_passes"))
    rate = multiply_operations / seconds["large_matmul"]
    step = seconds["step"]
    crops = batch_size / step
    row = {
        "size": size,
        "layers_a_side": config.num_hidden_layers,
        "parameters": trainer.num_parameters,
        "batch": batch_size,
        "window": config.window_size,
        "short_windows": options.short_windows,
        "operations_per_step": total,
        "attention_share_of_operations": round(operations([s for s in shapes if s[0] > 1]) / total, 3),
        "large_matmul_tflop_per_s": round(rate / 1e12, 3),
        "step_s": round(step, 4),
        "limit_s": round(total / rate, 4),
        "own_matmuls_s": round(seconds["own_matmuls"], 4),
        "share_of_matmul_limit": round(total / rate / step, 3),
        "float32_matmul_tflop_per_s": round(multiply_operations / seconds["large_float32_matmul"] / 1e12, 3),
        "share_of_float32_limit": round(total * seconds["large_float32_matmul"] / multiply_operations / step, 3),
        "own_matmuls_share_of_step": round(seconds["own_matmuls"] / step, 3),
        "plain_over_step": plain,
        "two_passes_over_step": two_passes,
        "tokens_per_s": round(crops * config.window_size, 1),
        "crops_per_s": round(crops, 2),
        "peak_gpu_memory_gb": peak,
    }
    if on_gpu and size in PAPER_RUNS:
        row["paper_runs"] = [
            {
                "epochs": epochs,
                "paper_hours_h100": hours,
                "projected_hours": round(epochs * PAPER_CROPS_PER_EPOCH / crops / 3600, 1),
            }
            for epochs, hours in PAPER_RUNS[size]
        ]
    return row


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["nano", "tiny", "hf-small"], choices=list(BATCHES))
    parser.add_argument("--batch-size", type=int, default=0, help="windows; 0 = the recipe's, less for hf on a CPU")
    parser.add_argument("--short-windows", type=float, default=0.0, help="share of the windows that are half empty")
    parser.add_argument("--optimizer", choices=("adamw_torch_fused", "muon"), default="adamw_torch_fused")
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU where a GPU is present")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as --torch_compile of the trainer")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plain-rounds", type=int, default=1, help="0 = without the plain version")
    parser.add_argument("--threads", type=int, default=0, help="0 = as torch finds them")
    parser.add_argument("--processor-time", action="store_true", help="the process's own time; with one thread")
    options = parser.parse_args()
    if options.processor_time and options.threads != 1:
        parser.error("--processor-time adds up what all threads take: give --threads 1 with it")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = Accelerator(cpu=options.use_cpu).device
    results = [measure(size, device, options) for size in options.sizes]
    report = {
        **machine(device),
        "clock": "processor time" if options.processor_time else "wall time",
        "transformers": transformers.__version__,
        "optimizer": options.optimizer,
        "compiled": options.compile,
        "activation_checkpointing": options.activation_checkpointing,
        "results": results,
    }
    publish(report, options.output)


if __name__ == "__main__":
    main()
