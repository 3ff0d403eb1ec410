"""Models without an anchor: token kinds, the fit, the draws, the file, the command."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from command_line import hf_wsl
from generation_fixtures import EXTRACTOR, Net, generated, same, small_backbone
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, GPT2Config, pipeline

from datasets_scripts.tokenize import tokenize
from datasets_scripts.tokenize_config import TokenizeConfig
from modeling_wsl import CheckpointError, WSLConfig, WSLFeatureExtractor, WSLForPreTraining
from modeling_wsl.generation.latent_prior import FORMAT, PRIOR_FILE, KindMoments, LatentPrior, LayerMoments
from modeling_wsl.generation.targets import resolve_target
from modeling_wsl.loading import load_pipeline
from modeling_wsl.tokens.kinds import FEATURES, KINDS, kind_of, token_kinds
from modeling_wsl.tokens.manifest import WeightManifest
from trainers.data.windows.window_table import DatasetError
from trainers.pretraining.fit_prior import fit_and_save_prior


def manifest_of(target, token_size: int = 64, **options) -> WeightManifest:
    return WSLFeatureExtractor(token_size=token_size).layout(resolve_target(target, **options).tensors)


def kinds_by_name(target, **options) -> dict[str, str]:
    layers = manifest_of(target, **options).layers
    return {spec.name: kind_of(spec, layer) for layer in layers for spec in layer.tensors}


def test_kinds_follow_from_names_and_shapes_in_any_library():
    convnext = kinds_by_name("test_convnext")
    assert convnext["stem.0.weight"] == "kernel"
    assert convnext["stages.0.blocks.0.conv_dw.weight"] == "depthwise kernel"
    assert convnext["stages.0.blocks.0.conv_dw.bias"] == "bias"
    assert convnext["stages.0.blocks.0.norm.weight"] == "norm scale"
    assert convnext["stages.0.blocks.0.gamma"] == "norm scale"
    assert convnext["head.fc.weight"] == "matrix"
    vit = kinds_by_name("test_vit")
    assert vit["pos_embed"] == vit["cls_token"] == "table"
    assert vit["patch_embed.proj.weight"] == "kernel"
    swin = kinds_by_name("swin_tiny_patch4_window7_224")
    assert swin["layers.0.blocks.0.attn.relative_position_bias_table"] == "table"
    assert kinds_by_name("resmlp_12_224")["blocks.0.linear_tokens.weight"] == "matrix"
    assert kinds_by_name("crossvit_9_240")["cls_token_0"] == "table"
    assert kinds_by_name("mvitv2_tiny")["stages.0.blocks.0.attn.rel_pos_h"] == "table"
    others = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("position_proj", "stable", "embed_tokens")})
    assert list(kinds_by_name(others).values()) == ["matrix", "matrix", "table"]
    gpt2 = kinds_by_name(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=16))
    assert gpt2["wte.weight"] == gpt2["wpe.weight"] == "table"
    assert gpt2["h.0.attn.c_attn.weight"] == "matrix"


def test_the_stem_of_a_model_for_gray_images_is_no_depthwise_kernel_and_a_later_one_is():
    for target in ("test_resnet", "test_vit", "test_convnext"):
        gray, color = (token_kinds(manifest_of(target, in_channels=channels)).kinds for channels in (1, 3))
        assert gray.unique().tolist() == color.unique().tolist(), target
    manifest = manifest_of(nn.Sequential(nn.Conv2d(9, 9, 5, groups=9, bias=False), nn.Conv2d(9, 9, 5, groups=9)))
    assert [KINDS[kind] for kind in token_kinds(manifest).kinds.unique_consecutive()][0] == "kernel"
    # a stem that is initialized is not among the tokens, and what then comes first is the depthwise kernel that it is
    layers = manifest_of(nn.Sequential(nn.BatchNorm2d(9), nn.Conv2d(9, 9, 5, groups=9, bias=False)))
    assert KINDS.index("depthwise kernel") in token_kinds(layers).kinds


@pytest.mark.parametrize("tokenization", ["dense", "sparse"])
def test_tokens_are_described_the_same_in_parts_as_whole(tokenization):
    extractor = WSLFeatureExtractor(token_size=32, tokenization=tokenization)
    manifest = extractor.layout(resolve_target("test_convnext").tensors)
    whole = token_kinds(manifest)
    assert whole.features.shape == (manifest.num_tokens, len(FEATURES))
    assert torch.equal(whole.groups // len(KINDS), manifest.positions()[:, 1])
    for start in range(0, manifest.num_tokens, 997):
        stop = min(start + 997, manifest.num_tokens)
        part = token_kinds(manifest, start, stop)
        for name in ("kinds", "groups", "features"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[start:stop]), name


def test_a_token_of_a_norms_scale_and_shift_is_a_kind_of_its_own_and_knows_where_one_ends():
    manifest = manifest_of(nn.Sequential(nn.Linear(4, 40), nn.BatchNorm1d(40)))
    described = token_kinds(manifest)
    names = ["matrix", "matrix", "matrix", "bias", "norm scale and shift", "bias"]
    assert [KINDS[kind] for kind in described.kinds] == names
    mixed = manifest.layers[1].first_token
    assert described.features[mixed, FEATURES.index("share of the first tensor")] == pytest.approx(40 / 64)
    assert described.features[:, FEATURES.index("batch norm")].unique().tolist() == [1.0]


def collection(seed: int = 0):
    """Parts of models whose latents follow a rule: log scale by fan-in, a shared shift a layer, noise a token."""
    generator = torch.Generator().manual_seed(seed)
    for width in (40, 60, 80, 120) * 6:
        manifest = manifest_of(nn.Sequential(nn.Linear(width, 50, bias=False), nn.Linear(50, width, bias=False)))
        described = token_kinds(manifest)
        latents = torch.randn(manifest.num_tokens, 6, generator=generator) * 0.1
        shift = torch.randn(2, generator=generator)[manifest.positions()[:, 1]]
        latents[:, 0] += shift
        latents[:, -1] = -5 * described.features[:, FEATURES.index("log2 fan-in / 10")].float() - 1
        latents[:, -2] = 0.3 * latents[:, -1].exp()
        half = manifest.num_tokens // 2
        yield manifest, 0, latents[:half]
        yield manifest, half, latents[half:]


def test_draws_have_the_scales_shared_effects_and_noise_of_the_collection_at_a_shape_that_it_lacks():
    prior = LatentPrior.fit(collection(), token_standardization=True)
    manifest = manifest_of(nn.Sequential(nn.Linear(100, 50, bias=False), nn.Linear(50, 100, bias=False)))
    draws = torch.stack([prior.sample(manifest, torch.Generator().manual_seed(seed)) for seed in range(60)])
    fan_in = token_kinds(manifest).features[:, FEATURES.index("log2 fan-in / 10")].float()
    torch.testing.assert_close(draws[..., -1].mean(0), -5 * fan_in - 1, atol=0.1, rtol=0)
    torch.testing.assert_close(draws[..., -2], 0.3 * draws[..., -1].exp(), atol=0.02, rtol=0.2)
    first = draws[:, : manifest.layers[1].first_token]  # of the first layer
    assert first[..., 0].mean(1).std() == pytest.approx(1.0, abs=0.4)  # of one layer to that of another draw
    assert first[..., 0].std(1).mean() == pytest.approx(0.1, abs=0.04)  # of tokens within a layer
    assert first[..., 1].std(1).mean() == pytest.approx(0.1, abs=0.04)


def test_the_fit_does_not_depend_on_how_a_model_is_cut_into_parts_and_repeats_bit_by_bit():
    whole = {}
    for manifest, start, latents in collection():
        whole.setdefault(id(manifest), (manifest, []))[1].append(latents)
        assert start == 0 or len(whole[id(manifest)][1]) == 2
    joined = LatentPrior.fit(((manifest, 0, torch.cat(parts)) for manifest, parts in whole.values()), True)
    parted, again = (LatentPrior.fit(collection(), True) for _ in range(2))
    for name in ("coefficients", "token_factors", "layers", "layer_kinds", "layer_tokens"):
        assert torch.equal(getattr(parted, name), getattr(again, name)), name
    torch.testing.assert_close(joined.coefficients, parted.coefficients, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(joined.layers, parted.layers, atol=1e-5, rtol=1e-5)
    assert joined.facts == parted.facts


def test_tokens_without_a_scale_are_left_out_and_nothing_else_is_no_prior():
    manifest = manifest_of(nn.Linear(40, 50))
    flat = torch.zeros(manifest.num_tokens, 6)
    flat[:, -1] = -30.0
    with pytest.raises(ValueError, match="needs tokens whose weights are finite and not all equal"):
        LatentPrior.fit([(manifest, 0, flat)], token_standardization=True)
    prior = LatentPrior.fit([*collection(), (manifest, 0, flat)], token_standardization=True)
    assert prior.facts == LatentPrior.fit(collection(), token_standardization=True).facts


def test_a_kind_that_the_collection_lacks_is_drawn_like_the_others():
    prior = LatentPrior.fit(collection(), token_standardization=True)
    assert prior.facts["kinds"]["kernel"]["tokens"] == 0
    drawn = prior.sample(manifest_of(nn.Conv2d(3, 50, 3)), torch.Generator().manual_seed(0))
    assert drawn.isfinite().all()


def test_of_a_large_collection_layers_from_all_of_it_are_kept_in_bounded_number():
    moments = KindMoments()
    for index in range(3000):
        layer = LayerMoments()
        layer.add(torch.full((2, len(FEATURES) + 1), float(index), dtype=torch.float64))
        moments.add(layer)
    kept = [float(mean[0]) for mean, _ in moments.kept]
    assert 256 <= len(kept) <= 512 and moments.layers == 3000
    assert kept == [float(index) for index in range(0, 3000, 8)]


@pytest.fixture(scope="module")
def prior():
    """For the small backbone, fitted on a dozen models that nobody trained."""

    def parts():
        for seed in range(12):
            torch.manual_seed(seed)
            module = [Net(), nn.Sequential(nn.Conv2d(2, 9, 3), nn.GroupNorm(3, 9)), nn.Linear(40, 30)][seed % 3]
            batch = EXTRACTOR(module)
            inputs = {name: batch[name][None] for name in ("tokens", "token_mask", "positions")}
            with torch.no_grad():
                yield batch["manifest"], 0, small_backbone().encode(**inputs)[0]

    return LatentPrior.fit(parts(), token_standardization=True, facts={"dataset": "lab/nets"})


def test_a_model_without_anchors_is_drawn_and_its_statistics_are_the_librarys_or_those_of_images(prior):
    first, second = generated(Net(), (), prior=prior, num_samples=2, seed=5)
    assert same(first.state_dict, generated(Net(), (), prior=prior, seed=5)[0].state_dict)
    assert not same(first.state_dict, second.state_dict)
    provenance = json.loads(json.dumps(first.provenance))
    assert (provenance["method"], provenance["anchors"]) == ("prior", [])
    assert provenance["prior"]["dataset"] == "lab/nets"
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for name, origin in provenance["tensors"].items():
        assert origin == ("given: module" if name in statistics else "sampled")
    assert torch.equal(first.state_dict["norm.running_var"], torch.ones(6))
    images = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (conditioned,) = generated(Net(), (), prior=prior, seed=5, batch_norm_images=images)
    assert conditioned.provenance["tensors"]["norm.running_var"] == "re-estimated"
    hidden = conditioned.instantiate().conv(images)
    torch.testing.assert_close(conditioned.state_dict["norm.running_mean"], hidden.mean((0, 2, 3)), atol=1e-5, rtol=0)


def test_an_architecture_that_nobody_trained_here_can_be_drawn_with_a_head_of_its_own_or_an_initialized_one(prior):
    (model,) = generated("test_vit", (), prior=prior, num_classes=3, in_channels=1)
    assert model.instantiate()(torch.randn(1, 1, 160, 160)).shape == (1, 3)
    assert model.provenance["adapted"] == {}
    (model,) = generated("test_vit", (), prior=prior, num_classes=3, initialize=["head"])
    origins = {name for name, origin in model.provenance["tensors"].items() if origin == "initialized"}
    assert origins == {"head.weight", "head.bias"}


def test_a_call_without_anchors_that_cannot_work_is_refused_before_any_work(prior):
    with pytest.raises(ValueError, match="Without anchors a prior is needed"):
        generated(Net(), ())
    with pytest.raises(ValueError, match="method='prior' takes nothing from anchors, and 1 are given"):
        generated(Net(), [Net()], method="prior", prior=prior)
    with pytest.raises(ValueError, match="known by its tensors only"):  # nobody has its batch norm's statistics
        generated(EXTRACTOR.manifest(Net()), (), prior=prior)
    other = LatentPrior.fit(collection(), token_standardization=True)
    with pytest.raises(ValueError, match="latents of 6 numbers .*the backbone has 24.*hf-wsl prior"):
        generated(Net(), (), prior=other)


def test_the_file_appears_whole_says_what_it_is_and_is_read_back(prior, tmp_path):
    path = prior.save_pretrained(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [PRIOR_FILE] and path.stat().st_mode & 0o044 == 0o044
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["prior"])["facts"]["dataset"] == "lab/nets"
    read = LatentPrior.from_pretrained(tmp_path)
    assert read.facts == prior.facts
    manifest = EXTRACTOR.manifest(Net())
    draws = [one.sample(manifest, torch.Generator().manual_seed(0)) for one in (prior, read)]
    assert torch.equal(*draws)


def test_a_damaged_or_foreign_file_is_refused_with_the_command_that_mends_it(prior, tmp_path):
    path = prior.save_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read.*hf-wsl prior"):
        LatentPrior.from_pretrained(tmp_path)
    good = {name: getattr(prior, name) for name in ("coefficients", "token_factors", "layers")}
    good |= {"layer_kinds": prior.layer_kinds, "layer_tokens": prior.layer_tokens}
    record = {"format": FORMAT, "kinds": KINDS, "features": FEATURES, "token_standardization": True, "facts": {}}
    beyond = {**good, "layer_kinds": prior.layer_kinds + len(KINDS)}
    for tensors, noted, message in (
        (good, None, "is no prior that this version"),
        (good, [record], "is no prior that this version"),
        (good, {**record, "kinds": KINDS[::-1]}, "is about other kinds"),
        (good, {**record, "features": FEATURES[1:]}, "is about other kinds"),
        (good, {**record, "facts": 3}, "cannot be read"),
        (beyond, record, "layers of kinds that do not exist"),
        ({**good, "layers": prior.layers[1:]}, record, "tensors of other shapes"),
    ):
        save_file(tensors, path, metadata=None if noted is None else {"prior": json.dumps(noted)})
        with pytest.raises(CheckpointError, match=message):
            LatentPrior.from_pretrained(tmp_path)
    save_file(good, path, metadata={"prior": json.dumps(record)})
    assert LatentPrior.from_pretrained(tmp_path).sha256() == prior.sha256()
    path.unlink()
    with pytest.raises(CheckpointError, match="has no latent_prior.safetensors.*hf-wsl prior"):
        LatentPrior.from_pretrained(tmp_path)


def save_backbone(folder, token_size: int = 64):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "window_size": 64}
    config = WSLConfig(token_size=token_size, latent_size=24, token_standardization=True, linear_path=True, **sizes)
    WSLForPreTraining(config).save_pretrained(folder)
    WSLFeatureExtractor(token_size=token_size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collection")
    for seed in range(4):
        torch.manual_seed(seed)
        (folder / "models" / f"net{seed}").mkdir(parents=True)
        save_file(
            timm.create_model("test_resnet").state_dict(), folder / "models" / f"net{seed}" / "model.safetensors"
        )
    config = TokenizeConfig(token_size=64, split_by="model", validation_fraction=0.25, num_workers=1)
    tokenize([str(folder / "models")], folder / "tokens", config)
    return folder / "tokens"


def test_the_command_fits_on_a_dataset_and_the_pipeline_then_needs_no_anchor(dataset, tmp_path):
    backbone = save_backbone(tmp_path / "backbone")
    generator = load_pipeline("weight-generation", backbone, device="cpu", progress=False)
    with pytest.raises(CheckpointError, match="has no latent_prior.safetensors"):
        generator("test_vit")
    result = hf_wsl("prior", backbone, "--dataset", dataset, "--max-tokens", "2000")
    assert result.exit_code == 0, result.output
    assert "fitted on" in result.output
    models = generator("test_vit", num_classes=3, num_samples=2)
    assert models[0].provenance["method"] == "prior"
    assert models[0].provenance["prior"]["dataset"] == "tokens"  # the folder's name, not where it lies
    first = (backbone / PRIOR_FILE).read_bytes()
    options = {"max_tokens": 2000, "device": "cpu", "progress": False}
    fit_and_save_prior(backbone, str(dataset), precision="bfloat16", **options)
    assert (backbone / PRIOR_FILE).read_bytes() != first
    fit_and_save_prior(backbone, str(dataset), **options)
    assert (backbone / PRIOR_FILE).read_bytes() == first
    arguments = [backbone, "test_vit", "--output_dir", str(tmp_path / "drawn"), "--num-classes", "3"]
    result = hf_wsl("generate", *arguments)
    assert result.exit_code == 0, result.output
    assert timm.create_model(f"local-dir:{tmp_path / 'drawn' / '000'}", pretrained=True).num_classes == 3


def test_a_prior_comes_from_the_hub_at_the_commit_of_its_backbone(hub, prior, tmp_path):
    backbone = save_backbone(tmp_path / "backbone")
    prior.save_pretrained(backbone)
    files = {path.name: path.read_bytes() for path in backbone.iterdir()}
    commit = hub.add("lab/backbone", files)
    generator = load_pipeline("weight-generation", "lab/backbone", device="cpu", progress=False)
    (model,) = generator(Net())
    assert model.provenance["method"] == "prior"
    assert any(commit in request and PRIOR_FILE in request for request in hub.requests)
    del files[PRIOR_FILE]
    hub.add("lab/bare", files)
    with pytest.raises(CheckpointError, match="lab/bare: has no latent_prior.safetensors"):
        pipeline("weight-generation", model="lab/bare", device="cpu")(Net())


def test_the_prior_of_a_private_backbone_is_read_with_the_backbone_s_token(hub, prior, tmp_path):
    prior.save_pretrained(save_backbone(tmp_path / "backbone"))
    hub.add(
        "org/private-prior", {path.name: path.read_bytes() for path in (tmp_path / "backbone").iterdir()}, private=True
    )
    with pytest.raises(CheckpointError, match="org/private-prior"):
        LatentPrior.from_pretrained("org/private-prior")
    private = load_pipeline("weight-generation", "org/private-prior", token="hf_alice", device="cpu", progress=False)
    (model,) = private(Net())
    assert model.provenance["backbone"]["name"] == "org/private-prior"
    plain = pipeline("weight-generation", model="org/private-prior", token="hf_alice", device="cpu", progress=False)
    assert same(plain(Net(), token="hf_alice")[0].state_dict, model.state_dict)
    assert model.provenance["prior"]["sha256"] == prior.sha256()
    assert replace(prior, layers=prior.layers + 1).sha256() != prior.sha256()


def test_a_dataset_or_folder_that_does_not_fit_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        fit_and_save_prior("org/name", str(dataset))
    other = save_backbone(tmp_path / "other", token_size=32)
    with pytest.raises(DatasetError, match="token_size=64, the backbone expects 32"):
        fit_and_save_prior(other, str(dataset))
    with pytest.raises(ValueError, match="max_tokens is 0"):
        fit_and_save_prior(other, str(dataset), max_tokens=0)


def test_transformers_targets_are_drawn_too(prior):
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=16)
    (model,) = generated(config, (), prior=prior)
    assert type(model.instantiate()) is type(AutoModel.from_config(config))


def test_a_prior_of_other_weights_and_an_option_that_does_not_exist_are_refused(dataset, tmp_path):
    backbone = save_backbone(tmp_path / "backbone")
    fit_and_save_prior(backbone, str(dataset), max_tokens=2000, device="cpu", progress=False)
    generator = load_pipeline("weight-generation", backbone, device="cpu", progress=False)
    with pytest.raises(TypeError, match="no option 'num_sample'; did you mean 'num_samples'"):
        generator("test_vit", num_sample=2)
    assert load_pipeline("weight-generation", backbone, device="cpu", dtype="bfloat16")("test_vit", progress=False)
    with torch.no_grad():
        generator.model.encoder.proj_in.weight += 1
    with pytest.raises(ValueError, match="fitted on latents of other weights"):
        generator("test_vit")
