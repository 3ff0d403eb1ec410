import math

import pytest
import reference
import torch

from modeling_wsl.backbone.losses import R2Accumulator, nt_xent, reconstruction_loss, reconstruction_r2


NORMALIZATIONS = ["none", "batch", "window", "layer", "token"]


def batch(seed=0):
    """Two windows of five tokens of six entries; layers of very different scale; suffix padding; one padded token."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 1.0, 0.01, 0.01, 0.3])[None, :, None]
    tokens = torch.randn(2, 5, 6, generator=generator) * scale
    reconstruction = tokens + 0.1 * torch.randn(2, 5, 6, generator=generator) * scale
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[0, 1, 4:] = mask[1, 3, 1:] = mask[1, 4] = False
    tokens = torch.where(mask, tokens, 0)
    layers = torch.tensor([[3, 3, 9, 9, 4], [7, 7, 7, 2, 2]])
    positions = torch.stack([torch.arange(5).expand(2, 5), layers, torch.zeros_like(layers)], dim=-1)
    return reconstruction, tokens, mask, positions


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_loss_normalization_equals_equation_1_in_value_and_gradient(normalization, mask_padding):
    reconstruction, tokens, mask, positions = batch()
    fast, slow = (reconstruction.clone().requires_grad_() for _ in range(2))
    loss = reconstruction_loss(fast, tokens, mask, positions, normalization, mask_padding)
    expected = reference.reconstruction_loss(slow, tokens, mask, positions, normalization, mask_padding)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-3, atol=1e-6)


def test_normalizations_differ_in_what_they_rebalance():
    # The same relative error everywhere: only per-token and per-layer units see it as the same.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 4, 400, generator=generator) * torch.tensor([10.0, 10.0, 0.1, 0.1])[None, :, None]
    layers = torch.tensor([[0, 0, 1, 1]])
    positions = torch.stack([layers, layers, layers], dim=-1)
    wrong_small = tokens * torch.tensor([1.0, 1.0, 0.0, 0.0])[None, :, None]
    wrong_large = tokens * torch.tensor([0.0, 0.0, 1.0, 1.0])[None, :, None]
    for normalization, rebalances in [("batch", False), ("window", False), ("layer", True), ("token", True)]:
        small, large = (
            reconstruction_loss(wrong, tokens, None, positions, normalization).item()
            for wrong in (wrong_small, wrong_large)
        )
        assert (abs(small / large - 1) < 0.1) == rebalances


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("mask_padding", [True, False])
def test_padded_tokens_and_their_garbage_change_no_loss(normalization, mask_padding):
    reconstruction, tokens, mask, positions = batch()
    loss = reconstruction_loss(reconstruction, tokens, mask, positions, normalization, mask_padding)
    garbage = torch.full((2, 3, 6), torch.nan)
    longer = [torch.cat([tensor, garbage], dim=1) for tensor in (reconstruction, tokens)]
    longer_mask = torch.cat([mask, torch.zeros(2, 3, 6, dtype=torch.bool)], dim=1)
    # Padded positions repeat layer ids that are in use.
    longer_positions = torch.cat([positions, positions[:, :3]], dim=1)
    padded = reconstruction_loss(*longer, longer_mask, longer_positions, normalization, mask_padding)
    torch.testing.assert_close(padded, loss)


def test_constant_tokens_have_no_shape_to_reconstruct():
    tokens = torch.cat([torch.ones(1, 1, 230), torch.randn(1, 1, 230)], dim=1)
    for value in (1.0, 0.1, 1e-3):
        tokens[:, 0] = value
        off = tokens + torch.tensor([[[5.0], [0.0]]])
        assert reconstruction_loss(off, tokens, normalization="token") == 0
        assert reconstruction_r2(off, tokens) == 1


def test_a_batch_without_a_weight_has_loss_zero_and_finite_gradients():
    for normalization in NORMALIZATIONS:
        reconstruction = torch.randn(1, 2, 3, requires_grad=True)
        positions = torch.zeros(1, 2, 3, dtype=torch.long)
        mask = torch.zeros(1, 2, 3, dtype=torch.bool)
        loss = reconstruction_loss(reconstruction, torch.randn(1, 2, 3), mask, positions, normalization)
        loss.backward()
        assert loss == 0
        assert reconstruction.grad.abs().sum() == 0


def test_losses_are_float32_for_half_precision_inputs_and_inside_autocast():
    reconstruction, tokens, mask, positions = batch()
    for dtype in (torch.bfloat16, torch.float16):
        loss = reconstruction_loss(reconstruction.to(dtype), tokens.to(dtype), mask, positions, "token")
        assert loss.dtype == torch.float32
    views = torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nt_xent(views)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, nt_xent(views))


def test_an_unknown_normalization_and_missing_layer_ids_are_refused():
    tokens = torch.randn(1, 2, 3)
    with pytest.raises(ValueError, match="'row'.*none, layer, batch, window, token"):
        reconstruction_loss(tokens, tokens, normalization="row")
    with pytest.raises(ValueError, match="needs positions"):
        reconstruction_loss(tokens, tokens, normalization="layer")


@pytest.mark.parametrize("rows", [2, 6, 14])
def test_nt_xent_equals_simclrs_formula_for_any_batch_size(rows):
    projections = torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    fast, slow = (projections.clone().requires_grad_() for _ in range(2))
    loss, expected = nt_xent(fast, 0.1), reference.nt_xent(slow, 0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-4, atol=1e-5)


def test_nt_xent_is_small_for_matching_views_and_zero_for_one_window():
    views = torch.eye(4)
    assert nt_xent(torch.cat([views, views])) < 1e-3
    assert nt_xent(torch.cat([views, views.roll(1, 0)])) > 5
    assert nt_xent(torch.randn(2, 4)) == 0
    with pytest.raises(ValueError, match="two views of every window.*3"):
        nt_xent(torch.randn(3, 4))


def test_nt_xent_leaves_masked_rows_out_and_stays_finite_on_zero_vectors():
    views = torch.randn(4, 5)
    padded = torch.cat([views[:2], torch.zeros(1, 5), views[2:], torch.zeros(1, 5)]).requires_grad_()
    row_mask = torch.tensor([True, True, False, True, True, False])
    loss = nt_xent(padded, 0.1, row_mask)
    torch.testing.assert_close(loss, nt_xent(views, 0.1))
    loss.backward()
    assert padded.grad.isfinite().all()
    assert nt_xent(padded, 0.1, torch.zeros(6, dtype=torch.bool)) == 0


@pytest.mark.parametrize("standardize", ["token", "none"])
def test_r2_equals_its_definition_and_accumulates_over_batches_and_processes(standardize):
    reconstruction, tokens, mask, _ = batch()
    expected = reference.reconstruction_r2(reconstruction, tokens, mask, standardize)
    assert reconstruction_r2(reconstruction, tokens, mask, standardize).item() == pytest.approx(expected, abs=1e-6)

    first, second = R2Accumulator(standardize), R2Accumulator(standardize)
    first.update(reconstruction[:1], tokens[:1], mask[:1])
    second.update(reconstruction[1:], tokens[1:], mask[1:])
    merged = R2Accumulator(standardize)
    merged.merge(first)
    merged.merge(second.state())
    assert merged.compute() == pytest.approx(expected, abs=1e-6)


def test_r2_of_each_tokens_mean_is_zero_and_nothing_to_measure_is_nan():
    tokens = torch.randn(2, 3, 50)
    assert reconstruction_r2(tokens.mean(-1, keepdim=True).expand_as(tokens), tokens).item() == pytest.approx(
        0, abs=1e-5
    )
    assert reconstruction_r2(tokens, tokens) == 1
    assert math.isnan(reconstruction_r2(torch.ones(1, 1, 4), torch.ones(1, 1, 4)))
    assert math.isnan(R2Accumulator().compute())
    with pytest.raises(ValueError, match="'row'"):
        reconstruction_r2(tokens, tokens, standardize="row")


@pytest.mark.parametrize("known", [True, False], ids=["by layer", "by window"])
def test_the_rounding_of_a_dead_filter_does_not_outweigh_a_model(known):
    torch.manual_seed(0)
    tokens = 0.02 * torch.randn(1, 40, 230)
    tokens[0, 7] = 3e-7 * tokens[0, 7]  # a dead filter: what is left of it is rounding
    layers = torch.zeros(1, 40, dtype=torch.long) if known else None
    alive = torch.ones(1, 40, 230, dtype=torch.bool)
    alive[0, 7] = False
    slight = tokens + 1e-4 * tokens.std() * torch.randn_like(tokens)
    expected = reconstruction_r2(slight, tokens, alive, layer_ids=layers).item()
    assert reconstruction_r2(slight, tokens, layer_ids=layers).item() == pytest.approx(expected, abs=1e-3)
