"""Names that people's tools give to files and folders: weights, variants, one part of several, things beside them."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .formats import FRAMEWORK_WEIGHTS, SAFETENSORS_SUFFIXES, SUFFIXES, TABLE_MARK, TORCH_LEGACY_MAGIC, TORCH_SUFFIXES


# In the order in which transformers, timm and PEFT look for them; safetensors first.
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
INDEX_SUFFIX = ".index.json"
INDEX = re.compile(r".+\.index(\.[\w-]+)?\.json")
INDEX_STEM = re.compile(r"(\.[\w-]+)?\.(safetensors|bin|pt|pth)\.index\..*|\.index\..*")
# `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`, `model.safetensors.index.fp16.json`
_STEM = r"(?P<stem>model|pytorch_model|diffusion_pytorch_model|adapter_model)"
VARIANTS = (
    re.compile(_STEM + r"\.(?P<variant>[\w-]+?)(?P<shard>-\d+-of-\d+)?\.(?P<suffix>safetensors|bin)"),
    re.compile(_STEM + r"(?P<shard>-\d+-of-\d+)\.(?P<variant>[\w-]+)\.(?P<suffix>safetensors|bin)"),
    re.compile(_STEM + r"\.(?P<suffix>safetensors|bin)\.index\.(?P<variant>[\w-]+)\.json(?P<shard>)"),
    re.compile(_STEM + r"\.(?P<variant>[\w-]+)\.(?P<suffix>safetensors|bin)\.index\.json(?P<shard>)"),
)
# What trainers leave beside the weights: the one list of it. A dot, a digit, a dash, an underscore or the end follows.
BESIDE_WEIGHTS = re.compile(
    r"(training_args|trainer_state|training_state|train_state|optimizer|optim|lr_scheduler|scheduler|scaler"
    r"|grad_scaler|loss_scaler|rng_state|rng_states|random_states?|sampler|dl_state_dict|dataloader|data_state"
    r"|custom_checkpoint|ema_decay|extra_state|profile_peaks)(?=$|[._\d-])",
    re.IGNORECASE,
)
# Folders beside a model that hold it once more, in another layout or for another runtime.
TWIN_FOLDERS = ("onnx", "openvino", "original", "coreml", "tflite", "onnx_models", "metal", "ctranslate2")
# Suffixes of files that are not even looked into.
ORDINARY = (
    *(".json", ".jsonl", ".txt", ".md", ".py", ".sh", ".csv", ".tsv", ".yaml", ".yml", ".log", ".html", ".pdf"),
    *(".png", ".jpg", ".jpeg", ".gif", ".svg", ".parquet", ".arrow"),
)
CARD_SUFFIXES = (".md", ".txt", ".yaml", ".json")  # of SUFFIXES: beside models everywhere, never meant as one
# A file of one of these kinds stands for a model. Some are refused when opened: then they are rows with a reason.
MODEL_SUFFIXES = (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES, *FRAMEWORK_WEIGHTS, ".jit")
MODEL_SUFFIXES += tuple(suffix for suffix in SUFFIXES if suffix not in CARD_SUFFIXES)
SHARD = re.compile(r"(?P<stem>.+)-(?P<rank>\d+)-of-(?P<world>\d+)(?P<rest>\..+)")


class Part(NamedTuple):
    """A part of a model, by its file name: which of how many, from whose tool; `group` is alike in all parts."""

    maker: str
    rank: int
    world: int
    group: str


# Ranks count from 0. Names of the last two makers may mean other things: `lora_rank_64.safetensors` is no part.
PART_NAMES = (
    ("ZeRO", r"(?P<group>(?:bf16_|fp16_)?zero_pp_rank_)(?P<rank>\d+)_mp_rank_\d+_(?:optim|model)_states\.pt"),
    ("a pipeline of DeepSpeed", r"(?P<group>layer_)(?P<rank>\d+)-model_\d+-model_states\.pt"),
    ("DeepSpeed", r"(?P<group>mp_rank_)(?P<rank>\d+)_model_states\.pt"),
    ("model parallelism", r"(?P<group>consolidated)\.(?P<rank>\d\d)\.(?:pth|pt|bin|safetensors)"),
    ("FSDP", r"(?P<group>.*?)_?world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.\w+"),
    ("FSDP", r"(?P<group>pytorch_model_fsdp(?:_\d+)?)_rank_?(?P<rank>\d+)\.\w+"),
    ("FSDP", r"(?P<group>pytorch_model_fsdp)_(?P<rank>\d+)\.\w+"),
    ("vLLM", r"(?P<group>model)-rank-(?P<rank>\d+)-part-\d+\.safetensors"),
    ("several processes", r"(?P<group>.*?(?:-shard|model_part-))(?P<rank>\d+)\.\w+"),
    ("several processes", r"(?P<group>.*?)rank[._-]?(?P<rank>\d+)(?:[._-]?of[._-]?(?P<world>\d+))?\.\w+"),
    ("several processes", r"(?P<group>.*?)[._-](?:tp|mp|model_parallel)[._-]?(?P<rank>\d+)\.\w+"),
)
_PART_NAMES = tuple((maker, re.compile(pattern, re.IGNORECASE)) for maker, pattern in PART_NAMES)


def part_of(name: str, names: Iterable[str]) -> Part | None:
    """The part of a model that the file `name` among `names` is; None where it may be a whole one."""
    if (own := _named_part(name)) is None:
        return None
    maker, rank, stated, group = own
    others = (_named_part(other) for other in names)
    ranks = {other[1] for other in others if other and (other[0], other[3]) == (maker, group)} | {rank}
    world = stated or max(ranks) + 1
    if world == 1 and maker in ("DeepSpeed", "model parallelism", "FSDP", "vLLM"):
        return None  # the only rank, as far as names tell
    if maker == "several processes" and not stated and 0 not in ranks and not (len(ranks) == 1 and rank < 4):
        return None
    if maker == "several processes" and 0 not in ranks and name.lower().endswith(SAFETENSORS_SUFFIXES):
        return None
    return Part(maker, rank, world, group)


def _named_part(name: str) -> tuple[str, int, int | None, str] | None:
    """Maker, rank, number of ranks where it is stated, and group."""
    if not is_weight_name(name):
        return None
    for maker, pattern in _PART_NAMES:
        if match := pattern.fullmatch(name):
            world = match.groupdict().get("world")
            return maker, int(match["rank"]), int(world) if world else None, match["group"]
    return None


def is_index(name: str) -> bool:
    """True for the index of shards, of a variant too (`model.safetensors.index.fp16.json`)."""
    return bool(INDEX.fullmatch(name))


def shards_of(index: str, names: Iterable[str]) -> list[str]:
    """The files among `names` that are called as the shards of this index are."""
    stem = INDEX_STEM.sub("", index)
    variant = match["variant"] if (match := variant_of(index)) else None
    shards = []
    for name in names:
        if match := SHARD.fullmatch(name):
            # `model.fp16-00001-of-00002` belongs to the index of the variant
            own = variant_of(name)
            plain = own["stem"] if own else match["stem"]
            if plain == stem and (own["variant"] if own else None) == variant:
                shards.append(name)
    return shards


def is_later_part(name: str) -> bool:
    """True for parts of a split GGUF file but the first, which stands for all."""
    return name.lower().endswith(".gguf") and bool(match := SHARD.fullmatch(name)) and int(match["rank"]) > 1


def read_with(chosen: str, names: Iterable[str]) -> list[str]:
    """The files that are read with the chosen one: data beside ONNX and TensorFlow, later parts of split GGUF."""
    beside = (f"{chosen}_data", f"{chosen}.data", chosen.removesuffix(".index") + ".data-")
    stem = match["stem"] if (match := SHARD.fullmatch(chosen)) else None
    later = [name for name in names if is_later_part(name) and SHARD.fullmatch(name)["stem"] == stem]
    return later + [name for name in names if name.startswith(beside)]


def variant_of(name: str) -> re.Match | None:
    """The parts of the name of a variant (`variant`, `stem`, `shard`, `suffix`); None for plain names."""
    matches = (pattern.fullmatch(name) for pattern in VARIANTS)
    return next((match for match in matches if match), None)


def is_weight_name(name: str) -> bool:
    """True for names of safetensors and torch files; not for what trainers leave beside the weights."""
    return name.lower().endswith((*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES)) and not is_beside_weights(name)


def is_beside_weights(name: str) -> bool:
    """True for states of optimizers, schedulers and random numbers, arguments and the like: files and folders."""
    return bool(BESIDE_WEIGHTS.match(name)) or name.endswith("_optim_states.pt")


def tensorflow_indices(names: Iterable[str]) -> list[str]:
    """Of a folder's file names, the indices of TensorFlow checkpoints whose data lie beside them."""
    data = {match[1] for name in names if (match := re.fullmatch(r"(.+)\.data-\d{5}-of-\d{5}", name))}
    return [name for name in names if name.removesuffix(".index") in data]


def holds_weights(path: Path) -> bool:
    """True for a file whose name says nothing and whose first bytes are those of weights (`checkpoints`, `x.0`)."""
    known = (*MODEL_SUFFIXES, *ORDINARY)
    if path.name.lower().endswith(known) or is_beside_weights(path.name) or not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
            stream.seek(-min(8, path.stat().st_size), os.SEEK_END)
            end = stream.read()
    except OSError:
        return False
    if path.suffix == ".index":
        return end == TABLE_MARK  # of TensorFlow
    if head.startswith(b"PK\x03\x04"):
        return b"/data.pkl" in head  # torch.save writes it first
    if head[8:10] == b'{"':
        return int.from_bytes(head[:8], "little") < path.stat().st_size
    marked = head.startswith((b"GGUF", b"\x89HDF\r\n\x1a\n")) or TORCH_LEGACY_MAGIC in head[:32]
    return marked or end == TABLE_MARK
