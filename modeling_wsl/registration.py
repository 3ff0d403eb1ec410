"""Registers the library with transformers' Auto classes and pipelines as soon as these are imported, and not before.

`import modeling_wsl` shall cost nothing, and transformers' Auto classes and pipelines take seconds to import. The one
way to hear of their import is a finder on `sys.meta_path`, the only thing that this library changes in a process.
"""

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration_wsl import WSLConfig

    AutoConfig.register(WSLConfig.model_type, WSLConfig, exist_ok=True)


def _register_feature_extractor() -> None:
    from transformers.models.auto.feature_extraction_auto import AutoFeatureExtractor

    from .configuration_wsl import WSLConfig
    from .feature_extraction_wsl import WSLFeatureExtractor

    AutoFeatureExtractor.register(WSLConfig, WSLFeatureExtractor, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForPreTraining

    from .configuration_wsl import WSLConfig
    from .modeling_wsl import WSLForPreTraining, WSLModel

    AutoModel.register(WSLConfig, WSLModel, exist_ok=True)
    AutoModelForPreTraining.register(WSLConfig, WSLForPreTraining, exist_ok=True)


def _register_pipelines() -> None:
    from transformers.models.auto.modeling_auto import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from .loading import DEFAULT_BACKBONE
    from .pipelines import WeightEmbeddingPipeline, WeightGenerationPipeline
    from .remote_code import CUSTOM_PIPELINES

    for pipeline in (WeightEmbeddingPipeline, WeightGenerationPipeline):
        task = next(task for task, entry in CUSTOM_PIPELINES.items() if entry["impl"].endswith(pipeline.__name__))
        PIPELINE_REGISTRY.register_pipeline(
            task,
            pipeline_class=pipeline,
            pt_model=AutoModel,
            default={"model": (DEFAULT_BACKBONE, None)},
            type=CUSTOM_PIPELINES[task]["type"],
        )


_REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.feature_extraction_auto": _register_feature_extractor,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.pipelines": _register_pipelines,
}
_WATCHED = ("transformers", __package__)


class _Imports(threading.local):
    """The watched modules that this thread is executing, and the registrations that wait until there are none.

    Modules of transformers import each other in circles: `modeling_layers`, which our model needs, imports
    `modeling_auto` before it is complete itself. Only when the outermost import is done can ours start.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.waiting: list[str] = []

    def execute(self, loader: Loader, module: ModuleType) -> None:
        self.depth += 1
        try:
            loader.exec_module(module)
            if module.__name__ in _REGISTRATIONS:
                self.waiting.append(module.__name__)
        finally:
            self.depth -= 1
            while self.waiting and not self.depth:
                _REGISTRATIONS[self.waiting.pop(0)]()


class _WatchingLoader(Loader):
    """Loads as `loader` does, and tells `imports`. The module itself sees `loader` only."""

    def __init__(self, loader: Loader, imports: _Imports):
        self.loader, self.imports = loader, imports

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.imports.execute(self.loader, module)


class _RegisteringFinder(MetaPathFinder):
    """Finds nothing itself: asks the other finders, and has the loader of a watched module tell when it is done."""

    def __init__(self) -> None:
        self.imports = _Imports()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _WATCHED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _WatchingLoader(spec.loader, self.imports)
                return spec
        return None


_FINDER = _RegisteringFinder()


def install() -> None:
    """Registers with what is imported already, now, and with the rest as soon as it is."""
    if _FINDER in sys.meta_path:
        return
    sys.meta_path.insert(0, _FINDER)
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            importlib.import_module(name)  # waits for another thread that is still importing it
            register()
