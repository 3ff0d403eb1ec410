"""Models in parts, and folders in which the weights lie among other things."""

import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import part_fixtures
import torch
from case import Case, Made, State, weights
from part_fixtures import llama_state, megatron_state, write_llama, write_megatron, write_zero
from safetensors.torch import save_file


PARTS, FOLDERS = "Parts of one model", "Folders"


def halves(state: State, rank: int) -> State:
    return {name: tensor.chunk(2)[rank].clone() for name, tensor in state.items()}


def zero(folder: Path, stage: int, *, without: str = "") -> Made:
    state = weights() | {"bn.running_mean": torch.linspace(-1, 1, 24)}
    write_zero(folder, state, stage, 3, groups=2, frozen=["blocks.2.weight"], buffers=["bn.running_mean"])
    for path in folder.glob(f"*/*{without}*") if without else ():
        path.unlink()
    return folder, state


def llama(folder: Path, *, parts: int = 2, rows: bool = False, part: str = "") -> Made:
    state = llama_state()
    write_llama(folder, state, 2, embedding_rows=rows)
    if parts == 1:
        (folder / "consolidated.01.pth").unlink()
    return folder / part if part else folder, state


def megatron(folder: Path, version: float = 3.0) -> Made:
    state = megatron_state()
    return write_megatron(folder, state, 2, version), state


def rank_files(folder: Path, pattern: str, *, only: int | None = None) -> Made:
    for rank in range(2):
        torch.save(halves(weights(), rank), folder / pattern.format(rank))
    return folder / pattern.format(only) if only is not None else folder, None


def rank_safetensors(folder: Path, only: int) -> Made:
    for rank in range(2):
        save_file(halves(weights(), rank), folder / f"model-rank-{rank}-part-0.safetensors")
    return folder / f"model-rank-{only}-part-0.safetensors", None


def dcp(folder: Path, *, ema: bool = False) -> Made:
    import torch.distributed.checkpoint

    state = weights()
    content = {"model": state, "optim": {"state": {name: {"exp_avg": 0 * tensor} for name, tensor in state.items()}}}
    if ema:
        content["ema"] = {name: tensor.half() for name, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process
        torch.distributed.checkpoint.save(content, checkpoint_id=str(folder / "step-10"))
    return folder / "step-10", content["ema"] if ema else state


def two_processes(folder: Path, name: str, truth: str = "truth.pt") -> Made:
    """What two processes of torch write; see `part_fixtures.two_processes`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with tempfile.TemporaryDirectory() as made:
        subprocess.run([*command, part_fixtures.__file__, made], check=True, capture_output=True)
        shutil.copytree(Path(made) / name, folder / name)
        return folder / name, torch.load(Path(made) / truth)


def one_rank(folder: Path) -> Made:
    made, _ = two_processes(folder, "fsdp2")
    (made / "model_world_size_2_rank_0.pt").rename(folder / "model.pt")
    shutil.rmtree(made)
    return folder / "model.pt", None


def universal(folder: Path) -> Made:
    """What DeepSpeed's ds_to_universal writes: a folder a parameter, the buffers in the model states."""
    state = weights() | {"bn.running_mean": torch.linspace(-1, 1, 24)}
    step = folder / "global_step10_universal"
    for name in weights():
        (step / "zero" / name).mkdir(parents=True)
        torch.save({"param": state[name], "cat_dim": 0}, step / "zero" / name / "fp32.pt")
        torch.save({"param": 0 * state[name]}, step / "zero" / name / "exp_avg.pt")
    module = {name: tensor.bfloat16() for name, tensor in state.items()} | {
        "bn.running_mean": state["bn.running_mean"]
    }
    states = {"module": module, "buffer_names": ["bn.running_mean"], "mp_world_size": 1}
    torch.save(states, step / "mp_rank_00_model_states.pt")
    (folder / "latest_universal").write_text("global_step10_universal")
    return folder, state


def one_of_two(folder: Path) -> Made:
    """A 16-bit `mp_rank_00_model_states.pt` that says that there are two."""
    torch.save({"module": halves(weights(), 0), "mp_world_size": 2}, folder / "mp_rank_00_model_states.pt")
    return folder / "mp_rank_00_model_states.pt", None


def rank_folders(folder: Path) -> Made:
    for rank in range(2):
        place = folder / f"tp_rank_0{rank}_pp_rank_000"
        place.mkdir()
        torch.save(halves(weights(), rank), place / "model_weights.ckpt")
    return folder / "tp_rank_00_pp_rank_000" / "model_weights.ckpt", None


def ungathered(folder: Path, *, adapter: bool = False) -> Made:
    if adapter:
        names = [f"base_model.model.layers.0.q_proj.lora_{part}.weight" for part in "AB"]
        save_file({name: torch.empty(0) for name in names}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    else:
        state = {name: tensor if tensor.dim() == 1 else torch.empty(0) for name, tensor in weights().items()}
        save_file(state, folder / "model.safetensors")
    return folder, None


def save_shards(folder: Path, state: State, variant: str = "") -> None:
    names, dotted = list(state), f".{variant}" if variant else ""
    shards = (f"model{dotted}-00001-of-00002.safetensors", f"model{dotted}-00002-of-00002.safetensors")
    for shard, part in zip(shards, (names[:3], names[3:]), strict=True):
        save_file({name: state[name] for name in part}, folder / shard)
    weight_map = {name: shards[index >= 3] for index, name in enumerate(names)}
    (folder / f"model.safetensors.index{dotted}.json").write_text(json.dumps({"weight_map": weight_map}))


def shards(
    folder: Path, *, variant: str = "", beside: Callable[[Path, State], None] | None = None, part: str = ""
) -> Made:
    state = weights(dtype=torch.float16 if variant else torch.float32)
    save_shards(folder, state, variant)
    if beside:
        beside(folder, state)
    return folder / part if part else folder, None if part else state


def leftover(folder: Path, state: State) -> None:
    save_file({name: tensor.to(torch.uint8) for name, tensor in list(state.items())[:2]}, folder / "model.safetensors")


def twins(folder: Path, state: State) -> None:
    save_file(state, folder / "consolidated.safetensors")
    (folder / "flax_model.msgpack").write_bytes(b"x")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"x")


def accelerator(folder: Path) -> Made:
    from accelerate import Accelerator

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 12)
    own = Accelerator(cpu=True)
    model, _ = own.prepare(model, torch.optim.Adam(model.parameters()))
    own.save_state(str(folder))
    return folder, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def pipeline(folder: Path, part: str = "") -> Made:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    for name in ("unet", "vae"):
        (folder / name).mkdir()
        save_file(weights(), folder / name / "diffusion_pytorch_model.fp16.safetensors")
    return folder / part if part else folder, weights() if part else None


def trial(folder: Path) -> Made:
    inner = folder / "checkpoint_000010"
    inner.mkdir()
    torch.save(weights(), inner / "checkpoints")
    torch.save({"state": {}, "param_groups": []}, inner / "optimizer")
    (folder / "params.json").write_text("{}")
    return inner, weights()


def parts(name: str, layout: str, maker: str, make: Callable[[Path], Made], refusal: str = "", **more: object) -> Case:
    return Case(name, PARTS, layout, maker, make, "refused" if refusal else "read", (refusal,) * bool(refusal), **more)


def folders(name: str, layout: str, maker: str, make: Callable[[Path], Made], *says: str, **more: object) -> Case:
    return Case(name, FOLDERS, layout, maker, make, says=says, **more)


HAND = "by hand, in its layout"
NOTHING_SAYS = "nothing says how"
CASES = [
    parts("zero-1", "ZeRO-1, three ranks, frozen weights, buffers", HAND, partial(zero, stage=1)),
    parts("zero-2", "ZeRO-2, three ranks, frozen weights, buffers", HAND, partial(zero, stage=2)),
    parts("zero-3", "ZeRO-3, three ranks, frozen weights, buffers", HAND, partial(zero, stage=3)),
    parts(
        "zero-rank-missing",
        "ZeRO-2 without rank 1",
        HAND,
        partial(zero, stage=2, without="pp_rank_1_"),
        "of rank 1 of 3",
    ),
    parts(
        "zero-3-model-only", "ZeRO-3 without optimizer states", HAND, partial(zero, stage=3, without="optim"), "lacks"
    ),
    parts("zero-3-empty", "save_pretrained under ZeRO-3", HAND, ungathered, "saved under ZeRO-3 without gathering"),
    parts("zero-3-adapter", "PEFT under ZeRO-3", HAND, partial(ungathered, adapter=True), "without gathering"),
    parts("dcp", "torch.distributed.checkpoint, with an optimizer", "torch", dcp),
    parts("dcp-ema", "the same with an EMA, key given", "torch", partial(dcp, ema=True), options={"key": "ema"}),
    parts(
        "dcp-fsdp",
        "FSDP2 and its optimizer by DCP, two ranks",
        "torch",
        partial(two_processes, name="dcp", truth="truth_dcp.pt"),
    ),
    parts("fsdp-2", "DTensors of two ranks (FSDP2, verl)", "torch", partial(two_processes, name="fsdp2")),
    parts("fsdp-1", "ShardedTensors of two ranks (FSDP1)", "torch", partial(two_processes, name="fsdp1")),
    parts("fsdp-flat", "local state dicts of FSDP1", "torch", partial(two_processes, name="fsdp1_flat"), NOTHING_SAYS),
    parts("fsdp-rank", "one rank's DTensors under a name of its own", "torch", one_rank, "holds one rank's part"),
    parts("llama-2", "consolidated.NN.pth, embedding cut by columns", HAND, llama),
    parts("llama-3", "consolidated.NN.pth, embedding cut by rows", HAND, partial(llama, rows=True)),
    parts(
        "llama-file",
        "one consolidated.NN.pth of two",
        HAND,
        partial(llama, part="consolidated.01.pth"),
        "is part 1 of 2",
    ),
    parts(
        "llama-3-alone", "one of two, embedding cut by rows", HAND, partial(llama, parts=1, rows=True), "is one of 2"
    ),
    parts("zero-universal", "a universal checkpoint of DeepSpeed", HAND, universal),
    parts("zero-16-bit", "one mp_rank_NN_model_states.pt of two", HAND, one_of_two, "is one of 2 parts"),
    parts("nemo", "model_weights.ckpt in folders of ranks", HAND, rank_folders, "is one of 2 parts"),
    parts("vllm", "model-rank-N-part-0 of vLLM", HAND, partial(rank_safetensors, only=0), "is part 0 of 2"),
    parts("llama-alone", "a folder with one of two", HAND, partial(llama, parts=1), "is one of 2 parts"),
    parts("megatron", "mp_rank_NN, gated MLP", HAND, megatron),
    parts("megatron-old", "mp_rank_NN of version 0", HAND, partial(megatron, version=0), "checkpoint version 0"),
    parts(
        "ranks-plain",
        "consolidated.NN.pth of unknown names",
        HAND,
        partial(rank_files, pattern="consolidated.0{}.pth"),
        NOTHING_SAYS,
    ),
    parts(
        "ranks-verl",
        "model_world_size_2_rank_N.pt of plain halves",
        HAND,
        partial(rank_files, pattern="model_world_size_2_rank_{}.pt"),
        NOTHING_SAYS,
    ),
    parts(
        "ranks-file",
        "weights_rank_0.pt beside rank 1",
        HAND,
        partial(rank_files, pattern="weights_rank_{}.pt", only=0),
        "is part 0 of 2",
    ),
    parts(
        "shard-file",
        "a shard of two as a file",
        HAND,
        partial(shards, part="model-00001-of-00002.safetensors"),
        "is shard 1 of 2",
    ),
    folders("variant-shards", "fp16 shards and their index", HAND, partial(shards, variant="fp16"), "a variant"),
    folders(
        "leftover",
        "model.safetensors of other weights beside shards",
        HAND,
        partial(shards, beside=leftover),
        "passed over",
    ),
    folders(
        "twins",
        "consolidated, Flax and ONNX beside shards",
        HAND,
        partial(shards, beside=twins),
        "onnx/",
        "consolidated.safetensors",
    ),
    folders("accelerate", "Accelerator.save_state", "accelerate", accelerator, "optimizer.bin", needs=("accelerate",)),
    Case("diffusers-root", FOLDERS, "the root of a pipeline", HAND, pipeline, "refused", ("unet/, vae/",)),
    folders("diffusers-part", "a component with a variant only", HAND, partial(pipeline, part="unet"), "a variant"),
    folders("ray-trial", "checkpoint_000010/checkpoints", HAND, trial, "optimizer"),
]
