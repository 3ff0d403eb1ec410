"""A GPU's check and speed in one run of at most eight minutes: numerics first, then training steps.

Numerics, of a small backbone, against float32 with textbook attention on the same device: the relative error of
reconstruction and gradient with each attention kernel, in bfloat16, compiled, and sharded by FSDP2 on this one device.
Speed, of each size at the paper's batch: tokens a second, share of the matmul rate, peak memory, and the paper's hours
(Table 4) at this speed; see `training_step.py`.

python benchmarks/on_gpu.py --output results/on_gpu.json
--use_cpu runs the same on a CPU, with one small size, to see that it works.
"""

import argparse
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import machine, parser_of, publish
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_step import drawn_batch, measure

from modeling_wsl import WSLConfig, WSLForPreTraining
from trainers.distribution import whole


WINDOWS = 4  # of the numerics
# What rounding explains; a wrong kernel is off by more than all of it.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


class Numerics:
    """One small backbone in several arithmetics, each compared with float32 and textbook attention."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.config = WSLConfig.from_size("nano", noise_std=0.0, mask_ratio=0.0)
        batch = drawn_batch(self.config, WINDOWS, short=0.5)
        valid = torch.arange(self.config.token_size) < batch["valid_entries"][..., None]
        inputs = {"tokens": batch["tokens"].float(), "token_mask": valid, "positions": batch["positions"]}
        self.inputs = {name: value.to(device) for name, value in inputs.items()}
        self.valid = self.inputs["token_mask"]
        self.weights = self.model("eager").state_dict()
        self.reference = self.run(self.model("eager"))

    def model(self, attention: str) -> WSLForPreTraining:
        torch.manual_seed(0)
        model = WSLForPreTraining._from_config(self.config, attn_implementation=attention)
        for parameter in model.parameters():  # a silent decoder would hide an error
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model.to(self.device).train()

    def run(self, model: nn.Module, bfloat16: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction of what is a weight, and the gradient, each as one vector."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            output = model(**self.inputs, make_views=False)
        output.loss.backward()
        gradient = torch.cat([whole(p.grad).flatten() for p in model.parameters() if p.grad is not None])
        return output.reconstruction[self.valid].detach().float(), gradient.float()

    def compare(self, make: Callable[[], nn.Module], bfloat16: bool = False) -> dict[str, Any]:
        """Relative errors, or the error that a kernel raised."""
        try:
            found = self.run(make(), bfloat16)
        except Exception as error:  # the other kernels are still to be seen
            return {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
        errors = [
            float((value - expected).norm() / expected.norm())
            for value, expected in zip(found, self.reference, strict=True)
        ]
        limit = TOLERANCE["bfloat16" if bfloat16 else "float32"]
        return {"reconstruction": errors[0], "gradient": errors[1], "ok": max(errors) < limit}

    def compiled(self) -> nn.Module:
        return torch.compile(self.model("sdpa"))

    def sharded(self) -> nn.Module:
        model = self.model("sdpa")
        mesh = init_device_mesh(self.device.type, (1,))
        for layer in (*model.wsl.encoder.layers, *model.wsl.decoder.layers):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def all(self, compile_too: bool) -> dict[str, dict[str, Any]]:
        kinds = ["sdpa", *(["flex_attention"] if compile_too else [])]
        results = {name: self.compare(lambda name=name: self.model(name)) for name in kinds}
        results["sdpa bfloat16"] = self.compare(lambda: self.model("sdpa"), bfloat16=True)
        if compile_too:
            results["compiled"] = self.compare(self.compiled)
            results["compiled bfloat16"] = self.compare(self.compiled, bfloat16=True)
        with one_process():
            results["FSDP2"] = self.compare(self.sharded)
            results["FSDP2 bfloat16"] = self.compare(self.sharded, bfloat16=True)
        return results


class one_process:
    """A process group of this process alone."""

    def __enter__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", rank=0, world_size=1)

    def __exit__(self, *_: object) -> None:
        distributed.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # accelerate would start a group by them
            os.environ.pop(name, None)


def main() -> None:
    began = time.monotonic()
    parser = parser_of(__doc__)
    parser.add_argument("--use_cpu", action="store_true", help="on the CPU: nano alone, in small batches")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "hf-small", "hf-large"])
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="a size that is not begun by then less two is left out"
    )
    options = parser.parse_args()
    if not (options.use_cpu or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --use_cpu runs the same on the CPU")
    device = torch.device("cpu" if options.use_cpu else "cuda")
    report: dict[str, Any] = {**machine(device), "numerics": Numerics(device).all(compile_too=not options.use_cpu)}
    step = argparse.Namespace(
        batch_size=2 if options.use_cpu else 0,
        short_windows=0.0,
        rounds=1 if options.use_cpu else 7,
        plain_rounds=0,
        processor_time=False,
        optimizer="adamw_torch_fused",
        compile=False,
        activation_checkpointing=False,
        use_cpu=options.use_cpu,
    )
    report["steps"] = []
    for size in ["nano"] if options.use_cpu else options.sizes:
        if (time.monotonic() - began) / 60 > max(options.minutes - 2, options.minutes / 2):
            report["steps"].append({"size": size, "left_out": "no time"})
        else:
            report["steps"].append(measure(size, device, step))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report["minutes"] = round((time.monotonic() - began) / 60, 2)
    publish(report, options.output)


if __name__ == "__main__":
    main()
