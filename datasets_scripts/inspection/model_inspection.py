"""A model looked at closely: who made it, its layers, oddities. One tensor is in memory at a time."""

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from itertools import chain
from os import PathLike
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from modeling_wsl import WSLFeatureExtractor
from modeling_wsl.backbone.inference import inference_backbone
from modeling_wsl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from modeling_wsl.checkpoints.errors import read_json
from modeling_wsl.checkpoints.folders import parse_index
from modeling_wsl.checkpoints.formats import identify
from modeling_wsl.checkpoints.parts.layouts import layout_of, list_files
from modeling_wsl.loading import load_pipeline
from modeling_wsl.tokens.manifest import TensorSpec, WeightManifest, batch_norm_names

from ..embedding.plain_methods import is_output_last
from ..model_facts import find_facts
from ..sources import LIST_SUFFIXES, ModelSource, expand_sources
from ..tokenize_config import TokenizeError
from .findings import Finding, batch_norm_oddities, gather, tensor_oddities
from .neighbors import Neighbors, NeighborSearch
from .reconstruction import Reconstruction, reconstruct_layers
from .tensor_kinds import kind_of, stem_name
from .tensor_statistics import TensorReport, tensor_statistics


@dataclass(frozen=True)
class LayerReport:
    """The tensors that share a module prefix, and how many tokens they fill."""

    name: str
    num_tokens: int
    tensors: list[TensorReport]

    @property
    def main_tensor(self) -> TensorReport:
        """The one with the most entries."""
        return max(self.tensors, key=lambda tensor: tensor.entries)


@dataclass(frozen=True)
class CarriedTensor:
    """A tensor that is not tokenized, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass(frozen=True)
class ModelInspection:
    """All that `hf-wsl inspect` shows; `dataclasses.asdict` makes JSON of it.

    Attributes:
        source: as it was named. model_id: its name in tables. revision: commit of a model on the Hub.
        file_format: of the weights. file_bytes: their size on disk.
        facts: license, family, task ... as far as the model's files say (`ModelFacts`); what is unknown is left out.
        num_parameters: floating-point entries, tied ones once, batch-norm statistics among them.
        num_tensors: as stored. dtypes: dtype -> how many of these.
        stored_as: how the file stores tensors that were dequantized -> how many of these.
        ignored: what the file holds beside the weights, a line each.
        tokenization, token_size, num_tokens, padding: how the model is cut into tokens.
        layers: in state-dict order. carried: what is not tokenized. tied: alias -> stored name.
        findings: what is odd.
        unusable: why the model can be sent through no backbone, None where it can.
        reconstruction: None without a backbone, or for an unusable model.
        neighbors: None without a table of embeddings, or for an unusable model.
    """

    source: str
    model_id: str
    revision: str | None
    file_format: str
    file_bytes: int
    facts: dict[str, str]
    num_parameters: int
    num_tensors: int
    dtypes: dict[str, int]
    stored_as: dict[str, int]
    ignored: tuple[str, ...]
    tokenization: str
    token_size: int
    num_tokens: int
    padding: float
    layers: list[LayerReport]
    carried: list[CarriedTensor]
    tied: dict[str, str]
    findings: list[Finding]
    unusable: str | None
    reconstruction: Reconstruction | None
    neighbors: Neighbors | None


def inspect_model(
    source: str | PathLike,
    backbone: str | PathLike | None = None,
    table: str | PathLike | None = None,
    precision: str = "auto",
) -> ModelInspection:
    """Inspects one model. NaN and infinite entries are reported, not refused.

    Args:
        source: a weight file, a model's folder, or a Hub id (`org/name`, `org/name@revision`).
        backbone: folder or Hub id of a WSL model: how well it reconstructs each layer.
        table: Parquet table of `hf-wsl embed`: which models of it are nearest.
        precision: of the backbone's reconstruction; see `inference_backbone`.

    Raises:
        CheckpointError: the model or the backbone cannot be read safely.
        TokenizeError: the name stands for no model, or for several.
        ValueError: the table cannot be read, or the model cannot be embedded like those in it.
    """
    model = find_model(source)
    embedder = load_pipeline("weight-embedding", backbone) if backbone is not None else None
    extractor = embedder.feature_extractor if embedder else WSLFeatureExtractor()
    options = {} if model.path else {"revision": model.revision}
    with open_checkpoint(model.location, allow_nonfinite=True, **options) as checkpoint:
        # First, so that a table that will not do costs no inspection.
        search = NeighborSearch.begin(table, model, checkpoint.revision) if table is not None else None
        # Kinds of layers and their statistics do not depend on how a backbone cuts tokens, except for their number.
        manifest = extractor.layout_of(checkpoint)
        layers = describe_layers(checkpoint, manifest)
        tensors = [tensor for layer in layers for tensor in layer.tensors]
        unusable = _why_unusable(tensors)
        reconstruction = neighbors = None
        if embedder is not None and unusable is None:
            fast, _ = inference_backbone(embedder.model, precision=precision)
            reconstruction = reconstruct_layers(str(backbone), fast, extractor, checkpoint)
        if search is not None and unusable is None:
            neighbors = search.run()
        facts = asdict(find_facts(model, checkpoint.config, checkpoint.library, checkpoint.revision))
        stored = [("notable", f"stored as {how}; dequantized here", n) for n, how in checkpoint.stored_as.items()]
        file_format, file_bytes = describe_files(checkpoint)
        return ModelInspection(
            source=str(source),
            model_id=model.model_id,
            revision=checkpoint.revision,
            file_format=file_format,
            file_bytes=file_bytes,
            facts={name: value for name, value in facts.items() if value is not None},
            num_parameters=checkpoint.num_parameters,
            num_tensors=len(checkpoint.tensors),
            dtypes=dict(Counter(spec.dtype for spec in checkpoint.tensors.values())),
            stored_as=dict(Counter(checkpoint.stored_as.values())),
            ignored=checkpoint.ignored,
            tokenization=manifest.tokenization,
            token_size=manifest.token_size,
            num_tokens=manifest.num_tokens,
            padding=manifest.padding,
            layers=layers,
            carried=describe_carried(checkpoint, manifest),
            tied=dict(checkpoint.tied),
            findings=gather(chain(tensor_oddities(tensors), batch_norm_oddities(checkpoint), stored)),
            unusable=unusable,
            reconstruction=reconstruction,
            neighbors=neighbors,
        )


def find_model(source: str | PathLike) -> ModelSource:
    """The one model that a name stands for.

    Raises:
        TokenizeError: none, or several.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in LIST_SUFFIXES:  # an index of shards, or refused when it is opened
        return ModelSource(path.name, str(path.absolute()), path.name)
    models = expand_sources([source])
    if len(models) > 1:
        raise TokenizeError(f"{source}: holds {len(models)} models; name one of them, such as {models[0].location}.")
    return models[0]


def describe_layers(checkpoint: Checkpoint, manifest: WeightManifest) -> list[LayerReport]:
    """Statistics of every tokenized tensor, read one after the other."""
    stem, reports = stem_name(manifest), []
    hidden = not is_progress_bar_enabled()
    for layer in tqdm(manifest.layers, desc="Inspecting", unit="layer", leave=False, disable=hidden):
        tensors = [
            TensorReport(
                spec.name,
                kind_of(spec, layer, stem),
                spec.shape,
                spec.dtype,
                spec.numel,
                tensor_statistics(
                    checkpoint.read(spec.name), is_output_last(spec.name) and spec.name not in checkpoint.layouts
                ),
            )
            for spec in layer.tensors
        ]
        reports.append(LayerReport(layer.name, layer.num_tokens, tensors))
    return reports


def describe_carried(checkpoint: Checkpoint, manifest: WeightManifest) -> list[CarriedTensor]:
    """The tensors that are not tokenized, with the reason."""
    statistics = batch_norm_names(checkpoint.tensors)
    return [
        CarriedTensor(s.name, s.shape, s.dtype, _why_carried(s, statistics, checkpoint.constants))
        for s in manifest.carried
    ]


def _why_carried(spec: TensorSpec, statistics: set[str], constants: Collection[str]) -> str:
    if spec.name in constants:
        return "constant that the architecture computes"
    if spec.name in statistics:
        return "running statistic of a batch norm"
    if spec.numel == 0:
        return "has no entries"
    if not spec.torch_dtype.is_floating_point:
        return f"{spec.dtype} is no floating-point type"
    return f"{spec.dtype} does not pass through float32 unchanged"


def describe_files(checkpoint: Checkpoint) -> tuple[str, int]:
    """Format and size in bytes of the files that a checkpoint was opened from."""
    path = checkpoint.path
    if path.is_dir():
        parts = [file for file in path.rglob("*") if file.is_file() and not file.name.endswith(".py")]
        return f"parts of one model ({layout_of(path, list_files(path))})", sum(file.stat().st_size for file in parts)
    kind = identify(path)
    if kind != "json":
        return kind, path.stat().st_size
    shards = parse_index(path, read_json(path, "the index")).shards
    size = sum((path.parent / shard).stat().st_size for shard in shards)
    return f"{identify(path.parent / shards[0])}, {len(shards)} shards", size


def _why_unusable(tensors: list[TensorReport]) -> str | None:
    for tensor in tensors:
        if tensor.statistics.nan + tensor.statistics.infinite:
            return f"{tensor.name} holds NaN or infinity"
    return None if tensors else "it has no tokens"
