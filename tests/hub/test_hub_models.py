"""The mixed models of the tests' Hub are what they are said to be: the good load whole, the bad have one defect."""

import json
import pickle
from collections import Counter

import pytest
import transformers
from hub_models import LARGEST, SMALLEST, TASKS, mixed_models, seed_mixed
from huggingface_hub import HfApi
from huggingface_hub.errors import DisabledRepoError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load

from datasets_scripts.outcomes import OUTCOMES
from modeling_wsl import open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError, NotTokenizableError


@pytest.fixture
def mixed(hub):
    """Outcome by id; the Hub holds the models."""
    yield seed_mixed(hub)
    assert hub.crashes == []


def models_of(*outcomes: str) -> list:
    return [model for model in mixed_models() if model.outcome in outcomes]


def loading_report(model) -> dict[str, list]:
    """What transformers or timm has to say about the tensors of a model that it loads from the Hub by its id."""
    config = json.loads(model.files["config.json"].data)
    if "architecture" in config:
        import timm

        net = timm.create_model(f"hf-hub:{model.repo_id}", pretrained=False)
        wanted, found = net.state_dict(), load(model.files["model.safetensors"].data)
        common = wanted.keys() & found.keys()
        return {
            "missing_keys": sorted(wanted.keys() - found.keys()),
            "unexpected_keys": sorted(found.keys() - wanted.keys()),
            "mismatched_keys": [name for name in common if wanted[name].shape != found[name].shape],
        }
    model_class = getattr(transformers, config["architectures"][0])
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    return {name: list(rows) for name, rows in model_class.from_pretrained(model.repo_id, **options)[1].items()}


def test_there_are_sixty_of_them_with_an_outcome_each(mixed):
    assert len(mixed) == 60 and set(mixed.values()) <= OUTCOMES.keys()
    counts = Counter(mixed.values())
    assert counts["accepted"] == 27 and counts["duplicate"] == 3 and len(counts) == 20
    assert len({repo_id.split("/")[0] for repo_id in mixed}) > 20


def test_they_are_listed_by_their_tasks_the_most_downloaded_first(mixed):
    listed = [model.id for task in TASKS for model in HfApi().list_models(filter=task, sort="downloads")]
    assert sorted(listed) == sorted(mixed) and listed[0] == "timm/resnet18.a1_in1k"
    by_tags = HfApi().list_models(filter=["timm", "license:apache-2.0", "base_model:finetune:timm/resnet18.a1_in1k"])
    assert {model.id for model in by_tags} == {"ada/resnet18-cifar10", "grace/resnet18-cifar10"}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(mixed):
    def checksums(models) -> dict[str, dict[str, str]]:
        return {model.repo_id: {name: file.sha256 for name, file in model.files.items()} for model in models}

    first, again, other = checksums(mixed_models()), mixed_models.__wrapped__(), mixed_models.__wrapped__(1)
    assert checksums(again) == first
    name = "model.safetensors"
    assert checksums(other)["timm/resnet18.a1_in1k"][name] != first["timm/resnet18.a1_in1k"][name]


def test_the_good_ones_are_loaded_whole_by_their_libraries(mixed):
    import timm
    from peft import PeftModel

    for model in models_of("accepted"):
        if "adapter_config.json" in model.files:
            base = transformers.AutoModelForMaskedLM.from_pretrained("google-bert/bert-tiny-uncased")
            assert PeftModel.from_pretrained(base, model.repo_id).peft_config["default"].r == 8
        elif b'"architecture"' in model.files["config.json"].data:
            timm.create_model(f"hf-hub:{model.repo_id}", pretrained=True)  # raises on any tensor too many or too few
        else:
            assert not any(loading_report(model).values()), model.repo_id
        assert SMALLEST < open_checkpoint(model.repo_id).num_parameters < LARGEST, model.repo_id


def test_copies_have_the_weights_of_their_original_and_fine_tunes_nearly(mixed):
    weights = {model.repo_id: model.files.get("model.safetensors") for model in mixed_models()}
    assert weights["zoe-mirror/resnet18.a1_in1k"].sha256 == weights["timm/resnet18.a1_in1k"].sha256
    known = Counter(file.sha256 for file in weights.values() if file)
    assert sum(number - 1 for number in known.values()) == len(models_of("duplicate"))
    base, tuned = (load(weights[name].data) for name in ("timm/resnet18.a1_in1k", "ada/resnet18-cifar10"))
    difference = (base["layer1.0.conv1.weight"] - tuned["layer1.0.conv1.weight"]).norm()
    assert 0 < difference < 0.02 * base["layer1.0.conv1.weight"].norm()


def test_the_hub_itself_refuses_some(mixed):
    errors = {"gated": GatedRepoError, "disabled": DisabledRepoError, "network": HfHubHTTPError}
    errors["vanished"] = RepositoryNotFoundError
    for model in models_of(*errors):
        with pytest.raises(errors[model.outcome]):
            HfApi().auth_check(model.repo_id)
    gated = [HfApi().model_info(model.repo_id).gated for model in models_of("gated")]
    assert gated == ["auto", "manual"]


def test_metadata_tells_of_some(mixed):
    def info(outcome: str):
        return [HfApi().model_info(model.repo_id, files_metadata=True) for model in models_of(outcome)]

    assert [found.card_data.license for found in info("license")] == ["cc-by-nc-nd-4.0", "other"]
    (code,), (packed,), (large,), (small,) = map(info, ("remote_code", "quantized", "too_large", "too_small"))
    assert "custom_code" in code.tags and packed.config["quantization_config"]["quant_method"] == "gptq"
    assert large.safetensors.total == 2 * 10**9 and small.safetensors.total < 100
    assert max(file.size for file in large.siblings) > 8 * 10**9
    for found in info("no_weights"):
        assert not [file for file in found.siblings if file.rfilename.endswith((".safetensors", ".bin"))]


def test_files_and_configs_are_broken_in_some(mixed):
    for model in models_of("damaged"):
        with pytest.raises(CheckpointError):
            open_checkpoint(model.repo_id).state_dict()
    for model in models_of("no_weights"):  # or stubs of other frameworks, which hold none
        with pytest.raises(CheckpointError):
            open_checkpoint(model.repo_id)
    for model in models_of("unloadable"):
        config = model.files["config.json"].data if "config.json" in model.files else b""
        if b'"architecture"' in config:
            with pytest.raises(RuntimeError, match="Unknown model"):
                loading_report(model)
        else:
            with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
                transformers.AutoModel.from_pretrained(model.repo_id)


def test_tensors_are_wrong_in_some(mixed):
    keys = {"missing_weights": "missing_keys", "unexpected_weights": "unexpected_keys"}
    keys["mismatched_weights"] = "mismatched_keys"
    for model in models_of(*keys):
        report = loading_report(model)
        assert {name: len(rows) for name, rows in report.items() if rows} == {keys[model.outcome]: 1}
    for model in models_of("not_finite", "overflow", "not_tokenizable"):
        assert not any(loading_report(model).values())
        values = [tensor.float() for tensor in load(model.files["model.safetensors"].data).values()]
        finite = all(tensor.isfinite().all() for tensor in values)
        half = all(tensor.half().isfinite().all() for tensor in values)
        assert (finite, half) == {"not_finite": (False, False), "overflow": (True, False)}.get(
            model.outcome, (True, True)
        )
        if model.outcome == "not_tokenizable":
            with pytest.raises(NotTokenizableError):
                open_checkpoint(model.repo_id)
