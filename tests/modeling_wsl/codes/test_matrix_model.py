"""`WSLModel` with `latent_code="matrix"`; what holds for every latent code is tested in test_modeling.py."""

import pytest
import torch
from fresh_process import run_fresh
from transformers import AutoModel

from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLForPreTraining, WSLModel
from modeling_wsl.codes import matrix
from modeling_wsl.codes.matrix import MatrixCodeError, decode_windows, encode_window, noise_scale
from modeling_wsl.remote_code import code_files


SIZES = {"token_size": 16, "window_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPTIONS = {"token_standardization": True, "loss_normalization": "token", "latent_size": 10}


def config(**options):
    return WSLConfig(**{**SIZES, **OPTIONS, "latent_code": "matrix", **options})


def windows():
    """Three windows of 40 tokens: one matrix; several layers, with padding inside of tokens; one padded at its end."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 40, 3, generator=generator) @ torch.randn(3, 16, generator=generator)
    tokens += 0.2 * torch.randn(3, 40, 16, generator=generator)
    mask = torch.ones(3, 40, 16, dtype=torch.bool)
    layers, index = torch.zeros(3, 40, dtype=torch.long), torch.arange(40).repeat(3, 1)
    for layer, start in enumerate((11, 30, 31)):
        layers[1, start:] = layer + 1
        index[1, start:] = torch.arange(40 - start)
        mask[1, start - 1, 5 + layer :] = False
    mask[2, 33:] = False
    positions = torch.stack([torch.arange(40).expand(3, -1), layers, index], dim=-1)
    return {"tokens": torch.where(mask, 0.05 * tokens, 0), "token_mask": mask, "positions": positions}


def trained(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def window_of(batch, row, count=40):
    return [batch[name][row, :count] for name in ("tokens", "token_mask", "positions")]


def test_latents_are_the_code_of_each_window_and_decode_reads_it():
    model, batch = trained(WSLModel(config())), windows()
    latents = model.encode(**batch)
    assert latents.shape == (3, 40, 10)
    for row, count in enumerate((40, 40, 33)):
        assert torch.equal(latents[row, :count], encode_window(*window_of(batch, row, count), 10))
    assert (latents[2, 33:] == 0).all()
    tokens, mask = model.code.undo(latents)
    assert torch.equal(mask, batch["token_mask"])
    assert torch.equal(tokens[1], decode_windows(latents[1], 16)[0])
    assert not torch.allclose(model.decode(latents, batch["positions"]), tokens)  # corrected


@pytest.mark.parametrize("threads", [1, 2])
def test_every_window_has_a_thread_of_its_own_and_the_same_numbers_on_any_number_of_them(monkeypatch, threads):
    batch, before, seen = windows(), torch.get_num_threads(), set()
    expected = torch.stack([encode_window(*window_of(batch, row), 10) for row in range(2)])
    original = matrix.best_spectrum
    monkeypatch.setattr(matrix, "best_spectrum", lambda *piece: seen.add(torch.get_num_threads()) or original(*piece))
    torch.set_num_threads(threads)
    try:
        latents = WSLModel(config()).encode(**{name: value[:2] for name, value in batch.items()})
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(latents, expected) and seen == {1}


def test_an_untrained_model_gives_what_the_factors_give():
    model, batch = WSLModel(config()).eval(), windows()
    output = model(**batch)
    tokens, mask = model.code.undo(output.latents)
    assert torch.equal(output.reconstruction[mask], tokens[mask])
    error = (output.reconstruction - batch["tokens"])[mask].square().mean()
    assert error < 0.1 * batch["tokens"][mask].square().mean()


def test_a_window_in_a_batch_is_coded_as_alone():
    model, batch = trained(WSLModel(config())), windows()
    together = model(**batch)
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in batch.items()})
        assert torch.equal(alone.latents[0], together.latents[row])
        valid = batch["token_mask"][row]
        torch.testing.assert_close(alone.reconstruction[0][valid], together.reconstruction[row][valid])


def test_padding_in_the_middle_of_a_window_changes_nothing_else():
    model, batch = trained(WSLModel(config())), windows()
    clean = {name: value[:1] for name, value in batch.items()}
    where = torch.tensor([*range(7), *range(10, 43)])  # three padded tokens after seven

    def spread(value, fill):
        longer = torch.full((1, 43, *value.shape[2:]), fill, dtype=value.dtype)
        longer[:, where] = value
        return longer

    padded = {
        "tokens": spread(clean["tokens"], torch.nan),
        "token_mask": spread(clean["token_mask"], False),
        "positions": spread(clean["positions"], 0),
    }
    attention_mask = padded["token_mask"].any(-1)
    expected, found = model(**clean), model(**padded)
    assert torch.equal(found.latents[:, where], expected.latents)
    torch.testing.assert_close(found.reconstruction[:, where], expected.reconstruction)
    reconstruction = model.decode(found.latents, padded["positions"], attention_mask)
    torch.testing.assert_close(reconstruction[:, where], expected.reconstruction)


def test_row_sizes_spare_the_search():
    state = {"a.weight": torch.randn(24, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(3, 40)}
    batch = WSLFeatureExtractor(token_size=16)(state)
    model, row_sizes = WSLModel(config()), batch["manifest"].row_sizes()
    latents = model.encode(
        *(batch[name][None] for name in ("tokens", "token_mask", "positions")), row_sizes=row_sizes[None]
    )
    assert latents[0].view(-1)[3] in (10, 20, 40, 80, 120)
    torch.testing.assert_close(model.code.undo(latents)[0][0], batch["tokens"], rtol=1e-4, atol=1e-5)


def test_features_are_those_of_the_encoder_and_need_no_code():
    model, batch = trained(WSLModel(config())), windows()
    plain = WSLModel(config(latent_code="token")).eval()
    plain.encoder.load_state_dict(model.encoder.state_dict())
    assert torch.equal(model.token_features(**batch), plain.encode(**batch))
    # Those of a forward pass are of the tokens that the factors give, not of the tokens.
    output = model(**batch)
    tokens, mask = model.code.undo(output.latents)
    assert torch.equal(output.features, model.token_features(tokens, mask, batch["positions"]))
    # Too many layers for the code: features all the same.
    small = WSLModel(config(latent_size=4))
    assert small.token_features(**batch).shape == (3, 40, 4)


def test_a_training_step_gives_every_parameter_a_gradient_and_lowers_the_loss():
    model, batch = WSLForPreTraining(config(noise_std=0.0, contrastive_weight=0.1)), windows()
    trained(model.wsl)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        output = model(**batch)
        optimizer.zero_grad()
        output.loss.backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert [name for name in silent if not name.startswith("projection.")] == []
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(output.loss_reconstruction.item())
    assert losses[-1] < 0.7 * losses[0]


def test_latents_stay_float32_in_bfloat16_and_under_autocast():
    model, batch = trained(WSLModel(config())), windows()
    expected = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(**batch)
    narrow = model.to(torch.bfloat16)(**batch)
    valid = batch["token_mask"]
    for output in (autocast, narrow):
        assert torch.equal(output.latents, expected.latents)  # no network made them
        assert output.reconstruction.dtype == torch.float32
        error = (output.reconstruction - expected.reconstruction)[valid].square().mean().sqrt()
        assert error < 0.05 * expected.reconstruction[valid].std()


def test_noise_scale_takes_any_leading_sizes_and_leaves_structure_alone():
    model, batch = WSLModel(config()), windows()
    latents = model.encode(**batch)
    scale = model.noise_scale(latents)
    assert torch.equal(scale[1], noise_scale(latents[1], 16))
    assert torch.equal(model.noise_scale(latents[1]), scale[1])
    assert torch.equal(model.noise_scale(latents.view(3, 1, 40, 10)), scale.view(3, 1, 40, 10))
    assert (scale[:, 0, :5] == 0).all()
    noisy = latents + 0.1 * scale * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    moved = (model.decode(noisy) - model.decode(latents))[batch["token_mask"]].square().mean().sqrt()
    assert 0.03 < moved / batch["tokens"][batch["token_mask"]].std() < 0.3


def test_latents_of_several_windows_decode_one_after_the_other():
    model, batch = trained(WSLModel(config())), windows()
    latents = model.encode(**batch)
    tokens, mask = model.code.undo(latents.view(1, 120, 10))
    apart, masks = model.code.undo(latents)
    assert torch.equal(tokens.view(3, 40, 16), apart)
    assert torch.equal(mask.view(3, 40, 16), masks)
    with pytest.raises(MatrixCodeError, match="Decode whole windows"):
        model.decode(latents[:, 5:])


def test_compiled_it_computes_the_same_around_the_code():
    torch.compiler.reset()
    model, batch = WSLForPreTraining(config(noise_std=0.0)), windows()
    trained(model.wsl)
    model.train()
    expected, found = model(**batch), torch.compile(model, backend="eager")(**batch)
    assert torch.equal(found.latents, expected.latents)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction, rtol=1e-4, atol=1e-5)
    found.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.wsl.parameters()]
    model.zero_grad()
    expected.loss.backward()
    for gradient, parameter in zip(gradients, model.wsl.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


def test_weights_that_are_not_finite_are_refused_by_the_model():
    model, batch = WSLModel(config()), windows()
    batch["tokens"][0, 3, 4] = torch.nan
    with pytest.raises(MatrixCodeError, match="NaN or an infinity"):
        model(**batch)


def test_a_saved_folder_carries_the_code(tmp_path):
    model, batch = trained(WSLModel(config())), windows()
    model.save_pretrained(tmp_path)
    assert {"codes_low_rank.py", "codes_matrix.py"} <= {path.name for path in tmp_path.glob("*.py")}
    assert {"codes_low_rank.py", "codes_matrix.py"} <= set(code_files())
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.latent_code == "matrix"
    assert torch.equal(loaded(**batch).reconstruction, model(**batch).reconstruction)


@pytest.mark.slow
def test_a_saved_folder_works_without_the_library(tmp_path):
    model, batch = trained(WSLModel(config())), windows()
    model.save_pretrained(tmp_path / "model")
    torch.save(batch, tmp_path / "batch.pt")
    script = """
import sys
sys.modules["modeling_wsl"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained("model", trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
output = model(**torch.load("batch.pt"))
torch.save([output.latents, output.reconstruction.detach(), model.noise_scale(output.latents)], "result.pt")
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run_fresh(script, folder=tmp_path, **environment)
    latents, reconstruction, scale = torch.load(tmp_path / "result.pt")
    output = model(**batch)
    assert torch.equal(latents, output.latents)
    torch.testing.assert_close(reconstruction, output.reconstruction)
    assert torch.equal(scale, model.noise_scale(output.latents))
