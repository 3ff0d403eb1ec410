"""Constants stored beside weights: carried and listed, not tokenized, not tested for finiteness, given back."""

import math

import pytest
import timm
import torch

from modeling_wsl import WSLFeatureExtractor, open_checkpoint


def causal(size: int, blocked: float = 0.0, allowed: float = 1.0) -> torch.Tensor:
    return torch.full((size, size), blocked).masked_fill(torch.ones(size, size).tril().bool(), allowed)


def sinusoids(rows: int, width: int) -> torch.Tensor:
    angle = torch.arange(rows)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(rows, width)


def window_mask() -> torch.Tensor:
    """What Swin adds to the logits of four windows of 9 places: -100 between parts that the shift brought together."""
    part = torch.randint(0, 2, (4, 9), generator=torch.Generator().manual_seed(0))
    return torch.where(part[:, None] == part[:, :, None], 0.0, -100.0)


CONSTANTS = {
    "h.0.attn.bias": causal(8)[None, None],  # GPT-2
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "gpt_neox.layers.0.attention.bias": causal(8)[None, None].bool(),
    "transformer.attn_mask": causal(8, -math.inf, 0.0),  # open_clip
    "sa.heads.0.tril": causal(8),
    "layers.0.blocks.1.attn_mask": window_mask(),  # Swin
    "layers.0.att.mask": causal(8, 1.0, 0.0),
    "layers.0.self_attn.rotary_emb.inv_freq": 1 / 10000 ** (torch.arange(0, 8, 2) / 8),
    "layers.0.self_attn.rotary_emb.cos_cached": torch.rand(16, 8),
    "freqs_cis": torch.polar(torch.ones(4, 4), torch.rand(4, 4)),
    "freqs_sin": torch.rand(4, 4),
    "rope.freqs": torch.tensor([1.0, 0.1, 0.01]),
    "embeddings.position_ids": torch.arange(9)[None],
    "layers.0.attn.relative_position_index": torch.arange(16).view(4, 4),
    "layers.0.attn.relative_coords_table": torch.rand(1, 5, 5, 2),
    "pos_encoder.pe": sinusoids(12, 16)[:, None],  # the tutorial of torch
    "positional_encoding": torch.cat([torch.zeros(1, 16), sinusoids(12, 16)]).half(),
    "model.24.anchors": torch.rand(3, 3, 2),
    "model.24.anchor_grid": torch.rand(3, 1, 3, 1, 1, 2),
    "model.24.stride": torch.tensor([8.0, 16.0, 32.0]),
    "model.22.dfl.conv.weight": torch.arange(16.0).view(1, 16, 1, 1),
    "pixel_mean": torch.rand(3, 1, 1),
    "normalize.mean": torch.rand(3),
    "normalize.std": torch.rand(3),
    "spectrogram.window": torch.hann_window(32),
    "mel_scale.fb": torch.rand(17, 8),
    "down.resample_filter": torch.ones(1, 1, 2, 2) / 4,
    "alphas_cumprod": torch.rand(20).sort().values,
    "sqrt_one_minus_alphas_cumprod": torch.rand(20),
    "criterion.empty_weight": torch.ones(5),
}
WEIGHTS = {
    "h.0.attn.c_attn.bias": torch.rand(24),
    "rel.attn.bias": torch.rand(1, 1, 8, 8),  # learned, of a mask's shape
    "blocks.0.attention.bias": torch.rand(1, 4, 8, 8),
    "pos_embed": torch.randn(1, 13, 16).sin(),
    "decoder_pos_embed": sinusoids(12, 16)[None],  # a parameter, as that of MAE
    "encoder.embed_positions.weight": sinusoids(12, 16),
    "pe": torch.randn(12, 16) * 0.02,
    "mask_token": torch.rand(1, 1, 16),
    "mask": torch.rand(8, 8),
    "logit_scale": torch.tensor(2.6),
    "rope.freqs": torch.rand(2, 4, 8),  # learned frequencies of a mixed rotary embedding
    "prototypes.mean": torch.rand(64, 16),
    "stem.strides": torch.rand(64, 64),
    "window.weight": torch.rand(4, 4),
    "relative_position_bias_table": torch.rand(9, 4),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_carried_listed_and_given_back(name):
    others = {other: value for other, value in CONSTANTS.items() if other.startswith("normalize.")}
    state = {name: CONSTANTS[name], **(others if name in others else {}), "fc.weight": torch.rand(9, 9)}
    with open_checkpoint(state) as checkpoint:
        assert name in checkpoint.constants
        assert checkpoint.num_parameters == 81
    fx = WSLFeatureExtractor()
    batch = fx(state)
    assert [layer.name for layer in batch["manifest"].layers] == ["fc"]
    assert name in {spec.name for spec in batch["manifest"].carried}
    decoded = fx.decode(batch["tokens"], batch["manifest"])
    assert list(decoded) == list(state)
    assert torch.equal(decoded[name], state[name]) and decoded[name].dtype == state[name].dtype


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_is_tokenized_though_its_name_or_shape_resembles_a_constant(name):
    with open_checkpoint({name: WEIGHTS[name], "fc.weight": torch.rand(9, 9)}) as checkpoint:
        assert not checkpoint.constants
        manifest = WSLFeatureExtractor().manifest(checkpoint)
    assert name in {spec.name for layer in manifest.layers for spec in layer.tensors}


def test_a_file_of_constants_alone_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="all its floating-point tensors are constants"):
        open_checkpoint({"freqs_cos": torch.rand(4, 4)})


def test_constants_do_not_change_the_hash_of_what_is_stored_nor_a_manifest_without_them():
    state = {"fc.weight": torch.arange(81.0).view(9, 9), "fc.bias": torch.zeros(9)}
    with open_checkpoint(state) as plain, open_checkpoint({**state, "attn_mask": causal(4, -math.inf, 0.0)}) as masked:
        assert masked.sha256() != plain.sha256()  # the hash is of the file's tensors
        assert masked.num_parameters == plain.num_parameters
        manifests = [WSLFeatureExtractor().manifest(checkpoint) for checkpoint in (plain, masked)]
    assert manifests[0].layers == manifests[1].layers
    assert [spec.name for spec in manifests[1].carried] == ["attn_mask"]


def test_timms_swin_holds_no_constant_that_is_tokenized():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=3, img_size=64, window_size=2, depths=(2,) * 4
    )
    state = model.state_dict()
    masks = {name: window_mask() for name in ("layers.0.blocks.1.attn_mask", "layers.1.blocks.1.attn_mask")}
    with open_checkpoint({**state, **masks}) as checkpoint:
        assert set(masks) == checkpoint.constants & set(masks)
        assert checkpoint.num_parameters == open_checkpoint(model).num_parameters
