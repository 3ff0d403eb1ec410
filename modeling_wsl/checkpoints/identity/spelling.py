"""Names without accidents of spelling: what wrapped a model, and which release named a tensor, does not show."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence


# Parts of names that wrappers put in, wherever they stand: torch.compile, FSDP, activation checkpointing, Lightning's
# Fabric, Opacus, PEFT.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_module"}
WRAPPERS |= {"base_layer", "modules_to_save"}
# First parts of names under which people and libraries hold the one model: DDP, Lightning, EMA, PEFT, transformers.
HOLDERS = {"module", "model", "_model", "net", "network", "backbone", "base_model", "inner_model", "wrapped_model"}
HOLDERS |= {
    "ema",
    "ema_model",
    "model_ema",
    "averaged_model",
    "online_model",
    "timm_model",
    "transformer",
    "state_dict",
}
# Single numbers that a wrapper or a batch norm counts with: they say nothing of the network's function.
COUNTERS = re.compile(r"(?:^|[./])(?:num_batches_tracked|n_averaged|num_updates|initted)$|^(?:\w+\.)?(?:decay|step)$")
HEAD_BIAS = re.compile(r"((?:^|\.)(?:predictions|lm_head))\.decoder\.bias$")
RENAMED = (
    # torch.nn.utils.parametrizations, and the hooks of older releases
    (re.compile(r"(^|\.)parametrizations\.(\w+)\.original0$"), r"\1\2_g"),
    (re.compile(r"(^|\.)parametrizations\.(\w+)\.original1$"), r"\1\2_v"),
    (re.compile(r"(^|\.)parametrizations\.(\w+)\.original$"), r"\1\2_orig"),
    (re.compile(r"(^|\.)parametrizations\.(\w+)\.\d+\._([uv])$"), r"\1\2_\3"),
    (HEAD_BIAS, r"\1.bias"),
    (re.compile(r"(^|\.)block_sparse_moe\."), r"\1mlp."),
)
HEAD = re.compile(
    r"(?:^|\.)(?:\w*lm_head|embed_out|output|head|proj_out|output_projection|(?:predictions|lm_head)\.decoder|decoder|"
    r"generator\.proj)\.(?:weight|bias)$"
)
EMBEDDING = re.compile(
    r"(?:^|\.)(?:word_embeddings?|embed_tokens|wte|tok_embeddings|token_embd|shared|embed(?:dings?)?|embed_in|token_embedding)\.weight$"
)
# Language models in llama.cpp's names and in Meta's, as transformers names them. Their converters also exchange the
# rows of queries and keys of some architectures: such a copy is near, for all other matrices are the same.
LLAMA = {
    "token_embd": "embed_tokens",
    "tok_embeddings": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
LLAMA_NAME = re.compile(r"^((?:blk|layers)\.\d+\.)?(.+)\.(weight|bias)$")
MAX_PREFIX = 24  # parts of a prefix; names of unknown origin may have a hundred thousand
# Leaf names of norms in TensorFlow and in the oldest releases of transformers.
NORM_LEAVES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> its plain one, for the weights of one model.

    Wrappers' parts go wherever they stand; holders, and a first part that all names share, go from the front. Nothing
    is taken off that would give two tensors one name.

    Args:
        names: of weights, tied ones once, without constants and counters, which would hide what all others share.
    """
    originals = list(names)
    plain = originals
    for step in (_without_wrappers, _without_module, _renamed, _norms_renamed, _llama_renamed):
        plain = _unless_clash(plain, step)
    for _ in range(MAX_PREFIX):
        shorter = _unless_clash(_unless_clash(plain, _without_common), _without_holder)
        if shorter == plain:
            break
        plain = shorter
    return dict(zip(originals, plain, strict=True))


def counterparts(wanted: Iterable[str], there: Iterable[str], aside: Collection[str] = ()) -> dict[str, str]:
    """Name that is wanted -> the name of the same tensor among those that are there: itself, or plainly the same.

    Args:
        wanted, there: all names of two models.
        aside: constants; like counters, they follow the weights of their module.

    Returns:
        no entry for a name that is not there.
    """
    wanted, there = list(wanted), list(there)
    ours, theirs = (
        [name for name in names if name not in aside and not is_counter(name)] for names in (wanted, there)
    )
    names_there = set(there)
    exact = names_there.intersection(wanted)
    of_plain = {plain: name for name, plain in plain_names(theirs).items() if name not in exact}
    plain = plain_names(ours)
    names = {name: name for name in exact}
    names |= {name: of_plain[plain[name]] for name in ours if name not in exact and plain[name] in of_plain}
    modules = {name.rpartition(".")[0]: names[name].rpartition(".")[0] for name in ours if name in names}
    for name in set(wanted) - names.keys() - set(ours):
        module, dot, leaf = name.rpartition(".")
        if module in modules and (other := f"{modules[module]}{dot}{leaf}") in names_there:
            names[name] = other
    return names


def is_counter(name: str) -> bool:
    """Whether a number of this name counts steps or batches."""
    return bool(COUNTERS.search(name))


def _unless_clash(names: Sequence[str], step: Callable[[Sequence[str]], list[str]]) -> Sequence[str]:
    changed = step(names)
    return changed if len(set(changed)) == len(set(names)) else names


def _without_wrappers(names: Sequence[str]) -> list[str]:
    return [".".join(part for part in name.split(".") if part not in WRAPPERS) or name for name in names]


def _without_module(names: Sequence[str]) -> list[str]:
    """DDP wraps parts of models too."""
    return [".".join(part for part in name.split(".") if part != "module") or name for name in names]


def _renamed(names: Sequence[str]) -> list[str]:
    renamed = []
    for name in names:
        for pattern, new in RENAMED:
            name = pattern.sub(new, name)
        renamed.append(name)
    return renamed


def _norms_renamed(names: Sequence[str]) -> list[str]:
    """Gamma and beta side by side are a norm's; a gamma alone scales a layer."""
    there = set(names)
    renamed = []
    for name in names:
        start, dot, leaf = name.rpartition(".")
        norm = {start + dot + "gamma", start + dot + "beta"} <= there and start + dot + "weight" not in there
        renamed.append(start + dot + NORM_LEAVES.get(leaf, leaf) if norm else name)
    return renamed


def _llama_renamed(names: Sequence[str]) -> list[str]:
    if not {"token_embd.weight", "tok_embeddings.weight"}.intersection(names):
        return list(names)
    matches = [LLAMA_NAME.match(name) for name in names]
    return [
        f"{(match[1] or '').replace('blk', 'layers')}{LLAMA[match[2]]}.{match[3]}"
        if match and match[2] in LLAMA
        else name
        for match, name in zip(matches, names, strict=True)
    ]


def _without_common(names: Sequence[str]) -> list[str]:
    """Without the first part, if all names share it and modules are left; that of experts says what they are."""
    first = {name.partition(".")[0] for name in names}
    if len(first) != 1 or max(name.count(".") for name in names) < 2 or first.pop().endswith("experts"):
        return list(names)
    return [name.partition(".")[2] or name for name in names]


def _without_holder(names: Sequence[str]) -> list[str]:
    return [
        rest if holder in HOLDERS and rest else name
        for name, (holder, _, rest) in ((name, name.partition(".")) for name in names)
    ]


def tied_rank(name: str) -> tuple[bool, bool, str]:
    """Sorts the names of one tensor: an input's embedding before the head that is tied to it."""
    return bool(HEAD.search(name)), "shared" not in name.split("."), name
