"""Which models a user's paths and names stand for, and what their files say of them."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from part_fixtures import write_zero
from zoo_fixtures import add_model, tiny_state

from datasets_scripts.model_facts import find_facts
from datasets_scripts.sources import expand_sources
from datasets_scripts.tokenize_config import TokenizeConfig, TokenizeError, parse_size


def weights(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    return path


def ids(*sources) -> list[str]:
    return [model.model_id for model in expand_sources(sources)]


def test_a_folder_is_searched_to_any_depth_in_order_of_names(tmp_path):
    weights(tmp_path / "zoo" / "b" / "model.safetensors")
    weights(tmp_path / "zoo" / "a" / "deep" / "model.safetensors")
    weights(tmp_path / "zoo" / "run" / "epoch_2.safetensors")
    weights(tmp_path / "zoo" / "run" / "epoch_1.safetensors")
    weights(tmp_path / "zoo" / ".cache" / "hidden.safetensors")
    (tmp_path / "zoo" / "notes.md").write_text("a zoo")
    (tmp_path / "zoo" / "graph.onnx").write_bytes(b"\x08\x07")
    (tmp_path / "zoo" / "config.json").write_text("{}")  # it describes the collection
    expected = ["a/deep", "b", "graph.onnx", "run/epoch_1.safetensors", "run/epoch_2.safetensors"]
    assert ids(tmp_path / "zoo") == expected


def test_shards_and_adapters_are_one_model_each(tmp_path):
    weights(tmp_path / "zoo" / "big" / "model-00001-of-00002.safetensors")
    weights(tmp_path / "zoo" / "big" / "model-00002-of-00002.safetensors")
    weights(tmp_path / "zoo" / "lora" / "adapter_model.safetensors")
    (tmp_path / "zoo" / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "zoo" / "empty" / "sub").mkdir(parents=True)
    assert ids(tmp_path / "zoo") == ["big", "lora"]


def test_each_checkpoint_of_a_trainer_is_a_model_and_its_states_are_none(tmp_path):
    for name in ("", "checkpoint-500", "checkpoint-1000"):
        weights(tmp_path / "run" / name / "model.safetensors")
        (tmp_path / "run" / name / "config.json").write_text("{}")
        for state in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({}, tmp_path / "run" / name / state)
    (tmp_path / "run" / "onnx").mkdir()
    (tmp_path / "run" / "onnx" / "model.onnx").write_bytes(b"x")
    assert ids(tmp_path / "run") == ["run", "checkpoint-1000", "checkpoint-500"]


def test_each_component_of_a_diffusers_pipeline_is_a_model(tmp_path):
    for name in ("unet", "vae"):
        weights(tmp_path / "sd" / name / "diffusion_pytorch_model.fp16.safetensors")
        (tmp_path / "sd" / name / "config.json").write_text("{}")
    (tmp_path / "sd" / "scheduler").mkdir()
    (tmp_path / "sd" / "scheduler" / "scheduler_config.json").write_text("{}")
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    assert ids(tmp_path / "sd") == ["unet", "vae"]


def test_a_folder_of_parts_is_one_model(tmp_path):
    state = tiny_state(0)
    write_zero(tmp_path / "zoo" / "zero", state, 3, 2)
    for rank in range(2):
        torch.save(state, weights(tmp_path / "zoo" / "ranks" / f"model_world_size_2_rank_{rank}.pt"))
        torch.save({}, tmp_path / "zoo" / "ranks" / f"optim_world_size_2_rank_{rank}.pt")
    dcp = tmp_path / "zoo" / "run" / "pytorch_model_fsdp_0"
    dcp.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp"):
        (dcp / name).write_bytes(b"x")
    assert ids(tmp_path / "zoo") == ["ranks", "run", "zero"]


def test_files_without_a_suffix_are_models_by_their_content(tmp_path):
    for step in (10, 20):
        folder = tmp_path / "zoo" / "trial_0" / f"checkpoint_{step:06d}"
        folder.mkdir(parents=True)
        torch.save({"weight": torch.ones(3)}, folder / "checkpoints")
        torch.save({"state": {}}, folder / "optimizer")
    (tmp_path / "zoo" / "trial_0" / "params.json").write_text("{}")
    (tmp_path / "zoo" / "LICENSE").write_text("free")
    assert ids(tmp_path / "zoo") == ["trial_0/checkpoint_000010", "trial_0/checkpoint_000020"]


def test_links_to_a_parent_or_to_each_other_end_the_walk(tmp_path):
    for name in ("a", "b", "c"):
        weights(tmp_path / "zoo" / name / "model.safetensors")
        for other in (".", "a", "b", "c"):
            (tmp_path / "zoo" / name / f"to_{other.strip('.')}").symlink_to(tmp_path / "zoo" / other)
    weights(tmp_path / "elsewhere" / "d" / "model.safetensors")
    (tmp_path / "elsewhere" / "d" / "back").symlink_to(tmp_path)
    (tmp_path / "zoo" / "linked").symlink_to(tmp_path / "elsewhere")
    assert ids(tmp_path / "zoo") == ["a", "b", "c", "linked/d"]


def test_a_changed_part_changes_the_fingerprint(tmp_path):
    write_zero(tmp_path / "zero", tiny_state(0), 2, 2)
    (model,) = expand_sources([tmp_path / "zero"])
    before = model.fingerprint()
    (path,) = (tmp_path / "zero" / "global_step10").glob("*rank_1*")
    path.write_bytes(path.read_bytes() + b" ")
    assert model.fingerprint() != before


def test_the_same_model_named_twice_is_one(tmp_path, monkeypatch):
    weights(tmp_path / "zoo" / "one" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert ids("zoo", "zoo/one", tmp_path / "zoo" / "one") == ["one"]


def test_an_id_in_model_json_wins_over_the_folder_s_name(tmp_path):
    add_model(tmp_path / "zoo", "folder", tiny_state(0), id="org--model")
    assert ids(tmp_path / "zoo") == ["org--model"]


def test_lists_name_models_with_facts_and_relative_paths(tmp_path):
    weights(tmp_path / "zoo" / "one" / "model.safetensors")
    entries = [
        {"source": "zoo/one", "model_id": "uno", "license": "mit", "family": "toy"},
        {"source": "org/name", "revision": "v2"},
        "timm/resnet18.a1_in1k",
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    (tmp_path / "list.txt").write_text("# two models\nzoo/one\norg/name@v2  # pinned\n")
    models = expand_sources([tmp_path / "list.json"])
    assert [m.model_id for m in models] == ["uno", "org/name", "timm/resnet18.a1_in1k"]
    assert [m.revision for m in models] == [None, "v2", None]
    assert models[0].facts == {"license": "mit", "family": "toy"}
    assert models[0].path == tmp_path / "zoo" / "one"
    assert expand_sources([tmp_path / "list.jsonl"]) == models
    assert [(m.model_id, m.revision) for m in expand_sources([tmp_path / "list.txt"])] == [
        ("one", None),
        ("org/name", "v2"),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"license": "mit"}, "entry 1 is neither an id nor an object with `source`"),
        ({"source": "a/b", "licence": "mit"}, "entry 1: licence='mit'; known are"),
        ({"source": "a/b", "family": 3}, "entry 1: family=3"),
        (7, "entry 1 is neither"),
    ],
)
def test_a_list_with_an_odd_entry_is_refused_by_its_number(tmp_path, entry, message):
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    with pytest.raises(TokenizeError, match=message):
        expand_sources([tmp_path / "list.json"])


def test_names_that_stand_for_nothing_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizeError, match="holds no model"):
        expand_sources([tmp_path / "empty"])
    with pytest.raises(TokenizeError, match="no such file or folder, and it is not a Hub id"):
        expand_sources(["models/typo.safetensors"])
    with pytest.raises(TokenizeError, match="No sources"):
        expand_sources([])


def test_two_models_with_one_id_are_refused_with_both_places(tmp_path):
    for root in ("a", "b"):
        weights(tmp_path / root / "one" / "model.safetensors")
    with pytest.raises(TokenizeError, match="2 models have the id 'one'.*/a/one.*/b/one"):
        expand_sources([tmp_path / "a", tmp_path / "b"])


def test_a_fingerprint_changes_with_the_files_and_with_nothing_else(tmp_path):
    path = weights(tmp_path / "zoo" / "one" / "model.safetensors")
    (model,) = expand_sources([tmp_path / "zoo"])
    before = model.fingerprint()
    assert model.fingerprint() == before
    path.write_bytes(path.read_bytes() + b" ")
    assert model.fingerprint() != before


def test_the_record_beside_a_checkpoint_file_belongs_to_its_fingerprint(tmp_path):
    path = weights(tmp_path / "run" / "epoch_1.safetensors")
    (model,) = expand_sources([path])
    before = model.fingerprint()
    path.with_suffix(".json").write_text('{"owner": "ada"}')
    assert model.fingerprint() != before


def facts_of(path: Path, config=None, library=None, commit=None):
    (model,) = expand_sources([path])
    return find_facts(model, config or {}, library, commit)


def test_facts_come_from_model_json_config_and_card_in_this_order(tmp_path):
    path = add_model(tmp_path, "net", tiny_state(0), repo="ada/nets", license="MIT", commit="c0ffee")
    (path / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: image-classification\n---\n# A net\n")
    facts = facts_of(path, {"model_type": "vit"}, "transformers")
    assert (facts.owner, facts.license, facts.revision) == ("ada", "MIT", "c0ffee")
    assert (facts.library, facts.family, facts.task) == ("transformers", "vit", "image-classification")
    assert facts.source == "net"


def test_facts_of_a_timm_folder(tmp_path):
    path = weights(tmp_path / "models--timm--resnet18" / "model.safetensors").parent
    config = {"architecture": "resnet18", "pretrained_cfg": {"license": "apache-2.0"}}
    facts = facts_of(path, config, "timm")
    assert (facts.owner, facts.license, facts.library) == ("timm", "apache-2.0", "timm")
    assert (facts.architecture, facts.family) == ("resnet18", "resnet")


def test_an_adapter_names_its_base(tmp_path):
    path = weights(tmp_path / "lora" / "adapter_model.safetensors").parent
    facts = facts_of(path, {"peft_type": "LORA", "base_model_name_or_path": "org/base"}, "peft")
    assert (facts.architecture, facts.base_model) == ("lora of org/base", "org/base")


def test_a_checkpoint_file_has_its_record_beside_it(tmp_path):
    path = weights(tmp_path / "run" / "epoch_1.safetensors")
    weights(tmp_path / "run" / "epoch_2.safetensors")
    path.with_suffix(".json").write_text(json.dumps({"owner": "ada", "family": "toy"}))
    first, second = (find_facts(m, {}, None, None) for m in expand_sources([tmp_path / "run"]))
    assert (first.owner, first.family) == ("ada", "toy")
    assert (second.owner, second.family, second.license) == (None, "unknown", None)
    assert second.source == "run/epoch_2.safetensors"  # no folder above the one that was named


def test_damaged_records_cost_the_facts_not_the_model(tmp_path, caplog):
    path = weights(tmp_path / "net" / "model.safetensors").parent
    (path / "model.json").write_text("{")
    (path / "README.md").write_text("---\nlicense: [mit\n---\n")
    facts = facts_of(path)
    assert (facts.owner, facts.license) == (None, None)
    assert "its facts are left out" in caplog.text
    assert "front matter of README.md is left out" in caplog.text


@pytest.mark.parametrize("size", ["500", "1.5GB", "MB", "-1MB", "0MB", "10TiB"])
def test_sizes_that_cannot_be_read_are_refused(size):
    with pytest.raises(TokenizeError, match="write it like 500MB"):
        parse_size("max_shard_size", size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 5000}, "window_size is 5000; rows hold 1 to 4096 tokens"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is not known; choose one of float16, float32"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"token_size": 1 << 16}, "token_size is 65536"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(TokenizeError, match=message):
        TokenizeConfig(**options)
