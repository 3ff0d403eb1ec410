import copy
import json
import math
from collections import OrderedDict

import pytest
import timm
import torch
from fresh_process import run_fresh
from generation_fixtures import EXTRACTOR, Net, generated, same, small_backbone, trained
from halo_reference import encode_haloed
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForMaskedLM, BertConfig, ResNetConfig

from modeling_wsl import CheckpointError, WSLFeatureExtractor, WSLModel, open_checkpoint
from modeling_wsl.backbone.encoding import decode_haloed
from modeling_wsl.generation.generate import _check_decoded, generate
from modeling_wsl.generation.plan import plan_generation
from modeling_wsl.generation.settings import GenerationSettings


TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY_BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def backbone() -> WSLModel:
    return small_backbone()


@pytest.fixture(scope="module")
def extractor() -> WSLFeatureExtractor:
    return EXTRACTOR


@pytest.fixture(scope="module")
def make():
    return generated


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_the_same_seed_generates_the_same_bytes_and_the_draws_differ(make, noise):
    anchors = [trained(Net(), seed) for seed in range(2)]
    first = make(Net(), anchors, num_samples=3, seed=4, noise=noise)
    again = make(Net(), anchors, num_samples=2, seed=4, noise=noise)
    other = make(Net(), anchors, seed=5, noise=noise)
    assert same(first[0].state_dict, again[0].state_dict)
    assert same(first[1].state_dict, again[1].state_dict)
    assert not same(first[0].state_dict, first[1].state_dict)
    assert not same(first[0].state_dict, other[0].state_dict)


def test_one_anchor_and_no_noise_give_the_reconstruction_of_the_anchor(make, backbone, extractor):
    anchor = trained(Net())
    (model,) = make(Net(), [anchor], bandwidth=0)
    batch = extractor(anchor)
    latents = encode_haloed(backbone, batch["tokens"], batch["token_mask"], batch["positions"], 64, 8)
    tokens = decode_haloed(backbone, latents, batch["positions"], 64, 8)
    assert same(model.state_dict, extractor.decode(tokens, batch["manifest"]))


def test_provenance_covers_every_tensor_and_survives_json(make, backbone):
    anchor = trained(Net())
    model = make(Net(), anchor, seed=3)[0]
    provenance = json.loads(json.dumps(model.provenance))
    assert list(provenance["tensors"]) == list(model.state_dict) == list(anchor.state_dict())
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for name, origin in provenance["tensors"].items():
        assert origin == ("inherited: <Net>" if name in statistics else "sampled")
        assert torch.equal(model.state_dict[name], anchor.state_dict()[name]) == (name in statistics)
    assert provenance["tied"] == {"again.weight": "mix.weight"}
    assert provenance["seed"] == 3
    assert provenance["anchors"][0]["sha256"] == open_checkpoint(anchor).sha256()
    parameters = sum(parameter.numel() for parameter in anchor.parameters())
    assert provenance["entries"] == {"sampled": parameters, "inherited: <Net>": 13}
    assert provenance["backbone"]["sha256"] == open_checkpoint(backbone).sha256()
    assert provenance["feature_extractor"] == {
        "tokenization": "dense",
        "token_size": 64,
        "position_unit": "token",
        "batch_norm_statistics": "carry",
        "layer_normalization": None,
    }
    assert {"noise", "bandwidth", "halo", "backbone", "versions", "draw_seed", "target"} <= provenance.keys()


def test_tied_tensors_stay_tied(make):
    (model,) = make(Net(), [trained(Net())])
    assert model.state_dict["again.weight"] is model.state_dict["mix.weight"]
    module = model.instantiate()
    assert module.again.weight is module.mix.weight


def test_tensors_that_differ_in_the_anchor_and_are_tied_in_the_target_are_refused(make):
    state = OrderedDict(trained(Net()).state_dict())
    state["again.weight"] = state["again.weight"].clone()
    assert make(Net(), [state])  # equal values under two names are one tensor
    state["again.weight"] += 1
    with pytest.raises(ValueError, match="mix.weight and again.weight are tied in the target and differ"):
        make(Net(), [state])


def test_anchors_in_another_tensor_order_give_the_same_model(make):
    state = trained(Net()).state_dict()
    turned = dict(reversed(state.items()))
    assert same(make(Net(), [state])[0].state_dict, make(Net(), [turned])[0].state_dict)


def test_dtypes_are_those_of_the_target_whatever_the_anchor_has(make):
    anchor = trained(Net())
    (model,) = make(Net().to(torch.bfloat16), [anchor.to(torch.float16)])
    assert model.state_dict["conv.weight"].dtype == torch.bfloat16
    assert model.state_dict["norm.running_var"].dtype == torch.bfloat16


def test_double_precision_anchors_and_a_bfloat16_backbone_work(make, extractor, backbone):
    (model,) = make(Net().double(), [trained(Net()).double()])
    assert model.state_dict["fc.weight"].dtype == torch.float64
    plan = plan_generation(extractor, Net(), [trained(Net())], GenerationSettings(bandwidth=0, progress=False))
    exact = generate(backbone, plan)[0].state_dict["fc.weight"]
    low = generate(copy.deepcopy(backbone).to(torch.bfloat16), plan)[0].state_dict["fc.weight"]
    assert low.dtype == torch.float32
    assert 0 < (low - exact).norm() < 0.05 * exact.norm()


def test_a_generated_model_shares_no_memory_with_the_anchor_or_another_draw(make):
    anchor = trained(Net())
    before = {name: value.clone() for name, value in anchor.state_dict().items()}
    first, second = make(Net(), [anchor], num_samples=2, bandwidth=0)
    for value in first.state_dict.values():
        value.zero_()
    assert same(anchor.state_dict(), before)
    assert torch.equal(second.state_dict["norm.running_mean"], before["norm.running_mean"])


def test_every_mismatch_names_the_tensor_and_both_shapes_before_any_work(make):
    with pytest.raises(ValueError, match=r"Anchor 1 \(<Net>\).* fc.weight has shape \[5, 6\].* and \[4, 6\] in the"):
        make(Net(), [Net(), Net(classes=5)])
    state = Net().state_dict()
    state["extra.weight"] = torch.ones(2, 3)
    del state["conv.weight"]
    with pytest.raises(ValueError) as error:
        make(Net(), [state])
    assert "tensor conv.weight [6, 3, 3, 3] of the target is missing in the anchor" in str(error.value)
    assert "tensor extra.weight [2, 3] of the anchor is not in the target" in str(error.value)
    with pytest.raises(ValueError, match="and [0-9]+ more"):
        make("test_resnet", [Net()])
    with pytest.raises(ValueError, match="anchors is empty"):
        make(Net(), [], method="density")


def test_a_classifier_of_another_size_is_initialized_where_num_classes_asks_for_it(make):
    anchor = trained(timm.create_model("test_vit", num_classes=7))
    with pytest.raises(ValueError, match=r"head.weight has shape \[7, 64\].*pass num_classes"):
        make("test_vit", [anchor])
    first, second = make("test_vit", [anchor], num_classes=3, num_samples=2)
    for name, origin in first.provenance["tensors"].items():
        assert origin == ("initialized" if name in ("head.weight", "head.bias") else "sampled")
    assert first.instantiate().num_classes == 3
    assert not torch.equal(first.state_dict["head.weight"], second.state_dict["head.weight"])
    assert same(first.state_dict, make("test_vit", [anchor], num_classes=3)[0].state_dict)
    kept = make("test_vit", [anchor], num_classes=7)[0]
    assert set(kept.provenance["tensors"].values()) == {"sampled"}
    headless = make("test_vit", [anchor], num_classes=0)[0]
    assert "head.weight" not in headless.state_dict


def test_num_classes_is_refused_where_it_cannot_be_applied(make):
    with pytest.raises(ValueError, match="num_classes=3 cannot be applied to the target Net"):
        make(Net(), [Net()], num_classes=3)
    with pytest.raises(ValueError, match="num_classes=3 changes nothing"):
        make(BertConfig(**TINY_BERT), [AutoModel.from_config(BertConfig(**TINY_BERT))], num_classes=3)


def test_a_named_module_is_initialized_by_its_own_values(make):
    target = Net(classes=9)
    (model,) = make(target, [Net()], initialize=["fc"])
    assert torch.equal(model.state_dict["fc.weight"], target.fc.weight)
    assert model.provenance["tensors"]["fc.bias"] == "given: module"
    with pytest.raises(ValueError, match="initialize='head' names no stored tensor"):
        make(Net(), [Net()], initialize=["head"])
    with pytest.raises(ValueError, match="again.weight is tied to mix.weight"):
        make(Net(), [Net()], initialize=["again"])


def test_batch_norm_statistics_become_those_of_the_images(make):
    images = torch.randn(40, 3, 10, 10, generator=torch.Generator().manual_seed(2)) * 3 + 1
    anchor = trained(Net())
    (plain,) = make(Net(), [anchor])
    (model,) = make(Net(), [anchor], batch_norm_images=images)
    assert model.provenance["num_batch_norm_images"] == 40
    module = model.instantiate()
    hidden = module.conv(images)
    torch.testing.assert_close(module.norm.running_mean, hidden.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.norm.running_var, hidden.var((0, 2, 3)), atol=1e-4, rtol=1e-5)
    for name, origin in model.provenance["tensors"].items():
        assert (origin == "re-estimated") == ("running" in name or "num_batches" in name)
        assert (origin == "re-estimated") or torch.equal(model.state_dict[name], plain.state_dict[name])
    assert not torch.allclose(module(images), plain.instantiate()(images), atol=1e-2)


def test_a_checkpoint_on_disk_is_target_and_anchor_and_a_manifest_is_a_target(make, extractor, tmp_path):
    anchor = trained(Net())
    torch.save(anchor.state_dict(), tmp_path / "model.pt")
    from_file = make(tmp_path / "model.pt", [str(tmp_path / "model.pt")])[0]
    from_manifest = make(extractor.manifest(anchor), [anchor])[0]
    assert same(from_file.state_dict, make(Net(), [anchor])[0].state_dict)
    assert same(from_file.state_dict, from_manifest.state_dict)
    with pytest.raises(ValueError, match="known by its tensors only"):
        from_file.instantiate()


def test_a_plain_folder_keeps_tied_names_order_and_provenance(make, tmp_path):
    (model,) = make(Net(), [trained(Net())])
    folder = model.save_pretrained(tmp_path / "new" / "plain")
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "provenance.json"]
    assert "again.weight" not in load_file(folder / "model.safetensors")
    with open_checkpoint(folder / "model.safetensors") as checkpoint:
        assert checkpoint.tied == {"again.weight": "mix.weight"}
        assert same(checkpoint.state_dict(), model.state_dict)
    assert json.loads((folder / "provenance.json").read_text()) == model.provenance


def test_saving_over_a_folder_replaces_its_files_and_leaves_nothing_behind(make, tmp_path):
    first, second = make(Net(), [trained(Net())], num_samples=2)
    first.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    second.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(stored["conv.weight"], second.state_dict["conv.weight"])
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(FileExistsError, match="notes.txt is a file"):
        second.save_pretrained(tmp_path / "model" / "notes.txt")


LOAD = """
import sys, timm, torch
from transformers import AutoModel, AutoModelForMaskedLM
folder = sys.argv[1]
images, ids = torch.load(f"{folder}/inputs.pt")
with torch.no_grad():
    outputs = {name: timm.create_model(f"local-dir:{folder}/{name}", pretrained=True).eval()(images)
               for name in ("resnet", "vit")}
    outputs["bert"] = AutoModelForMaskedLM.from_pretrained(f"{folder}/bert")(ids).logits
    outputs["bare"] = AutoModel.from_pretrained(f"{folder}/bare")(ids).last_hidden_state
torch.save(outputs, f"{folder}/outputs.pt")
"""


def test_saved_folders_load_by_their_own_library_in_a_fresh_process(make, tmp_path):
    masked = BertConfig(**TINY_BERT, architectures=["BertForMaskedLM"])
    bert = AutoModelForMaskedLM.from_config(masked)
    models = {
        "resnet": make(
            "test_resnet", [timm.create_model("test_resnet")], target_kwargs={"num_classes": 5}, num_classes=5
        )[0],
        "vit": make(
            "vit_tiny_patch16_224", [timm.create_model("vit_tiny_patch16_224", **TINY_VIT)], target_kwargs=TINY_VIT
        )[0],
        "bert": make(masked, [trained(bert)])[0],
        "bare": make(BertConfig(**TINY_BERT), [AutoModel.from_config(BertConfig(**TINY_BERT))])[0],
    }
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    ids = torch.randint(50, (2, 8), generator=generator)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    torch.save((images, ids), tmp_path / "inputs.pt")
    run_fresh(LOAD, tmp_path)
    outputs = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        for name in ("resnet", "vit"):
            assert torch.equal(outputs[name], models[name].instantiate()(images))
        assert torch.equal(outputs["bert"], models["bert"].instantiate()(ids).logits)
        assert torch.equal(outputs["bare"], models["bare"].instantiate()(ids).last_hidden_state)
    module = models["bert"].instantiate()
    assert module.cls.predictions.decoder.weight is module.bert.embeddings.word_embeddings.weight
    # What was saved is a target and an anchor again.
    for name in ("resnet", "bert"):
        again = make(tmp_path / name, [tmp_path / name], bandwidth=0)[0]
        assert list(again.state_dict) == list(models[name].state_dict)
        assert again.provenance["target"]["library"] == ("timm" if name == "resnet" else "transformers")


def test_a_transformers_vision_model_gets_a_new_classifier_and_statistics(make):
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=4,
        architectures=["ResNetForImageClassification"],
    )
    module = trained(AutoModelForImageClassification.from_config(config))
    loader = [{"pixel_values": torch.randn(6, 3, 32, 32), "labels": torch.zeros(6)} for _ in range(2)]
    (model,) = make(config, [module], num_classes=9, batch_norm_images=loader)
    assert model.instantiate()(torch.randn(1, 3, 32, 32)).logits.shape == (1, 9)
    origins = set(model.provenance["tensors"].values())
    assert origins == {"sampled", "initialized", "re-estimated"}


def test_the_best_candidates_are_kept_best_first(make):
    anchor = trained(Net())
    seen = []

    def brightness(module):
        assert not module.training
        seen.append(float(module.conv.weight.detach().sum()))
        return seen[-1]

    kept = make(Net(), [anchor], num_samples=2, num_candidates=6, rank=brightness)
    assert len(seen) == 6
    scores = [model.provenance["score"] for model in kept]
    assert scores == sorted(seen, reverse=True)[:2]
    assert [seen[model.provenance["draw"]] for model in kept] == scores
    assert "brightness" in kept[0].provenance["ranked_by"]
    everything = make(Net(), [anchor], num_samples=6)
    assert same(kept[0].state_dict, everything[kept[0].provenance["draw"]].state_dict)


def test_a_validation_loader_ranks_by_accuracy_with_the_sampled_head(make):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(30, 3, 8, 8, generator=generator), torch.randint(4, (30,), generator=generator))
    loader = DataLoader(data, batch_size=8)
    kept = make(Net(), [trained(Net())], num_samples=1, num_candidates=4, rank=loader, batch_norm_images=loader)
    module = kept[0].instantiate()
    accuracy = float((module(data.tensors[0]).argmax(-1) == data.tensors[1]).float().mean())
    assert kept[0].provenance["score"] == pytest.approx(accuracy)
    assert kept[0].provenance["ranked_by"] == "validation accuracy"


def test_ranking_a_random_head_by_accuracy_is_refused(make):
    anchor = timm.create_model("test_vit", num_classes=7)
    with pytest.raises(ValueError, match="would rank noise"):
        make("test_vit", [anchor], num_classes=3, rank=[(torch.zeros(1, 3, 160, 160), torch.zeros(1))])


def test_a_language_model_is_not_ranked_by_the_accuracy_of_a_classifier(make):
    masked = BertConfig(**TINY_BERT, architectures=["BertForMaskedLM"])
    ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"needs logits \[N, classes\] and labels \[N\], not \[2, 8, 50\] and \[2, 8\]"
    ):
        make(masked, [AutoModelForMaskedLM.from_config(masked)], rank=[{"input_ids": ids, "labels": ids}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_candidates": 5}, "num_candidates=5 needs rank"),
        ({"num_samples": 3, "num_candidates": 2, "rank": len}, "num_candidates=2 is below num_samples=3"),
        ({"noise": "none"}, "noise='none'"),
        ({"bandwidth": float("nan")}, "bandwidth is nan"),
        ({"window_size": 0}, "window_size is 0"),
        ({"halo": -1}, "halo is -1"),
        ({"autocast_dtype": "float8"}, "autocast_dtype='float8'"),
    ],
)
def test_impossible_settings_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**options)


def test_an_unknown_target_is_refused_with_the_nearest_names(make):
    with pytest.raises(ValueError, match="'resnet81' is no timm architecture.*Did you mean resnet"):
        make("resnet81", [Net()])
    with pytest.raises(ValueError, match="BertConfig has no hiden_size"):
        make(BertConfig(**TINY_BERT), [Net()], target_kwargs={"hiden_size": 3})


def publish(hub, repo_id: str, folder) -> str:
    return hub.add(repo_id, {path.name: path.read_bytes() for path in folder.iterdir()})


def test_anchors_and_targets_come_from_the_hub(make, hub, tmp_path):
    vit = make("test_vit", [timm.create_model("test_vit", num_classes=3)], num_classes=3)[0]
    config = BertConfig(**TINY_BERT)
    bert = make(config, [AutoModel.from_config(config)])[0]
    commit = publish(hub, "lab/vit", vit.save_pretrained(tmp_path / "vit"))
    publish(hub, "lab/bert", bert.save_pretrained(tmp_path / "bert"))
    (model,) = make("lab/vit", ["lab/vit"], bandwidth=0)
    assert model.provenance["target"]["library"] == "timm"
    assert model.provenance["anchors"][0]["source"] == "lab/vit"
    assert model.provenance["anchors"][0]["revision"] == commit
    assert model.instantiate().num_classes == 3
    assert make("lab/bert", ["lab/bert"])[0].provenance["target"]["library"] == "transformers"
    weights = [request for request in hub.requests if "lab/vit/resolve" in request and "safetensors" in request]
    assert any(request.startswith("GET") for request in weights)


def test_iterators_that_one_model_would_use_up_are_refused():
    with pytest.raises(ValueError, match="batch_norm_images is an iterator"):
        GenerationSettings(num_samples=2, batch_norm_images=iter([torch.zeros(2, 3, 8, 8)]))


def test_one_anchor_tensor_may_fill_two_of_the_target(make):
    target = Net()
    target.again.weight = nn.Parameter(target.again.weight.detach().clone())
    (model,) = make(target, [trained(Net())], bandwidth=0)
    assert "again.weight" in model.provenance["tensors"]
    assert model.provenance["tied"] == {}
    assert model.state_dict["again.weight"].data_ptr() != model.state_dict["mix.weight"].data_ptr()


def test_weights_that_are_not_finite_are_refused_by_the_name_of_their_anchor(make):
    anchor = trained(Net())
    with torch.no_grad():
        anchor.conv.weight[1, 2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="<Net>.*conv.weight' holds"):
        make(Net(), [anchor])


def test_a_ranking_function_may_train_the_module_without_changing_the_result(make):
    anchor = trained(Net())

    def train(module):
        module.fc.weight.grad = None
        module(torch.randn(2, 3, 8, 8)).sum().backward()
        with torch.no_grad():
            module.fc.weight -= module.fc.weight.grad
        return 1.0

    with torch.no_grad():  # as in a pipeline
        kept = make(Net(), [anchor], num_samples=2, num_candidates=2, rank=train)
    plain = make(Net(), [anchor], num_samples=2)
    assert [same(one.state_dict, two.state_dict) for one, two in zip(kept, plain, strict=True)] == [True, True]


def test_a_score_that_is_no_number_comes_last_and_is_valid_json(make):
    scores = iter([math.nan, 1.0, math.inf, 2.0])
    kept = make(Net(), [trained(Net())], num_samples=4, rank=lambda module: next(scores))
    assert [model.provenance["score"] for model in kept] == [2.0, 1.0, None, None]
    json.dumps(kept[-1].provenance, allow_nan=False)


def test_a_file_named_like_an_architecture_is_the_file(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    anchor = trained(Net())
    torch.save(anchor.state_dict(), "resnet18.pt")
    (model,) = make("resnet18.pt", [anchor])
    assert list(model.state_dict) == list(anchor.state_dict())


def test_a_plan_reads_no_weights(extractor, tmp_path, monkeypatch):
    torch.save(trained(Net()).state_dict(), tmp_path / "anchor.pt")
    with open_checkpoint(tmp_path / "anchor.pt") as anchor:
        read = []
        monkeypatch.setattr(type(anchor), "read", lambda self, name: read.append(name))
        plan_generation(extractor, Net(), [anchor], GenerationSettings())
    assert read == []


def test_generation_leaves_the_callers_random_numbers_as_they_were(make):
    anchor = timm.create_model("test_vit", num_classes=7)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    (model,) = make("test_vit", [anchor], num_classes=3)
    model.instantiate()
    assert torch.equal(torch.get_rng_state(), before)


def test_large_values_in_double_precision_are_no_infinities(extractor):
    tensors = {"a.weight": torch.full((40, 40), 1e308, dtype=torch.float64)}
    plan = plan_generation(extractor, tensors, [tensors], GenerationSettings())
    _check_decoded(tensors, plan.target, plan.settings)
    tensors["a.weight"][3, 4] = math.inf
    with pytest.raises(ValueError, match="NaN or infinite values for tensor a.weight"):
        _check_decoded(tensors, plan.target, plan.settings)
    small = {"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}
    _check_decoded(small, plan.target, plan.settings)


def test_a_timm_model_with_shared_modules_is_saved_as_timm_loads_it(make, tmp_path):
    sizes = {"img_size": 32, "embed_dims": [16, 16, 16, 16], "num_heads": 2, "num_classes": 3}
    anchor = timm.create_model("coat_tiny", **sizes)
    (model,) = make("coat_tiny", [trained(anchor)], target_kwargs=sizes)
    assert model.provenance["tied"]
    model.save_pretrained(tmp_path / "coat")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'coat'}", pretrained=True)
    assert same(loaded.state_dict(), model.state_dict)


def test_a_timm_module_is_saved_as_timm_loads_it_and_a_changed_one_as_plain_weights(make, tmp_path):
    module = timm.create_model("vit_tiny_patch16_224", **TINY_VIT)
    if "_model_args" not in vars(module):
        pytest.skip("this timm does not note the arguments of a model")
    module.reset_classifier(5)
    (model,) = make(module, [trained(copy.deepcopy(module))])
    assert model.provenance["target"]["library"] == "timm"
    model.save_pretrained(tmp_path / "vit")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True)
    assert same(loaded.state_dict(), model.state_dict) and loaded.num_classes == 5
    module.head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))
    (model,) = make(module, [trained(copy.deepcopy(module))])
    assert model.provenance["target"]["library"] == "torch"
    folder = model.save_pretrained(tmp_path / "plain")
    assert not (folder / "config.json").exists()
    features = timm.create_model("test_resnet", features_only=True)
    assert make(features, [features])[0].provenance["target"]["library"] == "torch"


def test_a_config_of_unknown_origin_fetches_nothing(make, hub, tmp_path):
    anchor = timm.create_model("test_resnet", num_classes=5)
    config = {
        "architecture": "test_resnet",
        "num_classes": 5,
        "model_args": {"pretrained": True, "checkpoint_path": str(tmp_path / "gone.pt"), "cache_dir": "/gone"},
        "pretrained_cfg": {"hf_hub_id": "lab/evil", "url": "https://example.org/x.pt", "mean": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (model,) = make(tmp_path, [anchor])
    module = model.instantiate()
    assert module.pretrained_cfg["mean"] == [0.1, 0.2, 0.3] and "hf_hub_id" not in module.pretrained_cfg
    assert model.provenance["target"]["arguments"] == {"model_name": "test_resnet", "num_classes": 5}

    bert = AutoModel.from_config(BertConfig(**TINY_BERT))
    extra = {"architectures": ["pipeline"], "auto_map": {"AutoModel": "evil.Model"}, "quantization_config": {"a": 1}}
    config = {"model_type": "bert", **TINY_BERT, **extra}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (model,) = make(tmp_path, [bert])
    assert type(model.instantiate()) is type(bert)
    assert not {"auto_map", "quantization_config"} & model.provenance["target"]["arguments"].keys()

    for config in ({"model_type": "bert", "num_hidden_layers": 10**9}, {"architecture": "hf-hub:lab/evil"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="too many to build|to be fetched from elsewhere"):
            make(tmp_path, [bert])
    assert hub.requests == []
    with pytest.raises(ValueError, match="leave checkpoint_path out"):
        make("test_resnet", [anchor], target_kwargs={"checkpoint_path": "x.pt"})


def test_a_target_on_the_hub_has_a_revision_of_its_own_and_needs_a_config(make, hub, tmp_path):
    anchor = timm.create_model("test_vit", num_classes=3)
    vit = make("test_vit", [anchor], num_classes=3)[0]
    commit = publish(hub, "lab/vit", vit.save_pretrained(tmp_path / "vit"))
    hub.repositories["lab/vit"].revisions = {"v1": commit}
    with pytest.raises(CheckpointError, match="lab/vit: has no revision"):
        make("lab/vit", [anchor])
    assert make("lab/vit", [anchor], target_revision="v1")[0].provenance["target"]["name"] == "lab/vit"
    with pytest.raises(ValueError, match="target_revision='v1' is for targets on the Hub"):
        make("test_vit", [anchor], target_revision="v1")
    hub.add("lab/bare", {"model.safetensors": b""})
    with pytest.raises(CheckpointError, match="lab/bare: has no config.json"):
        make("lab/bare", [anchor])
