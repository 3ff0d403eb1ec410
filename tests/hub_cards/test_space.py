"""The Space: what it computes and refuses, all of which works without gradio."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from packaging.requirements import Requirement
from safetensors.torch import save, save_file

import hub_cards
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel


SPACE = Path(hub_cards.__file__).parent / "space"
sys.path.insert(0, str(SPACE))  # where a Space runs
from comparison import (  # noqa: E402
    EmbeddedModel,
    Embedder,
    InputError,
    Settings,
    check_repository,
    check_upload,
    compare,
    cosine,
    stated_facts,
)


def weights(seed, names=("stem", "head")):
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(16, 20, generator=generator) for name in names}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "backbone"
    torch.manual_seed(0)
    sizes = {"token_size": 16, "window_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    WSLModel(WSLConfig(**sizes, latent_size=8)).save_pretrained(folder)
    WSLFeatureExtractor(token_size=16).save_pretrained(folder)
    return Embedder(Settings(str(folder), None, max_bytes=100_000))


def test_a_model_of_the_hub_and_a_file_are_embedded_and_compared(hub, embedder, tmp_path):
    card = "---\nlicense: mit\nlibrary_name: timm\nbase_model: lab/base\n---\n"
    commit = hub.add("lab/net", {"model.safetensors": save(weights(0)), "README.md": card})
    save_file(weights(0), tmp_path / "same.safetensors")
    save_file(weights(1, ("stem", "tail")), tmp_path / "other.safetensors")
    first = embedder.embed("lab/net", None)
    same, other = (embedder.embed("", str(tmp_path / f"{name}.safetensors")) for name in ("same", "other"))
    assert first.num_parameters == 640
    assert first.said == {"license": "mit", "library": "timm", "base model": "lab/base", "commit": commit[:12]}

    shuffled = embedder.embed_shuffled(same)
    found = compare(first, same, shuffled)
    assert found.cosine == pytest.approx(1, abs=1e-5)
    assert found.control == pytest.approx(cosine(first.embedding, shuffled.embedding))
    assert found.control < found.cosine
    assert {layer.name for layer in found.layers} == {"stem", "head"}
    assert all(layer.control < layer.cosine for layer in found.layers)
    assert (found.only_first, found.only_second) == (0, 0)

    apart = compare(first, other, embedder.embed_shuffled(other))
    assert [layer.name for layer in apart.layers] == ["stem"]
    assert (apart.only_first, apart.only_second) == (1, 1)
    assert apart.cosine < found.cosine


def test_the_control_keeps_shapes_and_statistics_and_is_the_same_each_time(embedder, tmp_path, monkeypatch):
    save_file({**weights(0), "steps": torch.tensor(3)}, tmp_path / "net.safetensors")
    model = embedder.embed("", str(tmp_path / "net.safetensors"))
    given = []
    real = embedder.pipeline.__call__
    monkeypatch.setattr(
        embedder, "pipeline", lambda source, **options: given.append(source) or real(source, **options)
    )
    once, again = embedder.embed_shuffled(model), embedder.embed_shuffled(model)
    assert np.array_equal(once.embedding, again.embedding)
    assert not np.array_equal(once.embedding, model.embedding)
    for name, tensor in weights(0).items():
        assert given[0][name].shape == tensor.shape
        assert not torch.equal(given[0][name], tensor)
        assert torch.equal(given[0][name].flatten().sort().values, tensor.flatten().sort().values)
    assert given[0]["steps"] == 3


def test_layers_are_listed_from_the_least_alike_and_a_zero_layer_has_no_cosine():
    def model(**parts):
        layers = {name: np.array(values, np.float32) for name, values in parts.items()}
        return EmbeddedModel("net", sum(layers.values()), layers, 1, 1, {}, ())

    first = model(a=[1, 0], b=[1, 1], c=[0, 0], d=[0, 1])
    second = model(a=[1, 0], b=[1, -1], c=[1, 0], e=[1, 1])
    found = compare(first, second, second)
    assert [(layer.name, layer.cosine) for layer in found.layers] == [("c", None), ("b", 0.0), ("a", 1.0)]
    assert (found.only_first, found.only_second) == (1, 1)
    assert cosine(np.zeros(2), np.ones(2)) is None


@pytest.mark.parametrize(
    ("hub_id", "message"),
    [
        ("lab/large", "lab/large: 0 MB of weights; this Space reads up to 0 MB"),
        ("lab/sharded", "lab/sharded: 0 MB of weights"),
        ("lab/pickle", "lab/pickle: it has no model.safetensors"),
        ("lab/gated", "lab/gated: its owner gives access on request"),
        ("lab/nothing", "lab/nothing: there is no such public model"),
        ("lab/small@v9", "lab/small: it has no revision 'v9'"),
        ("small", "'small' is no Hub id"),
        ("lab/broken", "lab/broken cannot be read: "),
        ("", "Give each model either a Hub id or a file"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason_and_not_downloaded(hub, embedder, hub_id, message):
    shard = "model-0000{}-of-00002.safetensors"
    hub.add("lab/small", {"model.safetensors": save(weights(0))})
    hub.add("lab/large", {"model.safetensors": b"x" * 100_001})
    hub.add("lab/sharded", {shard.format(1): b"x" * 60_000, shard.format(2): b"x" * 60_000})
    hub.add("lab/pickle", {"pytorch_model.bin": b"x"})
    hub.add("lab/gated", {"model.safetensors": save(weights(0))}, gated="auto")
    hub.add("lab/broken", {"model.safetensors": b"\xff" * 64})
    with pytest.raises(InputError) as error:
        embedder.embed(hub_id, None)
    assert str(error.value).startswith(message)
    if hub_id != "lab/broken":
        assert not [request for request in hub.requests if "/resolve/" in request]


def test_uploads_are_safetensors_of_a_limited_size_and_not_given_beside_an_id(embedder, tmp_path):
    (tmp_path / "net.pt").write_bytes(b"x")
    (tmp_path / "net.safetensors").write_bytes(b"x" * 100_001)
    with pytest.raises(InputError, match="only .safetensors files are read; pickles can run code"):
        check_upload(str(tmp_path / "net.pt"), 10)
    with pytest.raises(InputError, match="`hf-wsl embed` on a machine of yours has no limit"):
        embedder.embed("", str(tmp_path / "net.safetensors"))
    with pytest.raises(InputError, match="either a Hub id or a file"):
        embedder.embed("lab/net", str(tmp_path / "net.safetensors"))


def test_a_hub_that_does_not_answer_is_said(hub):
    hub.add("lab/net", {"model.safetensors": b""})
    hub.fault("GET /api/models/lab/net", times=-1, status=500)
    with pytest.raises(InputError, match="lab/net: the Hub does not answer .* Try again"):
        check_repository("lab/net", None, 10)


def test_without_a_backbone_the_space_says_which_variable_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("WSL_BACKBONE", raising=False)
    settings = Settings.from_environment()
    assert settings == Settings(str(SPACE / "backbone"), None, 500_000_000)
    with pytest.raises(InputError, match="Set its variable WSL_BACKBONE"):
        Embedder(settings)
    monkeypatch.setenv("WSL_BACKBONE", str(tmp_path))
    with pytest.raises(InputError, match="cannot be loaded"):
        Embedder(Settings.from_environment())


def test_what_a_model_s_page_says_is_passed_on_and_nothing_is_added(hub):
    hub.add("lab/bare", {"model.safetensors": save(weights(0))})
    info, names = check_repository("lab/bare", None, 10_000)
    assert names == ["model.safetensors"]
    assert set(stated_facts(info)) == {"commit"}


def test_the_front_matter_names_files_that_are_there_and_requirements_can_be_read():
    front = metadata_load(SPACE / "README.md")
    assert (front["sdk"], front["license"]) == ("gradio", "apache-2.0")
    assert (SPACE / front["app_file"]).is_file()
    lines = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("--")]
    names = {Requirement(line).name for line in lines}
    sources = [ast.parse(path.read_text()) for path in SPACE.glob("*.py")]
    imports = {
        name.split(".")[0]
        for tree in sources
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    # gradio comes with the Space's sdk
    assert imports - set(sys.stdlib_module_names) - {"gradio", "comparison"} <= {n.replace("-", "_") for n in names}


def test_the_page_uses_only_what_the_comparison_offers():
    import comparison

    nodes = ast.walk(ast.parse((SPACE / "app.py").read_text()))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "comparison"]
    taken = [alias.name for node in imports for alias in node.names]
    assert taken
    for name in taken:
        assert getattr(comparison, name)
