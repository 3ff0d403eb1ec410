"""The check that a model loads: asked of headers alone, it answers as it does for the weights themselves."""

import json

import pytest
from hub_models import mixed_models
from safetensors.torch import load_file, save_file
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from datasets_scripts.collect.loadable import check_loadable, write_hollow_file
from datasets_scripts.outcomes import RefusedModel
from modeling_wsl.checkpoints.containers.safetensors_files import LENGTH_BYTES, read_header
from modeling_wsl.checkpoints.folders import read_config


MODELS = {model.repo_id: model for model in mixed_models()}
BY_HEADER = {"missing_weights", "unexpected_weights", "mismatched_weights", "remote_code", "unloadable"}
CHECKED = [name for name, model in MODELS.items() if model.outcome in BY_HEADER | {"accepted"}]


def write_files(folder, files, hollow=False):
    for name, file in files.items():
        if hollow and name.endswith(".safetensors"):
            end = LENGTH_BYTES + int.from_bytes(file.data[:LENGTH_BYTES], "little")
            write_hollow_file(folder / name, file.data[:end], file.size)
        else:
            (folder / name).write_bytes(file.data)


def verdict(folder, name) -> tuple[str, str | None]:
    library, config = read_config(folder)
    tensors = [tensor for path in folder.glob("*.safetensors") for tensor in read_header(path).tensors]
    try:
        check_loadable(folder, name, library, config, tensors)
    except RefusedModel as refusal:
        return refusal.outcome, refusal.reason
    return "accepted", None


@pytest.mark.parametrize("name", [name for name in CHECKED if name != "nobody/broken-config"])
def test_a_hollow_file_is_judged_as_the_weights_are(tmp_path, name):
    for hollow in (True, False):
        folder = tmp_path / str(hollow)
        folder.mkdir()
        write_files(folder, MODELS[name].files, hollow)
        outcome, reason = verdict(folder, name)
        assert outcome == MODELS[name].outcome, reason


def test_a_hollow_file_takes_no_disk_for_its_weights(tmp_path):
    write_hollow_file(tmp_path / "x.safetensors", b"12345678", 10**12)
    stat = (tmp_path / "x.safetensors").stat()
    assert stat.st_size == 10**12 and stat.st_blocks * 512 < 100_000


def test_what_does_not_fit_is_named(tmp_path):
    reasons = {}
    for name in ("careless/bert-missing", "careless/resnet-extra", "careless/resnet-shape", "odd/remote-code"):
        folder = tmp_path / name.replace("/", "--")
        folder.mkdir()
        write_files(folder, MODELS[name].files, hollow=True)
        reasons[name] = verdict(folder, name)[1]
    assert reasons["careless/bert-missing"] == (
        "lacks 1 tensors of BertForMaskedLM: 'bert.encoder.layer.1.intermediate.dense.weight'"
    )
    assert "layer5.0.conv1.weight" in reasons["careless/resnet-extra"]
    assert "size mismatch for layer1.0.conv1.weight" in reasons["careless/resnet-shape"]
    assert reasons["odd/remote-code"] == "needs its own code: transformers has no OddModel"


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"auto_map": {"AutoModel": "modeling_vit.ViTModel"}}, "accepted"),  # its class is the library's all the same
        ({"architectures": None}, "missing_weights"),  # it means the bare model then, which has a pooler
        ({"num_hidden_layers": 10**6}, "unloadable"),
        ({"hidden_size": "wide"}, "unloadable"),
        ({"hidden_size": 36}, "mismatched_weights"),
    ],
)
def test_a_changed_config_is_seen_through(tmp_path, changes, outcome):
    write_files(tmp_path, MODELS["google/vit-base-patch16-224"].files, hollow=True)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, reason = verdict(tmp_path, "org/vit")
    assert found == outcome, reason


def test_a_timm_model_that_transformers_saved_is_loaded_by_transformers(tmp_path):
    settings = {"architecture": "test_efficientnet", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}}
    model = TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(settings))
    model.save_pretrained(tmp_path)
    assert verdict(tmp_path, "org/wrapped") == ("accepted", None)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("timm_model.classifier.bias")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert verdict(tmp_path, "org/wrapped")[0] == "missing_weights"


def test_an_adapter_holds_its_own_tensors_and_names_its_base(tmp_path):
    write_files(tmp_path, MODELS["lora-lab/bert-tiny-lora"].files)
    library, config = read_config(tmp_path)
    lora = ["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"]
    check_loadable(tmp_path, "org/lora", library, config, lora)
    with pytest.raises(RefusedModel, match="has beyond 1 tensors of LORA adapter: 'bert.pooler.weight'"):
        check_loadable(tmp_path, "org/lora", library, config, [*lora, "bert.pooler.weight"])
    with pytest.raises(RefusedModel, match="lacks all of 1 tensors of LORA adapter: 'lora_"):
        check_loadable(tmp_path, "org/lora", library, config, ["bert.pooler.weight"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(RefusedModel, match="names no base model"):
        check_loadable(tmp_path, "org/lora", library, config, lora)


def test_the_libraries_reports_are_as_loud_after_the_check_as_before(tmp_path):
    import transformers

    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    write_files(tmp_path, MODELS["google/vit-base-patch16-224"].files, hollow=True)
    verdict(tmp_path, "org/vit")
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == (level, bars)
