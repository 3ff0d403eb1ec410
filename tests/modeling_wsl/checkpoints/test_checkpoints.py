"""Every source of weights opens to the same tensors, lazily."""

import json
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from modeling_wsl.checkpoints.checkpoint import Checkpoint, CheckpointError, NonFiniteWeightsError, open_checkpoint


def weights() -> dict[str, torch.Tensor]:
    """A state dict with many dtypes, in an order that no sort gives."""
    generator = torch.Generator().manual_seed(0)
    return {
        "stem.weight": torch.randn(6, 3, 3, 3, generator=generator),
        "stem.bias": torch.randn(6, generator=generator).bfloat16(),
        "blocks.10.weight": torch.randn(12, 6, generator=generator).half(),
        "blocks.2.weight": torch.randn(6, 6, generator=generator).double(),
        "scale": torch.tensor(0.5),
        "empty": torch.empty(0, 4),
        "counter": torch.tensor(7),
        "table": torch.randn(5, 4, generator=generator).to(torch.float8_e4m3fn),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def save_sharded(folder: Path, shards: list[dict], kind: str = "model.safetensors", **index) -> Path:
    stem, suffix = kind.rsplit(".", 1)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        save_file(shard, folder / name) if suffix == "safetensors" else torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    path = folder / f"{kind}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map} | index))
    return path


def split(state: dict) -> list[dict]:
    names = list(state)
    return [{n: state[n] for n in names[:3]}, {n: state[n] for n in names[3:5]}, {n: state[n] for n in names[5:]}]


def as_safetensors(state, folder):
    save_file(state, folder / "any name.safetensors")
    return folder / "any name.safetensors"


def as_sharded_safetensors(state, folder):
    save_sharded(folder, split(state))
    return folder


def as_index_path(state, folder):
    return save_sharded(folder, split(state))


def as_torch_file(state, folder):
    torch.save(state, folder / "weights.th")
    return str(folder / "weights.th")


def as_legacy_torch_file(state, folder):
    state.pop("table")  # torch itself does not read float8 back from this format
    torch.save(state, folder / "weights.ckpt", _use_new_zipfile_serialization=False)
    return folder / "weights.ckpt"


def as_torch_folder(state, folder):
    torch.save(OrderedDict(state), folder / "pytorch_model.bin")
    torch.save({"lr": 1e-3}, folder / "training_args.bin")
    return folder


def as_sharded_torch(state, folder):
    save_sharded(folder, split(state), "pytorch_model.bin")
    return folder


def as_training_checkpoint(state, folder):
    moments = {i: {"exp_avg": torch.zeros_like(t), "step": torch.tensor(1.0)} for i, t in enumerate(state.values())}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}
    callbacks = {"best": {"best_model_score": torch.tensor(0.1)}}
    content = {"epoch": 3, "loss": torch.tensor(0.25), "state_dict": state, "optimizer_states": [optimizer]}
    torch.save(content | {"callbacks": callbacks, "rng": torch.get_rng_state()}, folder / "last.ckpt")
    return folder / "last.ckpt"


def as_single_file_folder(state, folder):
    save_file(state, folder / "released.safetensors")
    (folder / "README.md").write_text("# a model")
    return folder


SAVERS = [value for name, value in list(globals().items()) if name.startswith("as_")]


@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__[3:])
def test_every_source_gives_the_same_tensors_and_digest(save, tmp_path):
    expected = weights()
    with open_checkpoint(save(expected, tmp_path)) as checkpoint:
        assert_same(checkpoint.state_dict(), expected)
        assert {n: (s.shape, s.torch_dtype) for n, s in checkpoint.tensors.items()} == {
            n: (tuple(t.shape), t.dtype) for n, t in expected.items()
        }
        assert checkpoint.tied == {} and checkpoint.library is None and checkpoint.config == {}
        assert checkpoint.sha256() == open_checkpoint(expected).sha256()
        assert not any(checkpoint.read(name).requires_grad for name in expected)


def test_the_digest_changes_with_a_name_a_dtype_a_shape_or_a_bit():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(6)}
    digests = {
        open_checkpoint(other).sha256()
        for other in (
            state,
            {"a": torch.zeros(2, 3), "c": torch.ones(6)},
            state | {"a": torch.zeros(3, 2)},
            state | {"a": torch.zeros(2, 3, dtype=torch.int32)},
            state | {"b": torch.ones(6).index_fill(0, torch.tensor(5), -1.0)},
        )
    }
    assert len(digests) == 5
    assert open_checkpoint(dict(reversed(state.items()))).sha256() in digests


def test_a_digest_over_many_pieces_is_that_of_one(monkeypatch):
    state = {
        "plain": torch.randn(50, 7),
        "strided": torch.randn(9, 5, 8).permute(2, 0, 1),
        "skipped": torch.randn(40)[::3],
    }
    whole = open_checkpoint(state).sha256()
    monkeypatch.setattr("modeling_wsl.checkpoints.checkpoint.CHUNK_BYTES", 64)
    assert open_checkpoint(state).sha256() == whole
    assert open_checkpoint({n: t.contiguous() for n, t in state.items()}).sha256() == whole


def test_a_state_dict_in_memory_keeps_order_strides_and_aliases():
    shared = torch.randn(4, 3)
    state = {"z": shared, "a": shared.t(), "tied": shared, "view": shared[:2], "b": torch.zeros(0)}
    checkpoint = open_checkpoint(state)
    assert list(checkpoint.tensors) == ["z", "a", "view", "b"] and checkpoint.tied == {"tied": "z"}
    assert checkpoint.tensor_order == ("z", "a", "tied", "view", "b")
    assert list(checkpoint.state_dict()) == list(state)
    loaded = checkpoint.state_dict()
    assert loaded["tied"] is loaded["z"]
    assert torch.equal(loaded["a"], shared.t()) and checkpoint.source == "<state dict>"


def test_a_module_with_tied_weights_and_a_parametrization_is_read_as_its_state_dict():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(5, 4), nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight
            self.extra = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    model = Tied()
    checkpoint = open_checkpoint(model)
    assert list(checkpoint.state_dict()) == list(model.state_dict())
    assert checkpoint.tied == {"head.weight": "embed.weight"} and checkpoint.source == "<Tied>"
    assert "extra.parametrizations.weight.original1" in checkpoint.tensors
    model.load_state_dict(checkpoint.state_dict())
    assert open_checkpoint(checkpoint) is checkpoint


def test_tied_tensors_survive_torch_files_and_save_model(tmp_path):
    embed = nn.Embedding(5, 4)
    model = nn.ModuleDict({"wte": embed, "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = embed.weight
    torch.save(model.state_dict(), tmp_path / "m.pt")
    save_model(model, tmp_path / "m.safetensors")
    for path in (tmp_path / "m.pt", tmp_path / "m.safetensors"):
        checkpoint = open_checkpoint(path)
        assert len(checkpoint.tensors) == len(checkpoint.tied) == 1
        assert_same(checkpoint.state_dict(), model.state_dict())
    assert open_checkpoint(tmp_path / "m.pt").tied == {"head.weight": "wte.weight"}


def test_an_adapter_folder_gives_its_own_tensors_and_names_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    base.name_or_path = "org/base"
    adapted = get_peft_model(base, LoraConfig(target_modules=["0"], r=2))
    adapted.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.library == "peft" and checkpoint.config["base_model_name_or_path"] == "org/base"
    assert sorted(n.rpartition("0.")[2] for n in checkpoint.tensors) == ["lora_A.weight", "lora_B.weight"]
    torch.save(checkpoint.state_dict(), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_same(open_checkpoint(tmp_path).state_dict(), checkpoint.state_dict())


def test_a_nested_checkpoint_with_several_models_names_them_and_key_chooses(tmp_path):
    state, ema = weights(), {name: tensor + tensor for name, tensor in weights().items() if name != "table"}
    content = {"model": {"net": state}, "ema": ema, "ema.state": {"x.weight": torch.zeros(99)}, "epoch": 1}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds 3 state dicts: \S+a\.pt#model\.net .*#ema .*#ema\.state "):
        open_checkpoint(tmp_path / "a.pt")
    assert_same(open_checkpoint(tmp_path / "a.pt", key="model").state_dict(), state)
    assert_same(open_checkpoint(tmp_path / "a.pt", key="model.net").state_dict(), state)
    assert_same(open_checkpoint(tmp_path / "a.pt", key="ema").state_dict(), ema)
    assert list(open_checkpoint(content, key="ema.state").tensors) == ["x.weight"]
    with pytest.raises(CheckpointError, match="has no entry 'net'.*'model', 'ema'"):
        open_checkpoint(tmp_path / "a.pt", key="net")


def test_the_same_state_dict_under_two_keys_is_not_ambiguous_and_a_self_containing_pickle_ends(tmp_path):
    content = {"model": weights(), "steps": [1, 2]}
    content["state_dict"] = content["model"]
    content["itself"] = content
    torch.save(content, tmp_path / "a.pt")
    assert_same(open_checkpoint(tmp_path / "a.pt").state_dict(), weights())


def test_loose_tensors_and_counters_beside_parameters_do_not_hide_them():
    state = {"fc.weight": torch.ones(3, 3), "epoch": 3, "fc._extra_state": None}
    assert list(open_checkpoint(state).tensors) == ["fc.weight"]
    beside = {"model": {"fc.weight": torch.ones(9, 9)}, "class_weights": torch.ones(4)}
    assert list(open_checkpoint(beside).tensors) == ["fc.weight"]
    assert list(open_checkpoint(beside, key="").tensors) == ["class_weights"]
    mixed = {"model": {"fc.weight": torch.ones(9, 9)}, "head.weight": torch.ones(4)}
    with pytest.raises(CheckpointError, match=r"holds 2 state dicts: key='' .*key='model'"):
        open_checkpoint(mixed)


def test_min_parameters_guards_nested_checkpoints_by_default_and_all_when_given(tmp_path):
    small = {"fc.weight": torch.ones(9, 7)}
    torch.save({"model_state_dict": small}, tmp_path / "nested.pt")
    torch.save(small, tmp_path / "flat.pt")
    with pytest.raises(
        CheckpointError, match="degenerate: 63 floating-point entries, fewer than 64.*option min_parameters"
    ):
        open_checkpoint(tmp_path / "nested.pt")
    assert open_checkpoint(tmp_path / "nested.pt", min_parameters=0).num_parameters == 63
    assert open_checkpoint(tmp_path / "flat.pt").num_parameters == open_checkpoint(small).num_parameters == 63
    with pytest.raises(CheckpointError, match="fewer than 100"):
        open_checkpoint(small, min_parameters=100)


def test_nonfinite_weights_are_refused_where_they_are_read_and_an_option_admits_them(tmp_path):
    state = {"ok.weight": torch.full((4,), 3e38), "bad.weight": torch.zeros(3, 4, dtype=torch.bfloat16)}
    state["bad.weight"][1, 2], state["bad.weight"][2, 0] = float("nan"), float("-inf")
    save_file(state, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    checkpoint.check_finite("ok.weight", checkpoint.read("ok.weight"))  # the sum overflows, the entries do not
    with pytest.raises(NonFiniteWeightsError, match=r"'bad.weight' holds nan at \[1, 2\]. .*allow_non"):
        checkpoint.check_finite("bad.weight", checkpoint.read("bad.weight"))
    checkpoint.check_finite("bad.weight", checkpoint.read("bad.weight")[0])
    with pytest.raises(NonFiniteWeightsError):
        checkpoint.state_dict()
    admitted = open_checkpoint(tmp_path / "m.safetensors", allow_nonfinite=True)
    assert_same(admitted.state_dict(), state)
    for dtype in (torch.float16, torch.float64, torch.float8_e5m2, torch.complex64):
        broken = torch.tensor([1.0, float("inf")]).to(dtype)
        with pytest.raises(NonFiniteWeightsError):
            checkpoint.check_finite("ok.weight", broken)
    checkpoint.check_finite("ok.weight", torch.tensor([1, 2]))


def test_the_first_nonfinite_entry_of_a_large_tensor_is_found_in_its_piece(monkeypatch):
    monkeypatch.setattr("modeling_wsl.checkpoints.checkpoint.FINITE_CHECK_BYTES", 64)
    for tensor in (torch.zeros(10, 7, 5), torch.zeros(5, 10, 7).permute(1, 2, 0), torch.zeros(10, 7, 10)[..., ::2]):
        tensor[8, 3, 1] = float("-inf")
        tensor[9, 0, 0] = float("nan")
        with pytest.raises(NonFiniteWeightsError, match=r"'w' holds -inf at \[8, 3, 1\]"):
            open_checkpoint({"w": tensor}).state_dict()


def test_a_file_that_changes_while_it_is_open_is_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(6)}, path)
    checkpoint = open_checkpoint(path)
    path.unlink()
    save_file({"w": torch.ones(2, 3)}, path)
    with pytest.raises(CheckpointError, match="changed while it was open"):
        checkpoint.read("w")
    path.unlink()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("w")


def test_a_checkpoint_is_read_again_after_it_was_closed(tmp_path):
    save_file(weights(), tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    with checkpoint:
        before = checkpoint.read("scale")
    assert before == checkpoint.read("scale") == 0.5
    with pytest.raises(KeyError, match="no tensor 'absent'"):
        checkpoint.read("absent")


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(NonFiniteWeightsError("a/b", "is bad", "Mend it")))
    assert isinstance(error, NonFiniteWeightsError) and str(error) == "a/b: is bad. Mend it."
    assert (error.source, error.reason) == ("a/b", "is bad")


def test_a_subfolder_is_opened_and_cannot_leave_the_folder(tmp_path):
    (tmp_path / "model" / "unet").mkdir(parents=True)
    save_file(weights(), tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(weights(), tmp_path / "model.safetensors")
    assert_same(open_checkpoint(tmp_path / "model", subfolder="unet").state_dict(), weights())
    for outside in ("..", "absent", "unet/../.."):
        with pytest.raises(CheckpointError, match="has no folder"):
            open_checkpoint(tmp_path / "model", subfolder=outside)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads anonymous memory from /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_large_tensor_is_read_slice_by_slice_without_anonymous_memory(suffix, tmp_path):
    def anonymous() -> int:
        return int(re.search(r"Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])

    path = tmp_path / f"m.{suffix}"
    state = {"big": torch.ones(1 << 13, 1 << 11)}  # 64 MiB
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    del state
    before = anonymous()
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.read("big")
        assert sum(float(tensor[start : start + 1024].sum()) for start in range(0, len(tensor), 1024)) == 1 << 24
        checkpoint.sha256()
        checkpoint.state_dict()
        assert anonymous() - before < 16 << 10


def test_what_is_no_source_is_told(tmp_path):
    with pytest.raises(TypeError, match="not int"):
        open_checkpoint(3)
    with pytest.raises(CheckpointError, match="is no file or folder.*Hub id"):
        open_checkpoint("models/typo.safetensors")
    with pytest.raises(CheckpointError, match="holds no state dict: a mapping of 1 entries .'a': ndarray"):
        open_checkpoint({"a": torch.zeros(2).numpy()})
    with pytest.raises(CheckpointError, match="names a tensor by the int '3'"):
        open_checkpoint({3: torch.zeros(2)})
    with pytest.raises(CheckpointError, match="'w' is on the meta device"):
        open_checkpoint({"w": torch.zeros(2, device="meta")})
    with pytest.raises(CheckpointError, match="'w' is stored as sparse_coo.*to_dense"):
        open_checkpoint({"w": torch.eye(3).to_sparse()})
    with pytest.raises(CheckpointError, match="'fc._packed' packs tensors into a tuple.*quantized"):
        open_checkpoint({"scale": torch.ones(1), "fc.w": torch.ones(2), "fc._packed": (torch.ones(3), None)})
    assert isinstance(open_checkpoint({"w": torch.zeros(2)}), Checkpoint)
    assert re.match(
        r"Checkpoint\('<state dict>', 1 tensors, 2 parameters\)", repr(open_checkpoint({"w": torch.zeros(2)}))
    )
