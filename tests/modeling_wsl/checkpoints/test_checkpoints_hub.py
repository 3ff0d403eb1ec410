"""Models of the Hub, from a server on loopback: the right files and no others, and errors that say what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save

from modeling_wsl.checkpoints.checkpoint import CheckpointError, open_checkpoint


STATE = {"b.weight": torch.ones(40), "a.weight": torch.zeros(3, 5)}
README = b"# a model"


def torch_bytes(content, tmp_path) -> bytes:
    torch.save(content, tmp_path / "x.bin")
    return (tmp_path / "x.bin").read_bytes()


def test_only_safetensors_and_the_config_are_fetched(hub, tmp_path):
    files = {"model.safetensors": save(STATE), "pytorch_model.bin": torch_bytes(STATE, tmp_path), "README.md": README}
    commit = hub.add("timm/resnet0.a1", files | {"config.json": '{"architecture": "resnet0"}', "onnx/m.onnx": b"x"})
    with open_checkpoint("timm/resnet0.a1") as checkpoint:
        assert checkpoint.source == "timm/resnet0.a1" and checkpoint.revision == commit
        assert checkpoint.library == "timm" and checkpoint.config == {"architecture": "resnet0"}
        assert checkpoint.sha256() == open_checkpoint(STATE).sha256()
    assert hub.downloaded("timm/resnet0.a1") == ["config.json", "model.safetensors"]
    hub.requests.clear()
    open_checkpoint("timm/resnet0.a1")
    assert hub.downloaded("timm/resnet0.a1") == []


def test_a_torch_file_is_taken_where_there_is_no_safetensors_and_it_is_not_run(hub, tmp_path):
    hub.add("org/old", {"pytorch_model.bin": torch_bytes(STATE, tmp_path), "tf_model.h5": b"x"})
    assert list(open_checkpoint("org/old").tensors) == list(STATE)
    hub.add("org/evil", {"pytorch_model.bin": torch_bytes({"w": print}, tmp_path)})
    with pytest.raises(CheckpointError, match="needs code"):
        open_checkpoint("org/evil")


def test_shards_a_subfolder_and_a_revision_are_followed(hub):
    index = {"weight_map": {"a.weight": "s1.safetensors", "b.weight": "s2.safetensors"}}
    shards = {
        "s1.safetensors": save({"a.weight": STATE["a.weight"]}),
        "s2.safetensors": save({"b.weight": STATE["b.weight"]}),
    }
    files = {"model.safetensors.index.json": json.dumps(index), "other.bin": b"x"} | shards
    commit = hub.add("org/big", {f"sub/{name}": data for name, data in files.items()})
    checkpoint = open_checkpoint("org/big", subfolder="sub", revision=commit)
    assert list(checkpoint.tensors) == ["a.weight", "b.weight"] and checkpoint.revision == commit
    assert hub.downloaded("org/big") == [
        "sub/model.safetensors.index.json",
        "sub/s1.safetensors",
        "sub/s2.safetensors",
    ]
    with pytest.raises(CheckpointError, match="org/big: holds no weights that can be read; there is sub/"):
        open_checkpoint("org/big")
    with pytest.raises(CheckpointError, match="has no revision 'v9' on the Hub"):
        open_checkpoint("org/big", revision="v9")
    del files["s2.safetensors"]
    hub.add("org/gap", files)
    with pytest.raises(CheckpointError, match="lacks the shard s2.safetensors"):
        open_checkpoint("org/gap")


def test_an_index_that_leaves_the_folder_is_refused_before_anything_is_fetched(hub):
    index = {"weight_map": {"a.weight": "../../x.safetensors"}}
    hub.add("org/escape", {"model.safetensors.index.json": json.dumps(index)})
    with pytest.raises(CheckpointError, match="is not inside its folder"):
        open_checkpoint("org/escape")
    assert hub.downloaded("org/escape") == ["model.safetensors.index.json"]


def test_an_adapter_is_fetched_without_its_base(hub):
    config = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    hub.add("org/lora", {"adapter_model.safetensors": save(STATE), "adapter_config.json": config})
    checkpoint = open_checkpoint("org/lora")
    assert checkpoint.library == "peft" and checkpoint.config["base_model_name_or_path"] == "org/base"
    assert not any("org/base" in request for request in hub.requests)


def test_the_listed_order_of_the_tensors_comes_along(hub):
    order = ["b.weight", "a.weight"]
    hub.add("org/listed", {"model.safetensors": save(STATE), "model.json": json.dumps({"tensor_order": order})})
    assert list(open_checkpoint("org/listed").tensors) == order
    assert hub.downloaded("org/listed") == ["model.json", "model.safetensors"]


def test_a_timm_architecture_without_a_tag_means_its_default_weights(hub):
    commit = hub.add("timm/resnet18.a1_in1k", {"model.safetensors": save(STATE)})
    assert open_checkpoint("timm/resnet18").revision == commit
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="timm/resnet18000: is neither"):
        open_checkpoint("timm/resnet18000")
    assert not any("resnet18.a1" in request for request in hub.requests)


def test_a_gated_model_needs_its_token(hub):
    hub.add("org/gated", {"model.safetensors": save(STATE)}, gated_to=("hf_reader",))
    with pytest.raises(CheckpointError, match="org/gated: is a gated repository.*token="):
        open_checkpoint("org/gated")
    with pytest.raises(CheckpointError, match="gated"):
        open_checkpoint("org/gated", token="hf_other")
    assert open_checkpoint("org/gated", token="hf_reader").num_parameters == 55


def test_what_the_hub_does_not_have_is_told(hub):
    with pytest.raises(CheckpointError, match="org/none: is neither a local path nor a model on the Hub"):
        open_checkpoint("org/none")
    hub.add("org/graph", {"saved_model.pb": b"x", "config.json": "{}"})
    with pytest.raises(CheckpointError, match="there is config.json, saved_model.pb. saved_model.pb is a TensorFlow"):
        open_checkpoint("org/graph")
    assert hub.downloaded("org/graph") == []
    for name in ("org/none.safetensors", "../none/x", "a/b/c", "none"):
        hub.requests.clear()
        with pytest.raises(CheckpointError, match="is no file or folder"):
            open_checkpoint(name)
        assert hub.requests == []


def test_an_unreachable_hub_falls_back_to_the_cache_and_else_says_so(hub):
    commit = hub.add("org/seen", {"model.safetensors": save(STATE)})
    open_checkpoint("org/seen")
    hub.add("org/unseen", {"model.safetensors": save(STATE)})
    hub.failures["/api/models/org/"] = 500
    assert open_checkpoint("org/seen").revision == commit
    for subfolder in ("gone", "../.."):
        with pytest.raises(CheckpointError, match=f"has no folder '{subfolder}' inside"):
            open_checkpoint("org/seen", subfolder=subfolder)
    with pytest.raises(CheckpointError, match="org/unseen: cannot be downloaded .*500"):
        open_checkpoint("org/unseen")
    hub.failures.clear()
    hub.failures["GET /org/unseen/resolve"] = 403
    with pytest.raises(CheckpointError, match="org/unseen: cannot be downloaded .*403"):
        open_checkpoint("org/unseen")


def test_a_truncated_download_is_refused(hub):
    hub.add("org/cut", {"model.safetensors": save(STATE)[:-4]})
    with pytest.raises(CheckpointError, match="its tensors take 220 bytes, 216 are there"):
        open_checkpoint("org/cut")


def with_data_beside(folder):
    made = Path(__file__).parents[2] / "fixtures" / "checkpoints" / "onnx-external" / "files"
    shutil.copytree(made, folder, dirs_exist_ok=True)


def in_distributed_parts(folder):
    torch.distributed.checkpoint.save(STATE, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("write", [with_data_beside, in_distributed_parts])
def test_files_that_are_read_together_come_together(hub, tmp_path, write):
    write(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    hub.add("org/together", files | {"README.md": README})
    assert open_checkpoint("org/together").sha256() == open_checkpoint(tmp_path).sha256()
    assert hub.downloaded("org/together") == sorted(files) and len(files) > 1
