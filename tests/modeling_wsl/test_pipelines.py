import json
from collections.abc import Sequence

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from fresh_process import run_fresh
from halo_reference import encode_haloed
from safetensors.torch import save_file
from torch import nn
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling_wsl import CheckpointError, WSLConfig, WSLFeatureExtractor, WSLForPreTraining, WSLModel, open_checkpoint
from modeling_wsl.pipelines import WeightEmbeddingPipeline, WeightGenerationPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone of some kB, saved as a training run saves it: with its head, and with its feature extractor."""
    torch.manual_seed(0)
    config = WSLConfig(
        token_size=48, latent_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, window_size=32
    )
    path = tmp_path_factory.mktemp("backbone")
    WSLForPreTraining(config).save_pretrained(path)
    WSLFeatureExtractor(token_size=48).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def embedder(folder):
    return pipeline("weight-embedding", model=str(folder), device="cpu", progress=False)


@pytest.fixture(scope="module")
def generator(folder):
    return pipeline("weight-generation", model=str(folder), device="cpu", progress=False)


def net(seed: int = 0, width: int = 30) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 70))


def test_a_folder_needs_no_trust_where_the_library_is_imported(embedder, generator):
    assert type(embedder) is WeightEmbeddingPipeline
    assert type(generator) is WeightGenerationPipeline
    assert type(embedder.model) is WSLModel
    assert embedder.feature_extractor.token_size == 48


def test_an_embedding_is_the_mean_of_all_haloed_latents_and_per_layer_of_its_own(embedder):
    model = net()
    result = embedder(model)
    batch = embedder.feature_extractor(model)
    latents = encode_haloed(embedder.model, batch["tokens"], batch["token_mask"], batch["positions"], 32, 64)
    assert result["embedding"].dtype == np.float32
    np.testing.assert_allclose(result["embedding"], latents.mean(0).numpy(), atol=1e-5)
    assert result["manifest"] == batch["manifest"]
    assert list(result["per_layer"]) == ["0", "1", "3"]
    for index, name in enumerate(result["per_layer"]):
        mean = latents[batch["positions"][:, 1] == index].mean(0)
        np.testing.assert_allclose(result["per_layer"][name], mean.numpy(), atol=1e-5)
        assert result["per_layer"][name].shape == (20,)


def test_options_of_the_windows_reach_the_backbone(embedder):
    model = net()
    batch = embedder.feature_extractor(model)
    latents = encode_haloed(embedder.model, batch["tokens"], batch["token_mask"], batch["positions"], 16, 2)
    small = embedder(model, window_size=16, halo=2, batch_size=3)["embedding"]
    np.testing.assert_allclose(small, latents.mean(0).numpy(), atol=1e-5)
    assert not np.allclose(small, embedder(model)["embedding"], atol=1e-6)
    low = embedder(model, autocast_dtype="bfloat16")["embedding"]
    np.testing.assert_allclose(low, embedder(model)["embedding"], atol=0.02)


def test_moments_and_layers_are_pooled_on_request(embedder):
    plain = embedder(net())
    np.testing.assert_array_equal(embedder(net(), pooling="moments")["embedding"][:20], plain["embedding"])
    layers = embedder(net(), pooling="layers")["embedding"]
    np.testing.assert_array_equal(layers, np.concatenate(list(plain["per_layer"].values())))
    with pytest.raises(ValueError, match="pooling='median' is not known"):
        embedder(net(), pooling="median")


def test_a_list_of_sources_gives_a_list_and_every_kind_of_source_the_same_embedding(embedder, tmp_path):
    model = net()
    order = {"tensor_order": json.dumps(list(model.state_dict()))}
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata=order)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    sources = [model, model.state_dict(), str(tmp_path / "model.safetensors"), tmp_path / "model.pt", net(seed=1)]
    results = embedder(sources, batch_size=2)
    assert isinstance(results, list)
    for result in results[:-1]:
        np.testing.assert_array_equal(result["embedding"], results[0]["embedding"])
    assert not np.allclose(results[-1]["embedding"], results[0]["embedding"], atol=1e-5)
    assert embedder([]) == []
    assert [r["embedding"].shape for r in embedder(source for source in sources[:2])] == [(20,), (20,)]


def test_a_model_is_embedded_window_by_window(embedder, tmp_path):
    """The tokens of the whole model are never in memory: the largest tensor the backbone sees is one batch."""
    torch.save(net(width=2000).state_dict(), tmp_path / "model.pt")
    seen = []
    hook = embedder.model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    result = embedder(tmp_path / "model.pt", halo=4, batch_size=4)
    hook.remove()
    assert result["manifest"].num_tokens > 4000
    assert max(batch for batch, _ in seen) == 4
    assert {length for _, length in seen} == {40}


def test_generation_with_five_candidates_returns_generated_models_in_order(generator):
    anchors = [net(seed) for seed in (1, 2)]
    models = generator(net(), anchors=anchors, num_samples=3, seed=0, batch_norm_images=torch.randn(8, 3, 3, 3))
    assert [model.provenance["draw"] for model in models] == [0, 1, 2]
    assert models[0].provenance["tensors"]["1.running_var"] == "re-estimated"
    assert models[0].provenance["backbone"]["name"] == generator.model.name_or_path
    assert models[0].provenance["window_size"] == 32
    again = generator(net(), anchors=anchors, num_samples=1, seed=0, batch_norm_images=torch.randn(8, 3, 3, 3))
    assert torch.equal(models[0].state_dict["0.weight"], again[0].state_dict["0.weight"])
    assert models[0].instantiate()(torch.randn(2, 3, 3, 3)).shape == (2, 70)


def test_a_timm_name_and_a_list_of_targets_are_generated(generator):
    anchor = timm.create_model("test_resnet", num_classes=3)
    (models,) = generator(["test_resnet"], anchors=anchor, num_classes=3, window_size=512, batch_size=2)
    assert models[0].instantiate().num_classes == 3
    assert models[0].provenance["target"]["name"] == "test_resnet"


def test_mistakes_in_a_call_are_refused_by_name(embedder, generator, folder):
    with pytest.raises(ValueError, match="anchors is empty: give one trained model"):
        generator("test_resnet")
    with pytest.raises(TypeError, match="labels: of donors, which `images` or a method of fit"):
        generator("test_resnet", anchors=[net()], labels=[1])
    with pytest.raises(TypeError, match="bandwidth: of draws around anchors"):
        generator("test_resnet", anchors=[net()], bandwidth=0.1, method="resize")
    with pytest.raises(TypeError, match="'weight-generation' has no option 'bandwith'; did you mean 'bandwidth'"):
        generator("test_resnet", anchors=[net()], bandwith=0.1)
    with pytest.raises(TypeError, match="no option 'num_sample'; did you mean 'num_samples'"):
        generator([net()], anchors=[net()], num_sample=2)
    with pytest.raises(TypeError, match="'weight-embedding' has no option 'windowsize'; did you mean 'window_size'"):
        embedder([net()], windowsize=3)
    with pytest.raises(TypeError, match="no option 'poolling'; did you mean 'pooling'"):
        pipeline("weight-embedding", model=str(folder), device="cpu", poolling="mean")
    with pytest.raises(ValueError, match="No feature extractor was found"):
        pipeline("weight-embedding", model=WSLModel.from_pretrained(folder), device="cpu")
    with pytest.raises(ValueError, match="token_size=64, the backbone expects 48"):
        model = WSLModel.from_pretrained(folder)
        pipeline("weight-embedding", model=model, feature_extractor=WSLFeatureExtractor(token_size=64), device="cpu")


def test_a_source_whose_floats_are_all_carried_is_refused_by_name(embedder, tmp_path):
    norm = nn.BatchNorm1d(3, affine=False)
    with pytest.raises(CheckpointError, match="<BatchNorm1d>: holds no weights to tokenize"):
        embedder(norm)
    save_file(norm.state_dict(), tmp_path / "norm.safetensors")
    with pytest.raises(CheckpointError, match="norm.safetensors: holds no weights to tokenize"):
        embedder(str(tmp_path / "norm.safetensors"))


def test_one_bad_source_of_many_costs_the_others_nothing(embedder, generator):
    expected = embedder(net())["embedding"]
    first, bad, last = embedder([net(), nn.BatchNorm1d(3, affine=False), net()])
    assert bad["index"] == 1 and "<BatchNorm1d>: holds no weights to tokenize" in bad["error"]
    for result in (first, last):
        np.testing.assert_array_equal(result["embedding"], expected)
    bad, (model,) = generator(["no_such_architecture", net()], anchors=[net()], seed=0)
    assert bad["index"] == 0 and "no_such_architecture" in bad["error"]
    assert set(model.state_dict) == set(net().state_dict())


def test_tuples_and_columns_of_datasets_are_many_sources(embedder, tmp_path):
    torch.save(net().state_dict(), tmp_path / "model.pt")
    table = Dataset.from_dict({"path": [str(tmp_path / "model.pt"), str(tmp_path / "none.pt")]})
    expected = embedder(net())["embedding"]
    column = table["path"]
    for sources in (tuple(column), column, KeyDataset(table, "path"), table.to_iterable_dataset()["path"]):
        results = embedder(sources)
        assert isinstance(results, list) == isinstance(sources, Sequence)
        read, missing = results
        np.testing.assert_array_equal(read["embedding"], expected)
        assert missing["index"] == 1 and "none.pt: is no file or folder" in missing["error"]
    with pytest.raises(TypeError, match="not Dataset"):
        embedder(table)


def test_results_have_one_line_to_show(embedder, generator):
    result = embedder(net())
    assert (
        repr(result)
        == f"WeightEmbedding(embedding=float32[20], per_layer={{3 entries}}, manifest={result['manifest']!r})"
    )
    (model,) = generator(net(), anchors=[net()])
    for shown in (result["manifest"], embedder.feature_extractor(net()), model, model.target, open_checkpoint(net())):
        assert len(repr(shown)) < 120 and "\n" not in repr(shown), shown


def test_a_pretraining_model_works_as_it_is(folder, embedder):
    model = WSLForPreTraining.from_pretrained(folder)
    own = pipeline(
        "weight-embedding", model=model, feature_extractor=embedder.feature_extractor, device="cpu", progress=False
    )
    np.testing.assert_array_equal(own(net())["embedding"], embedder(net())["embedding"])


REMOTE = """
import sys

class WithoutTheLibrary:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_wsl":
            raise ImportError("modeling_wsl is not installed in this process")

sys.meta_path.insert(0, WithoutTheLibrary())
import numpy, torch
from transformers import pipeline
folder, source, target = sys.argv[1:]
options = {"trust_remote_code": True, "device": "cpu", "progress": False}
embedder = pipeline("weight-embedding", model=folder, **options)
assert type(embedder).__module__.startswith("transformers_modules."), type(embedder)
embedder.save_pretrained(target)
generator = pipeline("weight-generation", model=target, **options)
(model,) = generator(source, anchors=[source], seed=2)
weight = model.state_dict["0.weight"].numpy()
numpy.savez(f"{target}/results.npz", embedding=embedder(source)["embedding"], weight=weight)
"""


def test_a_process_without_the_library_embeds_generates_and_saves_again(folder, embedder, generator, tmp_path):
    source = tmp_path / "model.safetensors"
    save_file(net().state_dict(), source)
    target = tmp_path / "saved"
    run_fresh(REMOTE, folder, source, target, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in target.glob("*.py")}
    results = np.load(target / "results.npz")
    np.testing.assert_allclose(results["embedding"], embedder(str(source))["embedding"], atol=1e-6)
    with open_checkpoint(source) as checkpoint:
        (model,) = generator(checkpoint, anchors=[str(source)], seed=2)
    np.testing.assert_allclose(results["weight"], model.state_dict["0.weight"].numpy(), atol=1e-6)
    # The folder that the remote process wrote is a folder like any other where the library is installed.
    reloaded = pipeline("weight-embedding", model=str(target), device="cpu", progress=False)
    np.testing.assert_allclose(reloaded(str(source))["embedding"], results["embedding"], atol=1e-6)
