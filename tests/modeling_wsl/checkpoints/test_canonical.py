"""The canonical view: the same network under any wrapper, container, order or spelling is one; others are not."""

import random

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from modeling_wsl import open_checkpoint
from modeling_wsl.checkpoints.canonical import canonical, canonical_sha256, embedding_view, same_network
from modeling_wsl.checkpoints.identity.spelling import counterparts, plain_names


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "GPT2LMHeadModel": transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16),
    "LlamaForCausalLM": transformers.LlamaConfig(**SMALL, num_key_value_heads=1, vocab_size=50),
    "BertForMaskedLM": transformers.BertConfig(**SMALL, vocab_size=50),
    "T5ForConditionalGeneration": transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, vocab_size=50),
    "ViTForImageClassification": transformers.ViTConfig(**SMALL, image_size=32, num_labels=3),
    "Wav2Vec2Model": transformers.Wav2Vec2Config(**SMALL, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3)),
}
TIMM = {
    "resnet10t": {"num_classes": 3},
    "convnext_atto": {"num_classes": 3, "depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 24},
}
WRAPPERS = {
    "DDP": lambda state: {f"module.{name}": value for name, value in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "DDP, compiled": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "Lightning": lambda state: (
        {f"model.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(3)}
    ),
    "net": lambda state: {f"net.{name}": value for name, value in state.items()},
    "another module": lambda state: {f"feature_tower.{name}": value for name, value in state.items()},
    "EMA": lambda state: {f"ema_model.{name}": value for name, value in state.items()} | {"step": torch.tensor(3)},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(2)} | {f"module.{n}": v for n, v in state.items()},
    "FSDP": lambda state: {
        f"_fsdp_wrapped_module.{n.replace('.0.', '.0._fsdp_wrapped_module.')}": v for n, v in state.items()
    },
    "checkpointing": lambda state: {n.replace(".1.", ".1._checkpoint_wrapped_module."): v for n, v in state.items()},
    "PEFT's base": lambda state: {f"base_model.model.{name}": value for name, value in state.items()},
    "nested": lambda state: {"state_dict": {f"backbone.{n}": v for n, v in state.items()}, "epoch": 3},
    "without counters": lambda state: {n: v for n, v in state.items() if "num_batches" not in n},
    "another order": lambda state: dict(random.Random(0).sample(sorted(state.items()), len(state))),
    "with constants": lambda state: state | {"causal_mask": torch.full((4, 4), -torch.inf).triu(1)},
    "wider": lambda state: {n: v.double() if v.is_floating_point() else v for n, v in state.items()},
}


def built(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    if name in TIMM:
        return timm.create_model(name, **TIMM[name]).state_dict()
    return getattr(transformers, name)(CONFIGS[name]).state_dict()


@pytest.fixture(scope="module")
def states():
    return {name: built(name) for name in (*TIMM, *CONFIGS)}


def digest(source) -> str:
    with open_checkpoint(source) as checkpoint:
        return canonical_sha256(checkpoint)


@pytest.mark.parametrize("name", [*TIMM, *CONFIGS])
def test_a_network_has_one_digest_under_every_wrapper(states, name):
    plain = digest(states[name])
    assert {wrapper: digest(wrap(states[name])) for wrapper, wrap in WRAPPERS.items()} == dict.fromkeys(
        WRAPPERS, plain
    )


@pytest.mark.parametrize("name", ["resnet10t", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_a_network_has_one_digest_in_every_container(states, name, tmp_path):
    state = states[name]
    torch.save(WRAPPERS["DDP"](state), tmp_path / "model.pt")
    copies = {alias: value.clone().contiguous() for alias, value in state.items()}  # tied ones twice
    save_file(copies, tmp_path / "model.safetensors")
    with open_checkpoint(state) as checkpoint:
        save_file({n: checkpoint.read(n).contiguous() for n in checkpoint.tensors}, tmp_path / "once.safetensors")
    assert {digest(path) for path in tmp_path.iterdir()} == {digest(state)}


def test_a_language_model_whose_head_is_tied_is_the_bare_model(states):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(CONFIGS["GPT2LMHeadModel"])
    assert digest(model) == digest(model.transformer) == digest(states["GPT2LMHeadModel"])


def test_models_that_differ_have_digests_that_differ(states):
    state = states["resnet10t"]
    matrix = {"0.weight": torch.rand(4, 4), "1.weight": torch.rand(4, 4)}
    variants = {
        "plain": state,
        "another seed": built("resnet10t", seed=1),
        "another tensor": state | {"fc.bias": state["fc.bias"] + 1e-6},
        "a statistic": state | {"bn1.running_mean": state["bn1.running_mean"] + 1},
        "one tensor less": {n: v for n, v in state.items() if n != "fc.bias"},
        "one more": state | {"fc2.bias": torch.zeros(3)},
        "another shape": state | {"fc.weight": state["fc.weight"].reshape(1, -1)},
        "half precision": {n: v.half() if v.is_floating_point() else v for n, v in state.items()},
        **{name: other for name, other in states.items() if name != "resnet10t"},
        "two matrices": matrix,
        "two matrices, exchanged": {"0.weight": matrix["1.weight"], "1.weight": matrix["0.weight"]},
        "one of them transposed": matrix | {"0.weight": matrix["0.weight"].T.contiguous()},
        "teacher and student": {
            f"{part}.{n}": v.clone() for part in ("model", "ema_model") for n, v in matrix.items()
        },
    }
    assert len({digest(variant) for variant in variants.values()}) == len(variants)


def test_two_models_in_one_state_dict_keep_their_prefixes():
    names = [f"{part}.{leaf}" for part in ("student", "teacher") for leaf in ("fc.weight", "fc.bias")]
    assert plain_names(names) == dict(zip(names, names, strict=True))
    assert list(plain_names([f"module.{name}" for name in names]).values()) == names
    both = ["model.fc.weight", "ema_model.fc.weight"]
    assert set(plain_names(both).values()) == set(both)


GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
META = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.mark.parametrize("names", [GGUF, META], ids=["llama.cpp", "Meta"])
def test_a_language_model_has_one_digest_under_the_names_of_llama_cpp_and_of_meta(states, names):
    state = states["LlamaForCausalLM"]
    renamed = state
    for theirs, other in names.items():
        renamed = {name.replace(theirs, other): value for name, value in renamed.items()}
    assert not set(state) & set(renamed)
    assert digest(renamed) == digest(state)


def test_names_of_any_depth_and_length_are_taken():
    deep = [".".join(["a"] * 50_000 + [leaf]) for leaf in ("weight", "bias")]
    assert len(set(plain_names(deep).values())) == 2
    state = {"lora_A" * 9_000 + ".weight": torch.rand(9, 9), "experts" * 9_000 + ".0.w1.weight": torch.rand(9, 9)}
    assert digest(state) == digest(WRAPPERS["DDP"](state))


def test_a_float16_file_and_its_numbers_in_float32_are_one_network():
    half = {"fc.weight": torch.randn(9, 9).half(), "fc.bias": torch.full((9,), 6e-8).half()}  # a denormal
    wide = {name: value.float() for name, value in half.items()}
    assert digest(half) == digest(wide)
    with open_checkpoint(half) as first, open_checkpoint(wide) as second:
        assert same_network(first, second)
    exact = {"fc.weight": torch.tensor([[1 / 3, 1e-300]], dtype=torch.float64)}
    assert digest(exact) != digest({"fc.weight": exact["fc.weight"].float()})


def test_old_and_new_weight_norm_and_the_weight_itself_are_one():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Linear(6, 5))
    states = {}
    for how, norm in (("new", parametrizations.weight_norm), ("old", nn.utils.weight_norm)):
        model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Linear(6, 5))
        model.load_state_dict(plain.state_dict())
        norm(model[0], dim=2)
        norm(model[1])
        states[how] = model.state_dict()
    assert set(states["new"]).isdisjoint(set(states["old"]) - {"0.bias", "1.bias"})
    assert digest(states["old"]) == digest(states["new"])
    with open_checkpoint(states["old"]) as checkpoint:
        view = canonical(checkpoint)
        assert set(view.tensors) == set(plain.state_dict())
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(view.read(name), value)


def test_a_pruned_weight_is_the_weight_times_its_mask():
    model = nn.Sequential(nn.Linear(6, 5))
    prune.l1_unstructured(model[0], "weight", 0.5)
    masked = model.state_dict()
    prune.remove(model[0], "weight")
    assert set(masked) == {"0.bias", "0.weight_orig", "0.weight_mask"}
    assert digest(masked) == digest(model)


def test_gamma_and_beta_of_a_norm_are_weight_and_bias_and_the_scale_of_a_layer_stays():
    norm = {"a.LayerNorm.gamma": torch.rand(4), "a.LayerNorm.beta": torch.rand(4), "a.ls.gamma": torch.rand(4)}
    renamed = {n.replace("Norm.gamma", "Norm.weight").replace("beta", "bias"): v for n, v in norm.items()}
    assert digest(norm) == digest(renamed)
    assert "ls.gamma" in plain_names(norm).values()


def experts(projections: dict[str, torch.Tensor], form: str, at: str = "layers.0.mlp.experts") -> dict:
    if form == "split":
        return {
            f"{at}.{e}.{n}.weight": w[e].clone()
            for n, stack in projections.items()
            for e, w in [(0, stack), (1, stack)]
        }
    turned = {n: w.transpose(1, 2).contiguous() if form == "transposed" else w for n, w in projections.items()}
    return {f"{at}.{name}": stack for name, stack in turned.items()}


@pytest.mark.parametrize("inner", [10, 6])  # 6: matrices are square, and no shape tells which way round they lie
def test_experts_stacked_either_way_round_or_split_are_one(inner):
    torch.manual_seed(0)
    norm = {"norm.weight": torch.ones(6)}
    stacks = {"up_proj": torch.randn(2, inner, 6), "down_proj": torch.randn(2, 6, inner)}
    forms = {form: experts(stacks, form) | norm for form in ("split", "stacked", "transposed")}
    assert len({digest(state) for state in forms.values()}) == 1
    views = []
    for state in forms.values():
        with open_checkpoint(state) as checkpoint:
            view = embedding_view(checkpoint)
            views.append([(n, s.shape, view.read(n).tolist()) for n, s in view.tensors.items()])
    assert views[0] == views[1] == views[2]
    other = experts(stacks | {"up_proj": stacks["up_proj"].flip(0)}, "split") | norm
    assert digest(other) != digest(forms["split"])


def test_gates_and_up_projections_in_one_stack_are_those_of_mixtral():
    torch.manual_seed(0)
    gate, up, down = torch.randn(2, 10, 6), torch.randn(2, 10, 6), torch.randn(2, 6, 10)
    split = {"w1": gate, "w3": up, "w2": down}
    mixtral = experts(split, "split", at="model.layers.0.block_sparse_moe.experts")
    fused = torch.cat([gate, up], dim=1)
    for form in ("stacked", "transposed"):
        assert digest(experts({"gate_up_proj": fused, "down_proj": down}, form)) == digest(mixtral)


def test_a_mixture_of_transformers_is_what_it_saves(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4, vocab_size=50)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as saved:
        assert any("experts.3.w1" in name for name in saved.tensors)  # split on saving
    assert digest(model) == digest(tmp_path)


def lora(rank: int = 3, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{side}.weight": torch.randn(*shape)
        for layer in range(2)
        for name in ("q_proj", "v_proj")
        for side, shape in (("A", (rank, 8)), ("B", (6, rank)))
    } | more


def test_two_factorizations_of_one_update_are_one(tmp_path):
    torch.manual_seed(0)
    state, change = lora(), torch.randn(3, 3) + 2 * torch.eye(3)
    other = {n: change @ v if "lora_A" in n else v @ change.inverse() for n, v in state.items()}
    for name, tensors in (("one", state), ("other", other)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 3}')
    with open_checkpoint(tmp_path / "one") as one, open_checkpoint(tmp_path / "other") as two:
        views = [canonical(one), canonical(two)]
        assert list(views[0].tensors) == list(views[1].tensors)
        for name in views[0].tensors:
            torch.testing.assert_close(views[0].read(name), views[1].read(name))
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        update = 2 * state[name.format("B")] @ state[name.format("A")]
        torch.testing.assert_close(views[0].read("0.self_attn.q_proj.weight_update"), update)
        embedded = [embedding_view(one), embedding_view(two)]
        assert [s.shape for s in embedded[0].tensors.values()] == [v.shape for _, v in sorted(state.items())]
        for name in embedded[0].tensors:
            torch.testing.assert_close(embedded[0].read(name), embedded[1].read(name), rtol=1e-4, atol=1e-5)


def test_an_adapter_in_memory_and_its_file_are_one(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIGS["LlamaForCausalLM"])
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    in_memory = {n: v for n, v in adapted.state_dict().items() if "lora_" in n}
    with open_checkpoint(tmp_path) as saved:
        view = canonical(saved)
        assert {name.rpartition(".")[2] for name in view.tensors} == {"weight_update", "weight_magnitude"}
    with open_checkpoint(in_memory) as memory:  # without the config, alpha is not known
        assert list(canonical(memory).tensors) == list(view.tensors)
    base = {n: v for n, v in adapted.state_dict().items() if "lora_" not in n}
    torch.manual_seed(0)
    assert digest(base) == digest(transformers.LlamaForCausalLM(CONFIGS["LlamaForCausalLM"]))


def test_a_kohya_file_and_the_same_adapter_of_diffusers_are_one(tmp_path):
    torch.manual_seed(0)
    factors = {(block, name): (torch.randn(4, 8), torch.randn(8, 4)) for block in (0, 1) for name in ("to_q", "to_k")}
    kohya, diffusers = {}, {}
    for (block, name), (down, up) in factors.items():
        flat = f"lora_unet_down_blocks_{block}_attentions_0_transformer_blocks_0_attn1_{name}"
        kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(4.0)}
        dotted = f"unet.down_blocks.{block}.attentions.0.transformer_blocks.0.attn1"
        diffusers |= {
            f"{dotted}.processor.{name}_lora.down.weight": down,
            f"{dotted}.processor.{name}_lora.up.weight": up,
        }
    assert digest(kohya) == digest(diffusers)
    assert digest({n: v * 0.5 if n.endswith("alpha") else v for n, v in kohya.items()}) != digest(kohya)


def test_a_plain_model_is_embedded_as_it_is(states):
    for name in ("resnet10t", "GPT2LMHeadModel"):
        with open_checkpoint(WRAPPERS["DDP"](states[name])) as checkpoint:
            assert embedding_view(checkpoint) is checkpoint


def test_names_of_another_wrapper_are_matched_with_the_counters_and_constants_of_their_modules():
    wanted = ["conv.weight", "bn.weight", "bn.num_batches_tracked", "attn.q.weight", "attn.mask", "head.weight"]
    there = [f"module.{name}" for name in wanted[:-1]]
    assert counterparts(wanted, there) == dict(zip(wanted[:-1], there, strict=True))


def test_a_slice_of_a_stack_is_a_view_on_it():
    stack = torch.randn(2, 10, 6)
    with open_checkpoint({"layers.0.mlp.experts.up_proj": stack, "norm.weight": torch.ones(6)}) as checkpoint:
        expert = canonical(checkpoint).read("layers.0.mlp.experts.1.up_proj.weight")
    assert torch.equal(expert, stack[1])
    assert expert.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
