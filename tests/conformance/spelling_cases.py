"""One network in the spellings that people save it in, and constants beside weights."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from case import Case, Made, State
from safetensors.torch import save_file
from torch import nn


SPELLINGS, CONSTANTS = "One network in many spellings", "Constants beside weights"


def resnet() -> State:
    import timm

    torch.manual_seed(0)
    return dict(timm.create_model("test_resnet", num_classes=5).state_dict())


def gpt2() -> State:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    return dict(GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=12)).state_dict())


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def torch_file(folder: Path, content: object, state: State, name: str = "weights.pt") -> Made:
    torch.save(content, folder / name)
    return folder / name, state


def of_model(folder: Path, wrap: Callable[[nn.Module], nn.Module]) -> Made:
    """What the wrapper itself calls the tensors."""
    import timm

    torch.manual_seed(0)
    state = dict(wrap(timm.create_model("test_resnet", num_classes=5)).state_dict())
    return torch_file(folder, state, state)


def lightning(folder: Path) -> Made:
    state = prefixed(resnet(), "model.") | {"criterion.weight": torch.ones(5)}
    content = {"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}}
    return torch_file(folder, content, state, "last.ckpt")


def compiled_ddp(folder: Path) -> Made:
    state = prefixed(resnet(), "module._orig_mod.")
    return torch_file(folder, {"model": state, "epoch": 3}, state)


def sorted_file(folder: Path) -> Made:
    state = {name: tensor.contiguous() for name, tensor in sorted(prefixed(resnet(), "backbone.").items())}
    save_file(state, folder / "model.safetensors")
    return folder, state


def convolution(norm: Callable[[nn.Module], nn.Module] | None) -> State:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3))
    for layer in (model[0], model[2]):
        if norm is not None:
            norm(layer)
    return dict(model.state_dict())


def weight_norm(folder: Path) -> Made:
    state = convolution(nn.utils.parametrizations.weight_norm)
    return torch_file(folder, state, state)


def old_weight_norm() -> State:
    """The names of the hook that came before parametrizations."""
    renamed = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = convolution(nn.utils.parametrizations.weight_norm)
    for new, old in renamed.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    return state


def old_norms(folder: Path) -> Made:
    state = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in norms().items()}
    return torch_file(folder, state, state)


def norms() -> State:
    torch.manual_seed(0)
    return {f"layer.{i}.LayerNorm.{leaf}": torch.rand(8) for i in range(2) for leaf in ("weight", "bias")} | {
        "layer.0.dense.weight": torch.randn(8, 8)
    }


def experts(form: str) -> State:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (4, 24, 16), "up_proj": (4, 24, 16), "down_proj": (4, 16, 24)}
    stacks = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    at = "model.layers.0.mlp.experts"
    rest = {"model.layers.0.mlp.gate.weight": torch.ones(4, 16), "model.norm.weight": torch.ones(16)}
    if form == "split":
        split = {f"{at}.{e}.{name}.weight": stack[e].clone() for e in range(4) for name, stack in stacks.items()}
        return rest | split
    fused = torch.cat([stacks["gate_proj"], stacks["up_proj"]], 1)
    if form == "transposed":
        return rest | {
            f"{at}.gate_up_proj": fused.mT.contiguous(),
            f"{at}.down_proj": stacks["down_proj"].mT.contiguous(),
        }
    return rest | {f"{at}.gate_up_proj": fused, f"{at}.down_proj": stacks["down_proj"]}


def stacked(folder: Path, form: str) -> Made:
    save_file(experts(form), folder / "model.safetensors")
    return folder, experts(form)


def mixtral(folder: Path) -> Made:
    """Mixtral as `save_pretrained` writes it: experts split, under names of their own."""
    from safetensors.torch import load_file

    mixture().save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


def mixture() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4, vocab_size=40))


def adapter_factors(change: torch.Tensor | None = None) -> State:
    generator, state = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        a, b = torch.randn(4, 16, generator=generator), torch.randn(8, 4, generator=generator)
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        if change is not None:
            a, b = change @ a, b @ change.inverse()
        state |= {f"{at}.lora_A.weight": a.contiguous(), f"{at}.lora_B.weight": b.contiguous()}
    return state


def refactored(folder: Path) -> Made:
    state = adapter_factors(torch.tensor([[2.0, 1, 0, 0], [0, 1, 0, 1], [1, 0, 3, 0], [0, 0, 1, 1]]))
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return folder, state


def kohya_of(state: State) -> State:
    """A file of kohya's scripts, of an adapter for a diffusion model; alpha is the rank, so that its scale is 1."""
    renamed: State = {}
    for name, tensor in state.items():
        module, side = name.removeprefix("unet.").rsplit(".lora_", 1)
        flat = f"lora_unet_{module.replace('.', '_')}"
        renamed[f"{flat}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = tensor
        renamed[f"{flat}.alpha"] = torch.tensor(4.0)
    return renamed


def diffusion_adapter() -> State:
    places = [f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_q" for i in range(2)]
    tensors = list(adapter_factors().values())
    return {f"{place}.lora_{side}.weight": tensors.pop(0) for place in places for side in "AB"}


def kohya(folder: Path) -> Made:
    state = kohya_of(diffusion_adapter())
    save_file(state, folder / "style.safetensors", {"ss_network_dim": "4"})
    return folder / "style.safetensors", state


def widened(folder: Path) -> Made:
    state = {
        name: tensor.half().float() if tensor.is_floating_point() else tensor for name, tensor in resnet().items()
    }
    return torch_file(folder, state, state)


def half() -> State:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in resnet().items()}


def causal_masks(folder: Path) -> Made:
    """GPT-2 as releases up to 4.30 saved it, under the name of its head's model."""
    state = gpt2()
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(12, 12).tril()[None, None]
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    state = prefixed(state, "transformer.") | {"lm_head.weight": state["wte.weight"].clone()}
    return torch_file(folder, state, state, "pytorch_model.bin")


def swin() -> State:
    import timm

    torch.manual_seed(0)
    options = {"num_classes": 3, "img_size": 32, "window_size": 2, "depths": (2,), "num_heads": (1,), "embed_dim": 8}
    return dict(timm.create_model("swin_tiny_patch4_window7_224", **options).state_dict())


def swin_masks(folder: Path) -> Made:
    mask = torch.zeros(16, 4, 4)
    mask[1::2, :, 3] = -100.0
    index = torch.arange(16).view(4, 4)
    state = swin() | {"layers.0.blocks.1.attn_mask": mask, "layers.0.blocks.0.attn.relative_position_index": index}
    return torch_file(folder, state, state)


def llama() -> State:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.attention.wq.weight": torch.randn(16, 16, generator=generator) for i in range(2)}


def rotary(folder: Path) -> Made:
    angles = torch.arange(12)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    state = llama() | {"freqs_cos": angles.cos(), "freqs_sin": angles.sin(), "rope.freqs": 10.0 ** -torch.arange(4)}
    state |= {"layers.0.attention.inner_attention.rotary_emb.inv_freq": 10000 ** -(torch.arange(0, 8, 2) / 8)}
    return torch_file(folder, state, state)


def infinite_mask(folder: Path) -> Made:
    state = llama() | {"attn_mask": torch.full((8, 8), -math.inf).triu(1), "embeddings.position_ids": torch.arange(8)}
    return torch_file(folder, state, state)


def detector(folder: Path) -> Made:
    weights = llama()
    state = weights | {"model.9.anchors": torch.rand(3, 3, 2), "model.9.stride": torch.tensor([8.0, 16.0, 32.0])}
    state |= {"pixel_mean": torch.rand(3, 1, 1), "pixel_std": torch.rand(3, 1, 1)}
    return torch_file(folder, state, state)


def schedule(folder: Path) -> Made:
    betas = torch.linspace(1e-4, 0.02, 20)
    state = prefixed(llama(), "model.diffusion_model.") | {"betas": betas, "alphas_cumprod": (1 - betas).cumprod(0)}
    return torch_file(folder, {"state_dict": state, "global_step": 7}, state, "model.ckpt")


def spelling(
    name: str, layout: str, maker: str, make: Callable[[Path], Made], same_as: Callable = resnet, **more
) -> Case:
    return Case(name, SPELLINGS, layout, maker, make, same_as=same_as, **more)


def constant(name: str, layout: str, maker: str, make: Callable[[Path], Made], same_as: Callable, *says: str) -> Case:
    return Case(name, CONSTANTS, layout, maker, make, says=("constants: ", *says), same_as=same_as)


CASES = [
    spelling("prefix-compiled", "a model of torch.compile", "torch", partial(of_model, wrap=torch.compile)),
    spelling(
        "prefix-averaged", "an AveragedModel", "torch", partial(of_model, wrap=torch.optim.swa_utils.AveragedModel)
    ),
    spelling("prefix-ddp-compiled", "a compiled model under DDP, in a checkpoint", "by hand", compiled_ddp),
    spelling("prefix-lightning", "a LightningModule with a loss of its own", "by hand", lightning),
    spelling("prefix-sorted", "under `backbone.`, sorted by name", "safetensors", sorted_file),
    spelling("spelling-widened", "numbers of float16 in float32", "torch", widened, half),
    spelling("weight-norm", "weight norm, parametrized", "torch", weight_norm, old_weight_norm),
    spelling("layer-norm-gamma", "gamma and beta of TensorFlow's days", "by hand", old_norms, norms),
    spelling(
        "experts-stacked",
        "experts stacked, gate and up as one",
        "by hand",
        partial(stacked, form="stacked"),
        partial(experts, "split"),
    ),
    spelling(
        "experts-transposed",
        "experts stacked the other way round",
        "by hand",
        partial(stacked, form="transposed"),
        partial(experts, "split"),
    ),
    spelling("experts-mixtral", "Mixtral, split on saving", "transformers", mixtral, mixture),
    spelling(
        "lora-refactored", "an adapter in another factorization", "by hand", refactored, adapter_factors, bound=1e-5
    ),
    spelling("lora-kohya", "an adapter of kohya's scripts", "by hand", kohya, diffusion_adapter),
    constant("constants-gpt2", "GPT-2 with its causal masks", "by hand", causal_masks, gpt2, "h.0.attn.bias"),
    constant("constants-swin", "Swin with attention masks", "by hand", swin_masks, swin, "attn_mask"),
    constant("constants-rotary", "rotary tables", "by hand", rotary, llama, "freqs_cos", "inv_freq", "rope.freqs"),
    constant("constants-infinite", "a mask of minus infinity, position ids", "by hand", infinite_mask, llama),
    constant(
        "constants-detector", "anchors, strides, pixel means", "by hand", detector, llama, "anchors", "pixel_std"
    ),
    constant("constants-schedule", "the noise schedule of a diffusion model", "by hand", schedule, llama, "betas"),
]
