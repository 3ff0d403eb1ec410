"""How a model lies on its processes: whole on each of them (DistributedDataParallel), or in parts (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_wsl.options import ConfigError


_SETUP = "trainers/accelerate/fsdp2_8_gpus.yaml"
_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the model only: every forward pass then needs all of them."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_distribution(accelerator: Accelerator) -> None:
    """Sets up FSDP2, and raises ConfigError for a kind of distribution that training has no answer to."""
    if accelerator.distributed_type in (*_WHOLE, DistributedType.DEEPSPEED):
        return
    if not is_sharded(accelerator):
        raise ConfigError(
            f"accelerate is set to {accelerator.distributed_type.value}, which training does not run on. Use "
            f"data-parallel processes, or FSDP2: {_SETUP}"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(f"accelerate is set to the first FSDP: set fsdp_version: 2, as in {_SETUP}")
    if not plugin.cpu_ram_efficient_loading:
        # One process fits PCA, the others get the weights from it.
        raise ConfigError("accelerate's FSDP has fsdp_cpu_ram_efficient_loading: false; training needs true")
    # Autocast alone decides about bfloat16, as without sharding. Accelerate's own policy would also round the tokens
    # that go in and the losses that come out.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def refuse_muon_in_parts(accelerator: Accelerator) -> None:
    """Raises ConfigError under FSDP2: Muon orthogonalizes whole matrices, of which a process holds rows only."""
    if is_sharded(accelerator):
        raise ConfigError(
            "option 'optim' is muon, which needs whole matrices, and FSDP2 leaves each process with a part of "
            "them. Use --optim adamw_torch_fused, or data-parallel processes"
        )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may lie in parts; then every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_part_of(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every process, cut and laid out as a parameter of its shape is."""
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
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
