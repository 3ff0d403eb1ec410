"""Embeds many models by a backbone: windows of several models share a forward pass."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hf_wsl.workers import torch_threads
from modeling_wsl import WSLModel
from modeling_wsl.backbone.encoding import STREAM_WINDOW, HaloedWindows, haloed_rows, run_batch
from modeling_wsl.backbone.inference import inference_backbone
from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.embedding.pooling import LatentPool
from modeling_wsl.loading import load_pipeline
from modeling_wsl.pipelines import WeightEmbeddingPipeline
from modeling_wsl.tokens.manifest import WeightManifest

from .embed_config import EmbedConfig
from .plain_methods import SameTensors


BATCHES_HELD = 4  # rows of so many batches are put in order of length, so that little is padded


@dataclass
class _Model:
    name: str
    pool: LatentPool
    num_tokens: int


@dataclass(frozen=True)
class _Row:
    model: _Model
    fields: dict[str, Tensor]
    core: slice  # the tokens whose latents are kept

    @property
    def length(self) -> int:
        return self.fields["tokens"].shape[0]


class PackedEncoder:
    """Encodes the windows of one model after the other, several models in a batch.

    A batch holds as many tokens as `batch_size` full windows, so that models of a few tokens go through the backbone
    by hundreds. Shorter rows are padded and masked: what shares a batch changes an embedding by rounding alone.

    Args:
        backbone: folder or Hub id.
        config: of the run.

    Raises:
        CheckpointError: the backbone cannot be read.
    """

    def __init__(self, backbone: str, config: EmbedConfig):
        self.embedder = load_embedder(backbone, config)
        self.extractor = self.embedder.feature_extractor
        self.config = config
        self.threads = torch.get_num_threads()  # `embed_models` reads the models with one
        model_config = self.embedder.model.config
        self.window_size = config.window_size or model_config.window_size
        self.batch_tokens = config.batch_size * (self.window_size + 2 * config.halo)
        self.model, self.autocast = inference_backbone(self.embedder.model, precision=config.precision)
        self.same = SameTensors("pooling='layers'", "pooling='mean'") if config.pooling == "layers" else None
        self.waiting: list[_Row] = []
        self.waiting_tokens = 0
        self.done: dict[str, tuple[np.ndarray, dict[str, np.ndarray] | None]] = {}

    @property
    def commit(self) -> str | None:
        """Of a backbone on the Hub."""
        return getattr(self.embedder.model.config, "_commit_hash", None)  # not there where a folder was loaded

    def add(
        self, name: str, checkpoint: Checkpoint, manifest: WeightManifest, advance: Callable[[int], object]
    ) -> None:
        """Reads a model, and encodes whatever fills a batch; `advance` is called with the number of tokens read.

        Raises:
            CheckpointError: the model cannot be read to its end; nothing of it is left.
            ValueError: pooling="layers", and its layers are not those of the first model.
        """
        if self.same is not None:
            self.same.check(name, manifest)
        windows = HaloedWindows(manifest.num_tokens, self.window_size, self.config.halo)
        pool = LatentPool(manifest.layers, self.embedder.model.config.latent_size, self.config.pooling)
        model = _Model(name, pool, manifest.num_tokens)
        try:
            for index, fields in haloed_rows(self.extractor.stream(checkpoint, STREAM_WINDOW), windows):
                (start, stop), offset = windows.core(index), windows.row_start(index)
                self.waiting.append(_Row(model, fields, slice(start - offset, stop - offset)))
                self.waiting_tokens += windows.row_length
                advance(stop - start)
                if self.waiting_tokens >= BATCHES_HELD * self.batch_tokens:
                    self.encode_waiting()
        except Exception:
            self.waiting = [row for row in self.waiting if row.model is not model]
            raise
        if self.same is not None:
            self.same.keep(name, manifest)

    def encode_waiting(self) -> None:
        rows = sorted(self.waiting, key=lambda row: row.length)  # stable
        self.waiting, self.waiting_tokens = [], 0
        while rows:
            count = 1
            while count < len(rows) and (count + 1) * rows[count].length <= self.batch_tokens:
                count += 1
            self._encode(rows[:count])
            rows = rows[count:]

    def finish(self) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray] | None]]:
        """Name -> embedding float32 `[d]`, and those of its layers where the run asks for them."""
        self.encode_waiting()
        return self.done

    def _encode(self, rows: list[_Row]) -> None:
        fields = rows[0].fields
        batch = {name: pad_sequence([row.fields[name] for row in rows], batch_first=True) for name in fields}
        with torch_threads(self.threads):
            latents = run_batch(self.model, self.model.token_features, batch, self.autocast)
        latents = latents.float().cpu()  # [rows, longest, latent_size]
        for row, part in zip(rows, latents, strict=True):
            pool = row.model.pool
            pool.add(part[row.core], row.fields["positions"][row.core, 1])
            if pool.num_tokens == row.model.num_tokens:
                self.done[row.model.name] = (pool.embedding(), pool.per_layer() if self.config.per_layer else None)


def load_embedder(backbone: str, config: EmbedConfig) -> WeightEmbeddingPipeline:
    """The pipeline of a backbone; with `config.untrained`, of its architecture with weights drawn by the seed.

    A linear path, which training starts at PCA, is then a random projection; and the deep path beside it, which
    starts silent, speaks: a network of random weights is meant, not the random projection alone.
    """
    embedder = load_pipeline("weight-embedding", backbone, revision=config.revision, progress=False)
    if config.untrained:
        trained = embedder.model
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            fresh = WSLModel(copy.deepcopy(trained.config))
            if fresh.config.linear_path:
                nn.init.normal_(fresh.encoder.proj_out.weight, std=fresh.config.initializer_range)
        embedder.model = fresh.to(trained.device, trained.dtype).eval()
    return embedder
