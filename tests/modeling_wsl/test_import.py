"""`import modeling_wsl` costs nothing, and what it promises is there when transformers is imported, in any order."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import run_fresh

import modeling_wsl


REGISTERED = """
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForPreTraining
from transformers.pipelines import PIPELINE_REGISTRY
sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "latent_size": 8, "window_size": 32}
config = AutoConfig.for_model("wsl", **sizes)
assert type(config) is modeling_wsl.WSLConfig
assert type(AutoModel.from_config(config)) is modeling_wsl.WSLModel
assert type(AutoModelForPreTraining.from_config(config)) is modeling_wsl.WSLForPreTraining
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
assert FEATURE_EXTRACTOR_MAPPING[type(config)] is modeling_wsl.WSLFeatureExtractor
for task, kind in (("embedding", "WeightEmbeddingPipeline"), ("generation", "WeightGenerationPipeline")):
    registered = PIPELINE_REGISTRY.check_task(f"weight-{task}")[1]
    assert registered["impl"] is getattr(modeling_wsl, kind)
    assert registered["default"]["model"] == (modeling_wsl.DEFAULT_BACKBONE, None)

import importlib.machinery, inspect, transformers.pipelines
from transformers.models.auto import modeling_auto
for module in (modeling_auto, transformers.pipelines, modeling_wsl.pipelines):
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
assert "class AutoModel(" in inspect.getsource(modeling_auto)
"""


def test_the_import_loads_neither_torch_nor_transformers():
    code = (
        "import sys, modeling_wsl\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'WSLModel' in dir(modeling_wsl)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "imports",
    [
        "import modeling_wsl\nfrom transformers import AutoModel, pipeline",
        "from transformers import AutoModel, pipeline\nimport modeling_wsl",
        # modeling_layers, which our model needs, imports modeling_auto before it is complete itself
        "import modeling_wsl, transformers\ntransformers.modeling_layers\ntransformers.AutoModel",
        "from modeling_wsl.pipelines import WeightEmbeddingPipeline\nimport modeling_wsl\n"
        "from transformers.models.auto import AutoModel",
    ],
    ids=["the library first", "transformers first", "in the middle of transformers", "the library's own need of it"],
)
def test_everything_is_registered_whatever_is_imported_first(imports):
    run_fresh(imports + REGISTERED)


def test_the_names_for_type_checkers_are_those_that_load():
    (block,) = (
        node
        for node in ast.parse(Path(modeling_wsl.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imports = [statement for statement in block.body if isinstance(statement, ast.ImportFrom)]
    modules = {statement.module: tuple(alias.name for alias in statement.names) for statement in imports}
    assert modules == modeling_wsl._MODULES
    assert sorted({*sum(modules.values(), ()), "__version__"}) == sorted(modeling_wsl.__all__)
    for name in modeling_wsl.__all__:
        assert getattr(modeling_wsl, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'WSLModle'"):
        _ = modeling_wsl.WSLModle
