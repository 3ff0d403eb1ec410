"""How a model lies on its processes: whole on each of them (DistributedDataParallel), or in parts (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from hf_wsl.options import ConfigError


_SETUP = "trainers/accelerate/fsdp2_8_gpus.yaml"
_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the model only: every forward pass then needs all of them."""
    return accelerator.distributed_type == DistributedType.FSDP


def refuse_deepspeed() -> None:
    """Raises ConfigError where `accelerate launch` was told to use DeepSpeed, before accelerate looks for it."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "accelerate is set to DeepSpeed, which steps optimizers, scales losses and writes checkpoints itself; "
            f"pretraining does not run on it. FSDP2 shards as its ZeRO-3 does: {_SETUP}"
        )


def check_distribution(accelerator: Accelerator) -> None:
    """Raises ConfigError for a kind of distribution that training has no answer to."""
    if accelerator.distributed_type in _WHOLE:
        return
    if not is_sharded(accelerator):
        raise ConfigError(
            f"accelerate is set to {accelerator.distributed_type.value}, which pretraining does not run on. Use "
            f"data-parallel processes, or FSDP2: {_SETUP}"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(f"accelerate is set to the first FSDP: set fsdp_version: 2, as in {_SETUP}")
    if not plugin.cpu_ram_efficient_loading:
        # One process fits PCA, the others get the weights from it.
        raise ConfigError("accelerate's FSDP has fsdp_cpu_ram_efficient_loading: false; pretraining needs true")


def refuse_muon_in_parts(accelerator: Accelerator) -> None:
    """Raises ConfigError under FSDP2: Muon orthogonalizes whole matrices, of which a process holds rows only."""
    if is_sharded(accelerator):
        raise ConfigError(
            "option 'optimizer' is muon, which needs whole matrices, and FSDP2 leaves each process with a part of "
            "them. Use --optimizer adamw, or data-parallel processes"
        )


def spread(
    accelerator: Accelerator, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Lays the model, with the first process's weights, and its optimizer on all processes.

    Returns:
        What to call for a forward pass, and the optimizer. Under FSDP2 the model itself becomes the sharded one.
    """
    if not is_sharded(accelerator):
        return accelerator.prepare_model(model), optimizer
    # Autocast alone decides about bfloat16, as without sharding. Accelerate's own policy would also round the tokens
    # that go in and the losses that come out.
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    sharded, prepared = accelerator.prepare(model, optimizer)
    return sharded, prepared.optimizer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may lie in parts; then every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_part_of(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every process, cut as a parameter of its shape is."""
    if not isinstance(parameter, DTensor):
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_weights(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The state dict of a sharded model on the first process's CPU; None where `model` can be saved as it is.

    Every process must call it; the others get {}.
    """
    return accelerator.get_state_dict(model) if is_sharded(accelerator) else None


def all_finite(accelerator: Accelerator, parameters: Iterable[torch.Tensor]) -> bool:
    """Whether every entry of every parameter is finite, on all processes; every process must call it."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    bad = torch.stack([~part.isfinite().all() for part in parts]).any()
    return not accelerator.reduce(bad.float(), "sum").item()
