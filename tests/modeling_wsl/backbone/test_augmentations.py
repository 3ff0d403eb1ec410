import torch

from modeling_wsl.backbone.views import augment, two_views


def window(batch=3):
    tokens = torch.randn(batch, 40, 50, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 5, 20:] = mask[:, 39] = False
    return torch.where(mask, tokens, 0), mask


def test_views_are_reproducible_from_a_generator_and_from_the_global_seed():
    tokens, mask = window()
    first, second = (
        two_views(tokens, mask, 0.1, 0.2, generator=torch.Generator().manual_seed(7))[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    torch.manual_seed(3)
    first = two_views(tokens, mask, 0.1, 0.2)[0]
    torch.manual_seed(3)
    assert torch.equal(first, two_views(tokens, mask, 0.1, 0.2)[0])


def test_the_two_views_of_a_window_differ_and_stand_half_a_batch_apart():
    tokens, mask = window()
    views, _ = two_views(tokens, mask, noise_std=0.1)
    assert views.shape == (6, 40, 50)
    for i in range(3):
        assert not torch.equal(views[i], views[i + 3])
        assert (views[i] - tokens[i]).abs().max() < (views[i] - tokens[(i + 1) % 3]).abs().max()


def test_noise_is_multiplicative_and_has_the_named_spread():
    tokens, _ = window()
    ratio = augment(tokens[:, :5], noise_std=0.1, generator=torch.Generator().manual_seed(0)) / tokens[:, :5] - 1
    assert abs(ratio.mean()) < 0.02
    assert abs(ratio.std() - 0.1) < 0.02
    assert torch.equal(augment(tokens, noise_std=0.0), tokens)


def test_masking_zeroes_the_named_share_of_the_weights():
    tokens, _ = window()
    view = augment(tokens[:, :5], noise_std=0.0, mask_ratio=0.25, generator=torch.Generator().manual_seed(0))
    erased = view == 0
    assert abs(erased.float().mean() - 0.25) < 0.05
    assert torch.equal(view[~erased], tokens[:, :5][~erased])


def test_padding_stays_zero_even_where_it_holds_garbage():
    tokens, mask = window()
    garbage = torch.where(mask, tokens, torch.nan)
    view = augment(garbage, mask, noise_std=0.1, mask_ratio=0.1)
    assert (view[~mask] == 0).all()
    assert view.isfinite().all()


def test_the_target_is_the_view_itself_or_the_clean_window():
    tokens, mask = window()
    views, targets = two_views(tokens, mask, noise_std=0.1)
    assert torch.equal(targets, views)
    views, targets = two_views(tokens, mask, noise_std=0.1, denoise=True)
    assert torch.equal(targets, torch.cat([tokens, tokens]))
    assert not torch.equal(views, targets)


def test_a_single_window_and_half_precision_keep_shape_and_dtype():
    tokens = window(1)[0].to(torch.bfloat16)
    views, targets = two_views(tokens)
    assert views.shape == targets.shape == (2, 40, 50)
    assert views.dtype == torch.bfloat16
