"""The backbone: tokens -> encoder -> latents -> decoder -> reconstruction (paper, section 3; SANE)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .backbone.losses import MIN_STD, nt_xent, reconstruction_loss, reconstruction_r2, token_moments
from .backbone.positions import LearnedPositions, SinusoidalPositions, default_positions
from .backbone.stack import WSLPreTrainedModel, WSLStack, WSLStackOutput
from .backbone.views import two_views
from .backbone.window_inputs import attendable_tokens, check_inputs, expect_positions, valid_mask
from .codes.registry import code_of
from .configuration_wsl import WSLConfig


@dataclass
class WSLModelOutput(ModelOutput):
    """Output of `WSLModel`.

    Args:
        latents: [batch, tokens, latent_size].
        features: [batch, tokens, latent_size], what the encoder says of each token, for embeddings. The latents
            themselves, unless `latent_code="matrix"`.
        reconstruction: [batch, tokens, token_size], the tokens as decoded from the latents.
        hidden_states, attentions: the encoder's, on request (see `WSLStackOutput`).
        decoder_hidden_states, decoder_attentions: the decoder's, on request.
    """

    latents: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class WSLForPreTrainingOutput(ModelOutput):
    """Output of `WSLForPreTraining`; always the same keys. "rows" is batch, or 2 x batch where views were made.

    Args:
        loss: (1 - contrastive_weight) x loss_reconstruction + contrastive_weight x loss_contrastive, float32 scalar.
        loss_reconstruction: float32 scalar, see `losses.reconstruction_loss`.
        loss_contrastive: float32 scalar, NT-Xent; 0 where no views were made.
        r2: float32 scalar without gradient, see `losses.reconstruction_r2`; against the target of the loss.
        latents, features: [rows, tokens, latent_size], see `WSLModelOutput`.
        reconstruction: [rows, tokens, token_size].
        hidden_states, attentions, decoder_hidden_states, decoder_attentions: on request, see `WSLModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    loss_reconstruction: torch.FloatTensor | None = None
    loss_contrastive: torch.FloatTensor | None = None
    r2: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None


class WSLModel(WSLPreTrainedModel):
    """The autoencoder without a loss: tokens [batch, tokens, d_t] -> latents [.., latent_size] -> tokens.

    Any number of tokens; `encode` and `decode` are its two halves. Computed in the parameters' dtype, except that with
    `token_standardization` the latents and the reconstruction are float32: two of the latent numbers are a token's
    mean and log standard deviation, whose rounding to bfloat16 would shift whole tokens.

    With `latent_code="matrix"` the numbers of a window belong together: `decode` takes the latents of whole windows as
    `encode` gave them (of several, one after the other, too). `token_features` is what embeddings pool, for any code.
    """

    # The head of a WSLForPreTraining checkpoint.
    _keys_to_ignore_on_load_unexpected = [r"^projection\."]

    def __init__(self, config: WSLConfig):
        super().__init__(config)
        self.code = code_of(config)
        content_size = config.latent_size - config.num_token_statistics
        linear = config.linear_path
        self.encoder = WSLStack(config, config.token_size, content_size, starts_silent=linear)
        silent = linear or self.code.starts_silent
        self.decoder = WSLStack(config, self.code.decoder_size, config.token_size, starts_silent=silent)
        if config.position_encoding == "learned":
            self.positions = LearnedPositions(config.hidden_size, config.max_positions)
        else:
            self.positions = SinusoidalPositions(config.hidden_size)
        if config.linear_path:
            self.linear_encoder = nn.Linear(config.token_size, content_size)
            self.linear_decoder = nn.Linear(content_size, config.token_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.config.linear_path and module is self.linear_encoder:
            init.orthogonal_(module.weight)  # a random projection; PCA is better, see initialize_linear_path
        elif self.config.linear_path and module is self.linear_decoder:
            init.copy_(module.weight, self.linear_encoder.weight.T)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.proj_in

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.proj_in = value

    def encode(
        self,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        row_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latents of tokens.

        Args:
            tokens: [batch, tokens, token_size], of any floating dtype.
            token_mask: bool of the same shape, false where an entry is padding (its value is then ignored). With
                `token_standardization` the statistics are taken over the true entries. None: all entries are weights.
            positions: integers [batch, tokens, 3] (or [1, tokens, 3], for every row), [n, l, k] of each token. None:
                the first tokens of one layer.
            attention_mask: [batch, tokens], 0 where a token is padding and must not be attended to. None: the tokens
                with at least one true entry in `token_mask`.
            row_sizes: integers [batch, tokens], `WeightManifest.row_sizes`: spares `latent_code="matrix"` the search
                for the shapes of the matrices. Other codes make no use of it.

        Returns:
            [batch, tokens, latent_size].

        Raises:
            ValueError: for a wrong shape or dtype, naming the tensor.
        """
        self._check_tokens(tokens, token_mask, positions, attention_mask)
        return self.code.encode(self, tokens, token_mask, positions, attention_mask, row_sizes)

    def token_features(
        self,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The features of each token that embeddings pool: the latents, unless `latent_code="matrix"`.

        Arguments, shape and errors as in `encode`.
        """
        self._check_tokens(tokens, token_mask, positions, attention_mask)
        attention_mask = attendable_tokens(token_mask, attention_mask)
        return self.run_encoder(tokens, token_mask, self.embed_positions(tokens, positions), attention_mask)[0]

    def decode(
        self,
        latents: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens of latents: [batch, tokens, latent_size] -> [batch, tokens, token_size]; the rest as in `encode`.

        Latents do not say which tokens are padding: pass `attention_mask` where some are.

        Raises:
            MatrixCodeError: with `latent_code="matrix"`, latents that are not those of whole windows.
        """
        check_inputs("latents", latents, self.config.latent_size, None, positions, attention_mask)
        return self.code.decode(self, latents, positions, attention_mask)

    @can_return_tuple
    def forward(
        self,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attend_all: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> WSLModelOutput:
        """Encodes and decodes; arguments as in `encode`, and:

        Args:
            attend_all: promises that every token holds a weight, so that no attention mask is made and no device need
                be asked whether one is wanted.
        """
        self._check_tokens(tokens, token_mask, positions, attention_mask)
        if not attend_all:
            attention_mask = attendable_tokens(token_mask, attention_mask)
        coded = self.code.forward(self, tokens, token_mask, positions, attention_mask, **kwargs)
        return WSLModelOutput(
            latents=coded.latents,
            features=coded.features,
            reconstruction=coded.reconstruction,
            hidden_states=coded.encoder.hidden_states,
            attentions=coded.encoder.attentions,
            decoder_hidden_states=coded.decoder.hidden_states,
            decoder_attentions=coded.decoder.attentions,
        )

    @torch.no_grad()
    def initialize_linear_path(self, components: torch.Tensor, mean: torch.Tensor) -> None:
        """Sets the linear path to a PCA, and the deep path's output to zero beside it.

        The model then reconstructs what PCA with these components does, to rounding: training starts from there.

        Args:
            components: [latent_size, token_size] ([latent_size - 2, token_size] with `token_standardization`), with
                orthonormal rows, fitted on what the encoder sees: standardized tokens with `token_standardization`.
            mean: [token_size], subtracted before projecting.

        Raises:
            ValueError: without `linear_path` in the configuration, or for another shape.
        """
        if not self.config.linear_path:
            raise ValueError("This model has no linear path. Create it from a configuration with linear_path=True.")
        expected = list(self.linear_encoder.weight.shape)
        if list(components.shape) != expected or list(mean.shape) != expected[1:]:
            raise ValueError(
                f"components must have shape {expected} and mean {expected[1:]}, got {list(components.shape)} and "
                f"{list(mean.shape)}."
            )
        components = components.to(self.linear_encoder.weight.device, torch.float32)
        mean = mean.to(components)
        self.linear_encoder.weight.copy_(components)
        self.linear_encoder.bias.copy_(-components @ mean)
        self.linear_decoder.weight.copy_(components.T)
        self.linear_decoder.bias.copy_(mean)
        for stack in (self.encoder, self.decoder):
            stack.proj_out.weight.zero_()
            stack.proj_out.bias.zero_()

    def noise_scale(self, latents: torch.Tensor) -> torch.Tensor:
        """The worth of one unit of noise in each latent number, [batch, tokens, latent_size] -> same shape.

        With `latent_code="token"` 1 everywhere, but the standard deviation of the token for the number that is its
        mean (with `token_standardization`), in units of the weights, whose scale differs from layer to layer.
        With `latent_code="matrix"`, what moves each weight by its row's deviation, and 0 for counts and indices.
        """
        return self.code.noise_scale(latents)

    def run_encoder(
        self,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, WSLStackOutput]:
        """Runs the encoder on tokens, arguments as in `encode` and embedded positions.

        Returns:
            [batch, tokens, latent_size]; with `token_standardization` in float32, the last two numbers a token's mean
            and the logarithm of its standard deviation. And the transformer's output.
        """
        dtype = self.encoder.proj_in.weight.dtype
        if attention_mask is not None and attention_mask.ndim == 2:
            # Not only unattended: 0 times the NaN that a padded token may hold would reach the others.
            tokens = torch.where(attention_mask.bool()[..., None], tokens, 0)
        if token_mask is not None:
            tokens = torch.where(token_mask, tokens, 0)
        if self.config.token_standardization:
            mean, variance, _ = token_moments(tokens, token_mask)  # [batch, tokens, 1], float32
            std = variance.clamp_min(MIN_STD**2).sqrt()
            tokens = (tokens.float() - mean) / std
            if token_mask is not None:
                tokens = torch.where(token_mask, tokens, 0)
        features = tokens.to(dtype)
        encoded = self.encoder(
            features,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            return_dict=True,
            **kwargs,
        )
        latents = self.encoder.proj_out(encoded.last_hidden_state)
        if self.config.linear_path:
            latents = latents + self.linear_encoder(features).to(latents.device)
        if self.config.token_standardization:
            statistics = torch.cat([mean, std.log()], dim=-1).to(latents.device)
            latents = torch.cat([latents.float(), statistics], dim=-1)
        return latents, encoded

    def run_decoder(
        self,
        features: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, WSLStackOutput]:
        """Runs the decoder on features [batch, tokens, code.decoder_size], in the parameters' dtype.

        Returns:
            [batch, tokens, token_size], and the transformer's output.
        """
        decoded = self.decoder(
            features,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            return_dict=True,
            **kwargs,
        )
        return self.decoder.proj_out(decoded.last_hidden_state), decoded

    def _check_tokens(
        self,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> None:
        check_inputs("tokens", tokens, self.config.token_size, token_mask, positions, attention_mask)
        if self.config.tokenization == "dense":  # a sparse token ends with a row
            expect_positions(tokens, token_mask, positions)

    def embed_positions(self, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [batch or 1, tokens, hidden_size] of positions; None: of the first tokens of one layer."""
        if positions is None:
            positions = default_positions(1, tokens.shape[1], device=tokens.device)
        return self.positions(positions)


class WSLProjectionHead(nn.Module):
    """Latents of a window -> a small vector for the contrastive loss; layout of the paper's code.

    Latents [rows, tokens, latent_size], attention mask [rows, tokens] or None -> [rows, projection_size].
    """

    def __init__(self, config: WSLConfig):
        super().__init__()
        self.pooled = config.projection == "pooled"
        self.window_size = config.window_size
        in_features = config.latent_size if self.pooled else config.window_size * config.latent_size
        self.linear_1 = nn.Linear(in_features, config.projection_size, bias=False)
        self.norm_1 = nn.LayerNorm(config.projection_size, eps=config.layer_norm_eps)
        self.linear_2 = nn.Linear(config.projection_size, config.projection_size, bias=False)
        self.norm_2 = nn.LayerNorm(config.projection_size, eps=config.layer_norm_eps)

    def forward(self, latents: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        num_tokens = latents.shape[1]
        if attention_mask is not None:
            latents = torch.where(attention_mask[..., None].bool(), latents, 0)
        if self.pooled:
            count = num_tokens if attention_mask is None else attention_mask.sum(-1, keepdim=True).clamp_min(1)
            features = latents.sum(1) / count  # [rows, latent_size]
        else:
            if num_tokens > self.window_size:
                raise ValueError(
                    f'The "flat" projection head is made for windows of at most {self.window_size} tokens '
                    f'(window_size), got {num_tokens}. Crop the windows, or train with projection="pooled".'
                )
            features = nn.functional.pad(latents, (0, 0, 0, self.window_size - num_tokens)).flatten(1)
        features = self.norm_1(self.linear_1(features.to(self.linear_1.weight.dtype))).relu()
        return self.norm_2(self.linear_2(features)).relu()


class WSLForPreTraining(WSLPreTrainedModel):
    """`WSLModel` with the pretraining loss: masked reconstruction plus NT-Xent between two views of each window."""

    def __init__(self, config: WSLConfig):
        super().__init__(config)
        self.wsl = WSLModel(config)
        self.projection = WSLProjectionHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wsl.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wsl.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        make_views: bool | None = None,
        return_loss: bool = True,
        attend_all: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> WSLForPreTrainingOutput:
        """The loss on a batch of windows.

        In training two views of every window are made (`augmentations.two_views`, from torch's global random numbers,
        which Accelerate saves and restores) and go through the model as one batch of 2 x batch rows. In evaluation the
        clean windows go through once and the contrastive loss is 0. The returned keys are the same in both.

        Args:
            tokens, token_mask, positions, attention_mask: as in `WSLModel.encode`. Padded entries count in no loss.
            make_views: True or False to decide it here; None makes views in training mode only.
            return_loss: False leaves the losses and R2 out and makes no views.
            attend_all: as in `WSLModel.forward`.

        Raises:
            ValueError: for a wrong shape or dtype, or a window too long for the "flat" head.
        """
        make_views = return_loss and (self.training if make_views is None else make_views)
        if not attend_all:
            attention_mask = attendable_tokens(token_mask, attention_mask)
        if tokens.dtype in (torch.float16, torch.bfloat16):
            tokens = tokens.float()  # noise of a tenth must not be rounded to a few steps
        target = tokens
        if make_views:
            # Before anything is doubled, so that a message shows the shapes that were passed.
            check_inputs("tokens", tokens, self.config.token_size, token_mask, positions, attention_mask)
            tokens, target = two_views(
                tokens, token_mask, self.config.noise_std, self.config.mask_ratio, self.config.denoise
            )
            token_mask, attention_mask = _twice(token_mask), _twice(attention_mask)
            if positions is not None and positions.shape[0] > 1:
                positions = _twice(positions)
        output = self.wsl(
            tokens, token_mask, positions, attention_mask, attend_all=attend_all, return_dict=True, **kwargs
        )

        loss = loss_reconstruction = loss_contrastive = r2 = None
        if return_loss:
            target = target.to(output.reconstruction.device)
            valid = valid_mask(target, token_mask, attention_mask)
            loss_reconstruction = reconstruction_loss(
                output.reconstruction,
                target,
                valid,
                positions=self._layer_positions(target, positions),
                normalization=self.config.loss_normalization,
                mask_padding=self.config.loss_mask_padding,
            )
            loss_contrastive = torch.zeros_like(loss_reconstruction)
            if make_views:
                row_mask = None if attention_mask is None else attention_mask.bool().any(-1)
                projections = self.projection(output.features, attention_mask)
                loss_contrastive = nt_xent(projections, self.config.temperature, row_mask).to(loss_contrastive.device)
            weight = self.config.contrastive_weight
            loss = (1 - weight) * loss_reconstruction + weight * loss_contrastive
            r2 = reconstruction_r2(output.reconstruction, target, valid)
        return WSLForPreTrainingOutput(
            loss=loss,
            loss_reconstruction=loss_reconstruction,
            loss_contrastive=loss_contrastive,
            r2=r2,
            latents=output.latents,
            features=output.features,
            reconstruction=output.reconstruction,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            decoder_hidden_states=output.decoder_hidden_states,
            decoder_attentions=output.decoder_attentions,
        )

    def _layer_positions(self, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor | None:
        if self.config.loss_normalization != "layer":
            return None
        if positions is None:
            return default_positions(*tokens.shape[:2], device=tokens.device)
        return positions.expand(tokens.shape[0], -1, -1).to(tokens.device)


def _twice(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else torch.cat([tensor, tensor])


__all__ = [
    "WSLForPreTraining",
    "WSLForPreTrainingOutput",
    "WSLModel",
    "WSLModelOutput",
]
