"""A saved folder in a process that cannot import the library: everything comes from the folder's own code files."""

import os

import pytest
import torch
from fresh_process import run_fresh
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForPreTraining, pipeline

from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLForPreTraining, WSLModel, wsl
from modeling_wsl.remote_code import AUTO_MAP, CUSTOM_PIPELINES, code_files, copy_code_files


# `None` in sys.modules makes every import of the library fail, installed or not.
PREAMBLE = """
import sys
sys.modules["modeling_wsl"] = None
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForPreTraining, pipeline
folder, second, state_file, result = sys.argv[1:]
trust = {"trust_remote_code": True}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "backbone"
    torch.manual_seed(0)
    config = WSLConfig(
        token_size=16,
        window_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        latent_size=8,
        token_standardization=True,
        linear_path=True,
    )
    WSLForPreTraining(config).save_pretrained(path)
    WSLFeatureExtractor(token_size=16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def state_dict():
    generator = torch.Generator().manual_seed(1)
    return {
        "stem.weight": torch.randn(8, 6, generator=generator),
        "stem.bias": torch.randn(8, generator=generator),
        "head.weight": torch.randn(3, 8, generator=generator),
    }


def run_without_the_library(script, folder, state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "state.pt")
    arguments = [folder, tmp_path / "second", tmp_path / "state.pt", tmp_path / "result.pt"]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run_fresh(PREAMBLE + script, *arguments, folder=tmp_path, **environment)
    return torch.load(tmp_path / "result.pt")


def test_the_auto_classes_and_both_pipelines_work_without_the_library_and_survive_saving_again(
    folder, state_dict, tmp_path
):
    script = """
model = AutoModelForPreTraining.from_pretrained(folder, **trust).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
extractor = AutoFeatureExtractor.from_pretrained(folder, **trust)
batch = extractor(torch.load(state_file))
inputs = {key: batch[key][None] for key in ("tokens", "token_mask", "positions")}
result_loss = model(**inputs).loss.item()
latents = AutoModel.from_pretrained(folder, **trust).eval().encode(**inputs)
embedding = pipeline("weight-embedding", model=folder, **trust)(torch.load(state_file))["embedding"]
generator = pipeline("weight-generation", model=folder, **trust)
model.save_pretrained(second)
extractor.save_pretrained(second)
torch.save({"loss": result_loss, "latents": latents.detach(), "embedding": torch.as_tensor(embedding)}, result)
"""
    found = run_without_the_library(script, folder, state_dict, tmp_path)
    assert set(code_files()) <= {path.name for path in (tmp_path / "second").iterdir()}

    for saved in (folder, tmp_path / "second"):
        model = AutoModelForPreTraining.from_pretrained(saved).eval()
        assert type(model) is WSLForPreTraining
        batch = AutoFeatureExtractor.from_pretrained(saved)(state_dict)
        inputs = {key: batch[key][None] for key in ("tokens", "token_mask", "positions")}
        assert model(**inputs).loss.item() == pytest.approx(found["loss"], abs=1e-5)
        torch.testing.assert_close(model.wsl.encode(**inputs), found["latents"])
        embedding = pipeline("weight-embedding", model=str(saved))(state_dict)["embedding"]
        torch.testing.assert_close(torch.as_tensor(embedding), found["embedding"])


def test_with_the_library_imported_no_trust_is_asked_for_and_its_classes_serve(folder):
    assert type(AutoModel.from_pretrained(folder)) is WSLModel
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is WSLModel
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is WSLFeatureExtractor
    for task, entry in CUSTOM_PIPELINES.items():
        assert type(pipeline(task, model=str(folder))) is getattr(wsl, entry["impl"].removeprefix("wsl."))


def test_the_maps_name_what_the_facade_offers():
    targets = [*AUTO_MAP.values(), *(entry["impl"] for entry in CUSTOM_PIPELINES.values())]
    assert sorted(targets) == sorted(f"wsl.{name}" for name in wsl.__all__)


def test_every_shipped_file_is_reached_by_relative_imports_and_imports_only_siblings(tmp_path):
    from transformers.dynamic_module_utils import get_relative_import_files

    copy_code_files(tmp_path)
    reached = {os.path.basename(path) for path in get_relative_import_files(tmp_path / "wsl.py")} | {"wsl.py"}
    assert set(code_files()) == reached
    for name, text in code_files().items():
        assert "modeling_wsl" not in text.replace(".modeling_wsl", "").replace('"modeling_wsl.', ""), name
        assert "from .." not in text, name
