"""Backbones, models and anchors by their Hub ids: Auto classes, pipelines and commands, revisions, tokens, errors."""

import json

import pyarrow.parquet as pq
import pytest
import timm
import torch
from command_line import hf_wsl
from fresh_process import run_fresh
from safetensors.torch import load, save
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForPreTraining, pipeline

from modeling_wsl import CheckpointError, WSLConfig, WSLFeatureExtractor, WSLForPreTraining, WSLModel, open_checkpoint
from modeling_wsl.loading import find_backbone, load_pipeline


BACKBONE = "org/hf-wsl-tiny"
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
STATE = {"stem.weight": torch.arange(48.0).reshape(8, 6), "stem.bias": torch.arange(8.0)}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def backbone_files(folder, token_size=16, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "latent_size": 8, "window_size": 32}
    WSLForPreTraining(WSLConfig(token_size=token_size, **sizes)).save_pretrained(folder)
    WSLFeatureExtractor(token_size=token_size).save_pretrained(folder)
    return files_of(folder)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return backbone_files(tmp_path_factory.mktemp("old"), token_size=16)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    return backbone_files(tmp_path_factory.mktemp("new"), token_size=24, seed=1)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Two trainings of one small timm model, each as the files of a Hub model."""
    found = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp(f"vit{seed}")
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", **TINY_VIT)
        timm.models.save_for_hf(model, folder, model_args=TINY_VIT, safe_serialization=True)
        found.append(files_of(folder))
    return found


@pytest.fixture
def commits(hub, old, new):
    """A backbone whose branch has moved: (the tag v1, main)."""
    first = hub.add(BACKBONE, old)
    hub.find(BACKBONE).revisions["v1"] = first
    return first, hub.add(BACKBONE, new)


def error_of(*arguments):
    """The one line that the command ends with."""
    refused = hf_wsl(*arguments)
    lines = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert refused.exit_code == 1 and len(lines) == 1 and refused.stderr.splitlines()[-1] == lines[0]
    return lines[0]


def test_the_auto_classes_load_an_id_at_its_newest_and_at_any_named_state(commits):
    first, newest = commits
    for revision, token_size, commit in (("main", 24, newest), ("v1", 16, first), (first, 16, first)):
        where = {"revision": revision}
        assert AutoConfig.from_pretrained(BACKBONE, **where).token_size == token_size
        assert AutoFeatureExtractor.from_pretrained(BACKBONE, **where).token_size == token_size
        model = AutoModel.from_pretrained(BACKBONE, **where)
        assert type(model) is WSLModel and model.config._commit_hash == commit
        assert type(AutoModelForPreTraining.from_pretrained(BACKBONE, **where)) is WSLForPreTraining
        for task in ("weight-embedding", "weight-generation"):
            loaded = pipeline(task, model=BACKBONE, **where)
            assert loaded.model.config.token_size == loaded.feature_extractor.token_size == token_size


def test_what_was_loaded_computes_what_the_saved_folder_does(commits, new, tmp_path):
    for name, data in new.items():
        (tmp_path / name).write_bytes(data)
    by_id, by_folder = (pipeline("weight-embedding", model=name)(STATE) for name in (BACKBONE, str(tmp_path)))
    assert (by_id["embedding"] == by_folder["embedding"]).all()


def test_a_branch_that_moves_while_a_backbone_is_loaded_mixes_nothing(hub, old, new):
    hub.add("org/moving", new)
    moved = hub.fault("/org/moving/resolve/.*/adapter_config.json", do=lambda hub: hub.add("org/moving", old))
    embedder = load_pipeline("weight-embedding", "org/moving")
    assert moved.fired == 1
    assert embedder.model.config.token_size == embedder.feature_extractor.token_size == 24
    assert embedder(STATE)["embedding"].shape == (8,)
    assert load_pipeline("weight-embedding", "org/moving").model.config.token_size == 16


def test_the_pipelines_read_models_anchors_and_targets_by_id_and_revision(hub, commits, vit):
    trained = [hub.add("ada/vit", files) for files in vit]
    hub.find("ada/vit").revisions["v1"] = trained[0]
    embedder = pipeline("weight-embedding", model=BACKBONE)
    by_name = [embedder(source)["embedding"] for source in ("ada/vit@v1", "ada/vit@main", "ada/vit")]
    assert (embedder("ada/vit", revision="v1")["embedding"] == by_name[0]).all()
    assert (by_name[0] != by_name[1]).any() and (by_name[1] == by_name[2]).all()

    generator = pipeline("weight-generation", model=BACKBONE, revision="v1")
    (model,) = generator("ada/vit@main", anchors=["ada/vit@v1", f"ada/vit@{trained[1]}"], seed=0)
    assert [anchor["revision"] for anchor in model.provenance["anchors"]] == trained
    assert model.provenance["backbone"]["revision"] == commits[0]
    with pytest.raises(CheckpointError, match="ada/vit: has no revision 'v2' on the Hub"):
        generator("ada/vit@v2", anchors=["ada/vit"])
    with pytest.raises(CheckpointError, match="ada/vit: has no revision 'v2' on the Hub"):
        generator("ada/vit", anchors=["ada/vit@v2"])


def test_a_revision_in_the_name_and_another_one_as_option_contradict(hub):
    first = hub.add("ada/net", {"model.safetensors": save(STATE)})
    newest = hub.add("ada/net", {"model.safetensors": save({"stem.weight": torch.ones(2, 3)})})
    with pytest.raises(CheckpointError, match="names the revision .*, and 'main' is asked for beside it"):
        open_checkpoint(f"ada/net@{first}", revision="main")
    with open_checkpoint(f"ada/net@{first}", revision=first) as checkpoint:
        assert (checkpoint.source, checkpoint.revision) == ("ada/net", first)
    assert open_checkpoint("ada/net@", revision=first).revision == first
    assert open_checkpoint("ada/net@main").revision == newest


def test_private_and_gated_repositories_open_with_a_token_in_python(hub, old, vit):
    for name, access in (("hidden", {"private": True}), ("asked", {"gated_to": ("hf_alice",)})):
        hub.add(f"org/{name}", old, **access)
        hub.add(f"org/{name}-vit", vit[0], **access)
        with pytest.raises(OSError, match="private repository|gated repo"):
            AutoModel.from_pretrained(f"org/{name}")
        with pytest.raises(CheckpointError, match=f"org/{name}-vit: .*on the Hub.*token= in Python"):
            open_checkpoint(f"org/{name}-vit")
        token = {"token": "hf_alice"}
        assert AutoModel.from_pretrained(f"org/{name}", **token).config.token_size == 16
        assert AutoFeatureExtractor.from_pretrained(f"org/{name}", **token).token_size == 16
        generator = pipeline("weight-generation", model=f"org/{name}", **token)
        (model,) = generator(f"org/{name}-vit", anchors=f"org/{name}-vit", **token)
        assert model.target.library == "timm"
        embedder = load_pipeline("weight-embedding", f"org/{name}", **token)
        assert embedder(f"org/{name}-vit", **token)["embedding"].shape == (8,)


def test_the_commands_embed_and_generate_by_id(hub, commits, vit, tmp_path):
    trained = [hub.add("ada/vit", files) for files in vit]
    hub.find("ada/vit").revisions["v1"] = trained[0]
    for revision, commit, token_size in (((), commits[1], 24), (("--revision", "v1"), commits[0], 16)):
        table = tmp_path / f"{token_size}.parquet"
        result = hf_wsl("embed", BACKBONE, "ada/vit@v1", "--output_file", table, *revision)
        assert result.exit_code == 0, result.output
        read = pq.read_table(table)
        assert read.column_names == ["model_id", "revision", "embedding", "x", "y"]
        assert read["revision"].to_pylist() == [trained[0]]
        assert read.schema.metadata[b"backbone_revision"].decode() == commit
        expected = pipeline("weight-embedding", model=BACKBONE, revision=commit)("ada/vit", revision="v1")
        assert read["embedding"].to_pylist()[0] == expected["embedding"].tolist()

        output = tmp_path / f"generated-{token_size}"
        anchors = ("--anchors", "ada/vit@v1", "--anchors", "ada/vit")
        result = hf_wsl("generate", BACKBONE, "ada/vit@v1", *anchors, "--output_dir", output, *revision)
        assert result.exit_code == 0, result.output
        provenance = json.loads((output / "000" / "provenance.json").read_text())
        assert provenance["backbone"]["revision"] == commit
        assert [anchor["revision"] for anchor in provenance["anchors"]] == trained
        loaded = timm.create_model(f"local-dir:{output / '000'}", pretrained=True)
        assert loaded(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_token_of_the_environment_opens_what_the_commands_may_read(hub, old, vit, tmp_path, monkeypatch):
    hub.add("org/own", old, private=True)
    hub.add("org/gated-vit", vit[0], gated_to=("hf_alice",))
    embed = ("embed", "org/own", "org/gated-vit", "--output_file", tmp_path / "table.parquet")
    anchors = ("--anchors", "org/gated-vit", "--output_dir", tmp_path / "generated")
    generate = ("generate", "org/own", "org/gated-vit", *anchors)
    for command in (embed, generate):
        assert "org/own: is neither a local path nor a model on the Hub" in error_of(*command)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    for command in (embed, generate):
        result = hf_wsl(*command)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (
            "org/none",
            (),
            "org/none: is neither a local path nor a model on the Hub. Check the name; for a private one",
        ),
        ("org/gated", (), "org/gated: is a gated repository on the Hub. Accept its terms there, then log in"),
        (BACKBONE, ("--revision", "v9"), f"{BACKBONE}: has no revision 'v9' on the Hub"),
        (f"{BACKBONE}@v9", (), f"{BACKBONE}: has no revision 'v9' on the Hub"),
        ("org/bert", (), "org/bert: is no backbone: its model_type is 'bert'. Name a trained backbone"),
        ("org/weights", (), "org/weights: has no config.json that says what to build"),
        ("nowhere", (), "nowhere: is neither a folder with a config.json nor a Hub id"),
        ("{folder}", (), "is neither a folder with a config.json nor a Hub id"),
        ("{folder}", ("--revision", "v1"), "has no revision 'v1', for it is no Hub id"),
    ],
)
def test_a_backbone_that_cannot_be_had_is_one_line(
    hub, commits, old, tmp_path, monkeypatch, backbone, options, message
):
    hub.add("org/gated", old, gated_to=("hf_alice",))
    hub.add("org/bert", {"config.json": '{"model_type": "bert"}', "model.safetensors": save(STATE)})
    hub.add("org/weights", {"model.safetensors": save(STATE)})
    backbone = str(tmp_path) if backbone == "{folder}" else backbone
    embed = ("embed", backbone, BACKBONE, "--output_file", tmp_path / "out")
    generate = ("generate", backbone, "resnet18", "--anchors", BACKBONE, "--output_dir", tmp_path / "out")
    for command in (embed, generate):
        assert message in error_of(*command, *options)


def test_a_token_that_the_hub_does_not_know_is_named_as_the_fault(hub, old, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "rubbish")
    hub.add("org/open-to-all", old)
    for open_it in (open_checkpoint, find_backbone):
        with pytest.raises(CheckpointError, match="cannot be read: the Hub does not know the access token. Unset HF_"):
            open_it("org/open-to-all")


def test_a_backbone_that_was_loaded_before_needs_no_hub(hub, old):
    hub.add("org/cached", old)
    load_pipeline("weight-embedding", "org/cached")
    hub.failures["/org/cached"] = 500
    again = load_pipeline("weight-embedding", "org/cached")
    assert again(STATE)["embedding"].shape == (8,)


# `None` in sys.modules makes every import of the library fail, installed or not.
WITHOUT_THE_LIBRARY = """
import json, sys
sys.modules["modeling_wsl"] = None
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, pipeline

state = torch.load(sys.argv[1])
found = {}
for name, options in json.loads(sys.argv[2]):
    options["trust_remote_code"] = True
    config = AutoConfig.from_pretrained(name, **options)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    extractor = AutoFeatureExtractor.from_pretrained(name, **options)
    model = AutoModel.from_pretrained(name, **options)
    embedder = pipeline("weight-embedding", model=name, **options)
    generator = pipeline("weight-generation", model=name, **options)
    assert embedder.feature_extractor.token_size == extractor.token_size == config.token_size
    models = generator(state, anchors=[state], seed=0)
    found[name] = [config.token_size, embedder(state)["embedding"].tolist(), len(models)]
print(json.dumps(found))
"""


def test_without_the_library_the_code_of_the_named_state_serves(hub, old, new, tmp_path):
    first = hub.add(BACKBONE, old)
    hub.add(BACKBONE, {**new, "pipelines.py": "raise RuntimeError('code of another state')"})
    hub.add("org/private", new, private=True)
    wanted = [(BACKBONE, {"revision": first}), ("org/private", {"token": "hf_alice"})]
    torch.save(STATE, tmp_path / "state.pt")
    places = {"folder": tmp_path, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    printed = run_fresh(WITHOUT_THE_LIBRARY, tmp_path / "state.pt", json.dumps(wanted), **places)
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    for name, options in wanted:
        expected = pipeline("weight-embedding", model=name, **options)
        token_size, embedding, count = found[name]
        assert token_size == expected.model.config.token_size and count == 1
        torch.testing.assert_close(torch.tensor(embedding), torch.as_tensor(expected(STATE)["embedding"]))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_backbone_that_came_with_a_wrong_byte_is_fetched_again(hub, old, name):
    repository = f"org/damaged-{name.partition('.')[0]}"
    hub.add(repository, old)
    fault = hub.fault(f"GET /{repository}/resolve/.*/{name}", corrupt=-3)
    embedder = load_pipeline("weight-embedding", repository)
    right, stored = load(old["model.safetensors"]), embedder.model.state_dict()
    shared = right.keys() & {f"wsl.{key}" for key in stored} or right.keys() & stored.keys()
    assert shared and all(torch.equal(right[key], stored[key.removeprefix("wsl.")]) for key in shared)
    assert fault.fired == 1 and embedder.feature_extractor.token_size == 16
