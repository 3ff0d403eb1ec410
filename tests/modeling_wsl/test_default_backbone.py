"""The backbone that comes with the library."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, pipeline

from modeling_wsl import DEFAULT_BACKBONE, WSLConfig, WSLFeatureExtractor, WSLForPreTraining, WSLModel, embed_model
from modeling_wsl.loading import DEFAULT_FOLDER, find_backbone, load_pipeline


SIZE = 32_000_000  # bytes


def test_it_is_small_and_has_a_card_with_the_licenses_of_what_it_was_trained_on():
    assert sum(path.stat().st_size for path in DEFAULT_FOLDER.iterdir()) <= SIZE
    card = (DEFAULT_FOLDER / "README.md").read_text()
    facts = json.loads((DEFAULT_FOLDER / "training_sources.json").read_text())
    assert len(facts["models"]) > 90
    for license in {model["license"] for model in facts["models"]}:
        assert license.lower() in card.lower()
    for source in {model["source"] for model in facts["models"]}:
        assert source in card
    assert WSLConfig.from_pretrained(DEFAULT_FOLDER).latent_code == "matrix"


def test_it_is_used_where_no_model_is_named():
    net = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    embedder = pipeline("weight-embedding", pooling="mean")
    embedding = embedder(net)["embedding"]
    assert embedding.shape == (128,) and np.isfinite(embedding).all()
    named = load_pipeline("weight-embedding", "default", pooling="mean")
    assert np.array_equal(named(net)["embedding"], embedding)
    assert np.array_equal(load_pipeline("weight-embedding", pooling="mean")(net)["embedding"], embedding)
    (model,) = pipeline("weight-generation")(net, anchors=[net], bandwidth=0.0, progress=False)
    for name, value in net.state_dict().items():
        assert (model.state_dict[name] - value).norm() < 0.7 * value.norm()


def test_without_a_backbone_of_one_s_own_models_are_embedded_by_their_sections(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    embedder = pipeline("weight-embedding")
    result, own = embedder(tmp_path / "net.pt"), embed_model(net)
    assert result["embedding"].shape == (529,)
    assert np.array_equal(result["embedding"], np.concatenate([own.profile, own.position, own.probe]))
    for section in ("profile", "position", "probe"):
        assert np.array_equal(result[section], getattr(own, section))
    assert result["layers"] == ("0.weight", "2.weight") and result["manifest"].num_parameters == 1385
    assert embedder([net, "missing.pt"])[1]["index"] == 1
    with pytest.raises(ValueError, match="pooling='median' is not known; choose one of 'sections', 'mean'"):
        embedder(net, pooling="median")


def test_the_library_s_own_classes_take_its_name_and_transformers_its_path():
    for kind in (WSLConfig, WSLModel, WSLForPreTraining, WSLFeatureExtractor):
        assert type(kind.from_pretrained("default")) is kind
    assert type(AutoModel.from_pretrained(DEFAULT_BACKBONE)) is WSLModel


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    WSLConfig(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path / "default")
    monkeypatch.chdir(tmp_path)
    assert find_backbone("default") == ("default", None)
    assert WSLConfig.from_pretrained("default").hidden_size == 16
    monkeypatch.chdir("/")
    assert find_backbone("default") == (str(DEFAULT_FOLDER), None)
