"""The code of the paper: each token's latents are its own, made by the encoder and undone by the decoder."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .code import CodedWindows, WindowCode


class TokenCode(WindowCode):
    """Latents are vectors of single tokens (`latent_code="token"`); embeddings pool the latents themselves."""

    name = "token"
    by_token = True
    in_context = True
    starts_silent = False
    holds_statistics = True

    @property
    def decoder_size(self) -> int:
        return self.config.latent_size

    @property
    def summary(self) -> str:
        return f"turns each token into {self.config.latent_size} numbers and those back into it"

    def encode(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        row_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return model.token_features(tokens, token_mask, positions, attention_mask)

    def decode(
        self,
        model: PreTrainedModel,
        latents: torch.Tensor,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return self._decode(model, latents, model.embed_positions(latents, positions), attention_mask)[0]

    def forward(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> CodedWindows:
        embedded = model.embed_positions(tokens, positions)
        latents, encoded = model.run_encoder(tokens, token_mask, embedded, attention_mask, **kwargs)
        reconstruction, decoded = self._decode(model, latents, embedded, attention_mask, **kwargs)
        return CodedWindows(latents, latents, reconstruction, encoded, decoded)

    def noise_scale(self, latents: torch.Tensor) -> torch.Tensor:
        """1 for content; a token's statistics move all of its `token_size` weights, so theirs is that much smaller.

        From the PCA start, a unit of content moves a token by one of its standard deviations in Euclidean norm; so do
        1 / sqrt(token_size) standard deviations of its mean, and 1 / sqrt(token_size) of its logarithmic scale.
        """
        scale = torch.ones_like(latents)
        if self.config.token_standardization:
            scale[..., -1] = self.config.token_size**-0.5
            scale[..., -2] = latents[..., -1].exp() * scale[..., -1]
        return scale

    def _decode(
        self,
        model: PreTrainedModel,
        latents: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ModelOutput]:
        features = latents
        if self.config.token_standardization:
            # A rare token with a mean in the thousands must not flood the residual stream; asinh(x) is x near 0.
            content, mean, log_std = latents.split([latents.shape[-1] - 2, 1, 1], dim=-1)
            features = torch.cat([content, mean.asinh(), log_std], dim=-1)
        features = features.to(model.decoder.proj_in.weight.dtype)
        reconstruction, decoded = model.run_decoder(features, position_embeddings, attention_mask, **kwargs)
        if self.config.linear_path:
            content = features[..., : model.linear_decoder.in_features]
            reconstruction = reconstruction + model.linear_decoder(content).to(reconstruction.device)
        if self.config.token_standardization:
            mean, log_std = (part.float().to(reconstruction.device) for part in (mean, log_std))
            reconstruction = reconstruction.float() * log_std.exp() + mean
        return reconstruction, decoded
