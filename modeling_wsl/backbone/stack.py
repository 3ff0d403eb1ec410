"""The transformer that encoder and decoder share, and what transformers needs to know about these models."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from huggingface_hub import create_repo, file_exists, upload_file
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..checkpoints.hub import verify
from ..configuration_wsl import WSLConfig
from ..hub_card import BACKBONE_CARD, signed
from ..loading import resolve_default
from .cpu_attention import ALL_ATTENTION_FUNCTIONS
from .saved_files import check_files, check_loaded


CARD_FILE = "README.md"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class WSLStackOutput(ModelOutput):
    """Output of one transformer, before it is projected to latents or weights.

    Args:
        last_hidden_state: [batch, tokens, hidden_size].
        hidden_states: with `output_hidden_states`, the input and every block's output, each [batch, tokens, hidden].
        attentions: with `output_attentions` and eager attention, one [batch, heads, tokens, tokens] per block.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as written in the textbook; query, key, value [batch, heads, tokens, head_dim], additive mask."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # [batch, heads, tokens, tokens]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class WSLAttention(nn.Module):
    """Multi-head self-attention over the tokens of a window, both ways, without bias."""

    def __init__(self, config: WSLConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # [batch, heads, tokens, head_dim]
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )  # [batch, tokens, heads, head_dim]
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class WSLMLP(nn.Module):
    def __init__(self, config: WSLConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden_states)))


class WSLLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block, no bias anywhere, no dropout."""

    def __init__(self, config: WSLConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.attention = WSLAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.mlp = WSLMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


# Options of `from_pretrained` with which other weights than the folder's own are loaded.
NOT_AS_SAVED = {"state_dict", "subfolder", "variant", "gguf_file", "quantization_config"}


class WSLPreTrainedModel(PreTrainedModel):
    config: WSLConfig
    base_model_prefix = "wsl"
    main_input_name = "tokens"
    input_modalities = ("weights",)
    supports_gradient_checkpointing = True
    # No label-weighted loss: a trainer that accumulates must average the micro-batches itself.
    accepts_loss_kwargs = False
    _no_split_modules = ["WSLLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": WSLLayer, "attentions": WSLAttention}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As `PreTrainedModel.from_pretrained`, and "default" is the backbone that comes with the library.

        `config._commit_hash` names the commit, where that is known: in the Auto classes and `pipeline`, and where
        `revision` is a commit. transformers 5.17 notes it itself, newer ones do not; generated models name it as the
        state of their backbone.
        """
        name = pretrained_model_name_or_path
        if name is not None:  # None where `config` and `state_dict` say it all
            name = resolve_default(name)
            verify(name, "", kwargs)
        is_own = name is not None and os.path.isdir(name) and not kwargs.keys() & NOT_AS_SAVED
        if is_own:
            check_files(name, cls)
        loaded = super().from_pretrained(name, *model_args, **kwargs)
        revision = kwargs.get("revision") or ""
        revision = getattr(revision, "resolved", revision)  # newer Auto classes look a branch or tag up beforehand
        if COMMIT.fullmatch(revision) and not os.path.isdir(name):
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info
            model.config._commit_hash = revision
        if is_own:
            check_loaded(name, loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`; config.json and the code beside it are the configuration's business.

        The folder opens with `AutoModel` and `AutoModelForPreTraining`, without this library too (then with
        `trust_remote_code=True`).
        """
        # Set on remotely loaded classes; transformers would then copy the file that defines this class, which is
        # torch's own under FSDP2, and overwrite the map of the Auto classes.
        type(self)._auto_class = None
        return super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **kwargs):
        """As `PreTrainedModel.push_to_hub`; a repository without a card gets a short one, not a form to fill in.

        `hf-wsl publish` uploads a trained folder with a card made of its training facts.
        """
        if not kwargs.get("create_pr"):  # a pull request's author may not write to the repository itself
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            if not file_exists(repo_id, CARD_FILE, token=token):
                card = BACKBONE_CARD.substitute(
                    repo_id=repo_id,
                    parameters=f"{self.num_parameters():,}",
                    layers=self.config.num_hidden_layers,
                    width=self.config.hidden_size,
                    window=self.config.window_size,
                    token_size=self.config.token_size,
                    latent_size=self.config.latent_size,
                )
                upload_file(
                    path_or_fileobj=signed(card).encode(),
                    path_in_repo=CARD_FILE,
                    repo_id=repo_id,
                    commit_message="Add a card",
                    token=token,
                )
        return super().push_to_hub(repo_id, private=private, token=token, **kwargs)


class WSLStack(WSLPreTrainedModel):
    """One of the two transformers: [batch, tokens, in_features] -> [batch, tokens, hidden_size], and `proj_out`.

    A model of its own, so that hidden states and attentions of encoder and decoder are recorded apart.
    """

    main_input_name = "features"
    _input_embed_layer = "proj_in"

    def __init__(self, config: WSLConfig, in_features: int, out_features: int, starts_silent: bool = False):
        super().__init__(config)
        self.starts_silent = starts_silent  # proj_out is 0 before training: something beside it speaks alone
        self.proj_in = nn.Linear(in_features, config.hidden_size)
        self.layers = nn.ModuleList([WSLLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.proj_out = nn.Linear(config.hidden_size, out_features)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for modules with parameters of their own only, hence the comparisons here.
        super()._init_weights(module)
        if module is self.proj_out and self.starts_silent:
            init.zeros_(module.weight)
        elif any(module is layer.attention.o_proj or module is layer.mlp.down_proj for layer in self.layers):
            # GPT-2's rule: what a block adds to the residual stream shrinks with the number of additions.
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(2 * len(self.layers)))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        features: torch.Tensor,
        position_embeddings: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> WSLStackOutput:
        """Features [batch, tokens, in_features], position embeddings [batch, tokens, hidden], mask [batch, tokens]."""
        hidden_states = self.proj_in(features)
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings.to(hidden_states.dtype)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=attention_mask, **kwargs)
        return WSLStackOutput(last_hidden_state=hidden_states)
