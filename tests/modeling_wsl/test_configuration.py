import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_wsl import WSLConfig, WSLForPreTraining, WSLModel
from modeling_wsl.configuration_wsl import SIZES
from modeling_wsl.remote_code import AUTO_MAP, CUSTOM_PIPELINES, code_files, copy_code_files


def count_parameters(size):
    with torch.device("meta"):
        model = WSLForPreTraining(WSLConfig.from_size(size))
    positions = sum(p.numel() for name, p in model.named_parameters() if ".positions." in name)
    return sum(p.numel() for p in model.parameters()), positions


@pytest.mark.parametrize(
    ("size", "parameters", "learned_positions"),
    [("hf-small", 456_104_290, 0), ("hf-large", 909_138_274, 0), ("sane", 865_050_012, 56_985_600)],
)
def test_the_papers_sizes_have_the_papers_parameter_counts(size, parameters, learned_positions):
    assert count_parameters(size) == (parameters, learned_positions)


def test_tiny_fits_in_32_megabytes_of_bfloat16():
    with torch.device("meta"):
        model = WSLModel(WSLConfig.from_size("tiny"))
    assert 2 * sum(p.numel() for p in model.parameters()) <= 32e6


def test_every_size_is_documented_by_its_options_and_takes_overrides():
    for size in SIZES:
        config = WSLConfig.from_size(size, temperature=0.2)
        assert config.temperature == 0.2
        assert config.latent_size == 128
        assert config.intermediate_size == 4 * config.hidden_size
        ours = size in ("nano", "tiny")
        assert (config.token_standardization, config.linear_path) == (ours, ours)
        assert config.loss_normalization == ("token" if ours else "batch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "multiple of num_attention_heads"),
        ({"hidden_size": 15, "num_attention_heads": 3}, "hidden_size must be even"),
        ({"token_size": 0}, "token_size must be at least 1"),
        ({"latent_size": 2, "token_standardization": True}, "latent_size must be above 2"),
        ({"max_positions": [10, 10]}, "three positive sizes"),
        ({"contrastive_weight": 1.5}, "contrastive_weight must lie between 0 and 1"),
        ({"mask_ratio": -0.1}, "mask_ratio must lie between 0 and 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"noise_std": -1.0}, "noise_std must not be negative"),
        ({"loss_normalization": "tokens"}, "loss_normalization"),
        ({"position_encoding": "rotary"}, "position_encoding"),
        ({"latent_code": "svd"}, "latent_code"),
        (
            {"latent_code": "matrix", "token_standardization": True, "tokenization": "sparse"},
            "matrix.*dense.*'sparse'",
        ),
        ({"latent_code": "matrix"}, "matrix.*token_standardization=True.*got False and False"),
        (
            {"latent_code": "matrix", "token_standardization": True, "linear_path": True},
            "matrix.*linear_path=False.*got True and True",
        ),
        ({"token_size": "230"}, "token_size"),
    ],
)
def test_an_impossible_configuration_is_refused_with_the_reason(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        WSLConfig(**options)


def test_the_matrix_code_is_an_option_of_every_dense_size_and_saved(tmp_path):
    for size in ("nano", "tiny", "hf-small", "hf-large"):
        config = WSLConfig.from_size(size, latent_code="matrix", token_standardization=True, linear_path=False)
        assert config.latent_code == "matrix"
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).latent_code == "matrix"
    assert WSLConfig.from_size("tiny").latent_code == "token"


def test_an_unknown_option_is_refused_with_a_suggestion_and_what_transformers_or_a_file_brings_is_not(tmp_path):
    for option, meant in (("hiden_size", "hidden_size"), ("temperatur", "temperature")):
        with pytest.raises(TypeError, match=f"WSLConfig has no option '{option}'; did you mean '{meant}'"):
            WSLConfig(**{option: 1})
        with pytest.raises(TypeError, match=option):
            WSLConfig.from_size("nano", **{option: 1})
    of_transformers = {
        "architectures": ["WSLModel"],
        "attn_implementation": "eager",
        "auto_map": {},
        "custom_pipelines": {},
        "_commit_hash": "0" * 40,
        "id2label": {0: "a"},
        "max_length": 3,
        "name_or_path": "org/backbone",
        "num_labels": 1,
        "output_attentions": True,
        "output_hidden_states": True,
        "quantization_config": None,
        "return_dict": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "5.0.0",
    }
    assert WSLConfig(**of_transformers).dtype is torch.bfloat16
    assert WSLConfig(**WSLConfig.from_size("nano").to_dict()).hidden_size == 128
    newer = {**WSLConfig.from_size("nano").to_dict(), "option_of_a_newer_version": 3}
    assert WSLConfig.from_dict(newer).option_of_a_newer_version == 3
    (tmp_path / "config.json").write_text(json.dumps(newer, default=str))
    for config in (AutoConfig.from_pretrained(tmp_path), WSLConfig.from_json_file(tmp_path / "config.json")):
        assert (config.hidden_size, config.option_of_a_newer_version) == (128, 3)
        assert "_from_file" not in config.to_dict()


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'huge'.*nano, tiny, hf-small, hf-large, sane"):
        WSLConfig.from_size("huge")


def test_a_saved_configuration_comes_back_equal(tmp_path):
    config = WSLConfig.from_size("sane", temperature=0.3, mask_ratio=0.2)
    config.save_pretrained(tmp_path)
    assert WSLConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert AutoConfig.from_pretrained(tmp_path).temperature == 0.3


def test_config_json_carries_the_maps_but_the_loaded_configuration_does_not(tmp_path):
    WSLConfig.from_size("nano").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"] == AUTO_MAP
    assert written["custom_pipelines"] == CUSTOM_PIPELINES
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert "auto_map" not in vars(loaded)
    assert "custom_pipelines" not in vars(loaded)


def test_maps_rewritten_by_the_hub_are_written_back_plain(tmp_path):
    # Loading from the Hub prefixes every entry with the repository, which would tie a re-saved folder to it.
    prefixed = {name: f"org/repo--{target}" for name, target in AUTO_MAP.items()}
    WSLConfig(auto_map=prefixed).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_saved_folder_carries_every_code_file_flat(tmp_path):
    WSLConfig.from_size("nano").save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.glob("*.py")}
    assert names == set(code_files())
    assert {"configuration_wsl.py", "modeling_wsl.py", "backbone_positions.py", "wsl.py"} <= names
    assert "__init__.py" not in names
    assert not list(tmp_path.glob(".*.tmp"))


def test_copying_code_onto_itself_changes_nothing(tmp_path):
    for _ in range(2):
        assert {path.name for path in copy_code_files(tmp_path)} == set(code_files())
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == code_files()
