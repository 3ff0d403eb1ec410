"""`compare`, `scan` and copies by fingerprints: the verdict of each kind of copy, and of strangers."""

import json

import pytest
import torch
from command_line import hf_wsl
from search_fixtures import new_net, train, write_model
from torch import nn

from datasets_scripts.embedding import EmbeddingTable, embed
from datasets_scripts.search.compare import compare, write_comparison
from datasets_scripts.search.duplicates import find_copies
from datasets_scripts.search.scan import scan
from datasets_scripts.sources import expand_sources
from hf_wsl.options import ConfigError
from modeling_wsl import CheckpointError


def run(*arguments: str) -> str:
    outcome = hf_wsl(*arguments)
    assert outcome.exit_code == 0, outcome.stderr
    return outcome.stdout


def wide_net(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 40, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(40 * 9, 64), nn.ReLU(), nn.Linear(64, 10)).state_dict()


def matrices(state, change):
    return {name: change(tensor) if tensor.dim() > 1 else tensor for name, tensor in state.items()}


def noisy(size: float):
    generator = torch.Generator().manual_seed(1)
    return lambda tensor: tensor + size * tensor.std() * torch.randn(tensor.shape, generator=generator)


def rounded(levels: int):
    return lambda tensor: (tensor / tensor.abs().max() * levels).round() * tensor.abs().max() / levels


def pruned(tensor):
    return torch.where(tensor.abs() >= tensor.abs().median(), tensor, 0)


def permuted(state, scale: bool = False):
    state, generator = dict(state), torch.Generator().manual_seed(2)
    for layer, following, norms in (("0", "3", ["1"]), ("3", "6", []), ("6", "8", [])):
        count = len(state[f"{layer}.weight"])
        order = torch.randperm(count, generator=generator)
        factor = torch.rand(count, generator=generator) + 0.5 if scale and not norms else torch.ones(count)
        for name in [f"{layer}.weight", f"{layer}.bias", *(n for n in state if n.split(".")[0] in norms)]:
            if state[name].dim():
                own = factor.view(-1, *[1] * (state[name].dim() - 1)) if name.startswith(f"{layer}.") else 1
                state[name] = state[name][order] * own
        after = state[f"{following}.weight"]
        grouped = after.reshape(len(after), count, -1)[:, order] / factor[None, :, None]
        state[f"{following}.weight"] = grouped.reshape(after.shape)
    return state


BASE = wide_net(0)
COPIES = {
    "the same in a wrapper": ({f"module.{name}": tensor for name, tensor in BASE.items()}, "same weights"),
    "float16": ({n: t.half() if t.is_floating_point() else t for n, t in BASE.items()}, "copy"),
    "slight noise": (matrices(BASE, noisy(0.005)), "copy"),
    "noise": (matrices(BASE, noisy(0.3)), "fine-tune"),
    "8 bits": (matrices(BASE, rounded(127)), "quantized copy"),
    "4 bits": (matrices(BASE, rounded(7)), "quantized copy"),
    "half of it pruned": (matrices(BASE, pruned), "pruned copy"),
    "permuted": (permuted(BASE), "permuted or rescaled copy"),
    "permuted and rescaled": (permuted(BASE, scale=True), "permuted or rescaled copy"),
    "permuted with noise": (matrices(permuted(BASE), noisy(0.3)), "permuted or rescaled copy"),
    "another seed": (wide_net(1), "same architecture only"),
    "another network": (new_net(0).state_dict(), "unrelated"),
}


@pytest.mark.parametrize("kind", COPIES)
def test_the_verdict_names_the_kind_of_copy(kind):
    copy, verdict = COPIES[kind]
    comparison = compare(BASE, copy)
    assert comparison.verdict == verdict
    assert compare(copy, BASE).verdict == verdict


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float8_e4m3fn, 448), (torch.int8, 127)])
def test_a_file_of_8_bit_codes_is_a_quantized_copy_of_its_original(tmp_path, dtype, largest):
    generator = torch.Generator().manual_seed(0)
    full, codes = {}, {}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        full[name] = 0.02 * torch.randn(48, 640, generator=generator)
        scale = full[name].abs().amax(1, keepdim=True) / largest
        whole = full[name] / scale if dtype.is_floating_point else (full[name] / scale).round()
        codes |= {name: whole.to(dtype), f"{name}_scale": scale}
    told = {"model_type": "llama", "torch_dtype": "bfloat16"}
    kind = {"num_bits": 8, "type": "float" if dtype.is_floating_point else "int"}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": kind}}}
    for folder, state, config in (
        ("full", full, told),
        ("codes", codes, told | {"quantization_config": settings}),
    ):
        write_model(tmp_path / folder, state)
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    comparison = compare(tmp_path / "full", tmp_path / "codes")
    assert comparison.verdict == "quantized copy" and comparison.closeness.kind == "copy"
    embed("profile", [tmp_path], tmp_path / "table.parquet")
    (group,) = find_copies(EmbeddingTable.read(tmp_path / "table.parquet"), expand_sources([tmp_path]))
    assert {copy.verdict for copy in group} == {"quantized copy"}


def test_a_fine_tune_with_a_new_head_is_one_of_its_parent_and_of_no_stranger():
    parent = train(new_net(3, hidden=64), 0, steps=200)
    child = train(parent, 1, steps=60, classes=6)
    assert compare(parent, child).verdict == "fine-tune"
    assert compare(train(new_net(4, hidden=64), 0, steps=200), child).verdict == "same architecture only"


def test_the_evidence_is_told_with_figures():
    comparison = compare(BASE, COPIES["permuted"][0])
    lines = "\n".join(comparison.lines())
    assert "permuted or rescaled copy: The neurons are the other model's" in lines
    assert "neurons in another order: 9" in lines and "position cosine" in lines and "pairs of strangers" in lines
    comparison = compare(BASE, COPIES["noise"][0])
    assert comparison.change == pytest.approx(0.3, abs=0.03)
    assert comparison.p_value <= 1 / comparison.strangers * 1.01
    assert all(tensor.correlation > 0.9 for tensor in comparison.changes if tensor.correlation is not None)


def test_a_comparison_is_written_as_a_page_and_as_json(tmp_path):
    comparison = compare(BASE, COPIES["permuted"][0])
    write_comparison(comparison, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert (
        "<h1>permuted or rescaled copy</h1>" in page and "Relative change by depth" in page and "<script" not in page
    )
    write_comparison(comparison, tmp_path / "comparison.json")
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["verdict"] == comparison.verdict and len(content["changes"]) == len(comparison.changes)
    with pytest.raises(ConfigError, match=r"neither .html nor .json"):
        write_comparison(comparison, tmp_path / "comparison.txt")


def test_models_that_cannot_be_compared_are_refused_by_name():
    with pytest.raises(CheckpointError, match="missing.pt: is no file"):
        compare(BASE, "missing.pt")
    with pytest.raises(CheckpointError, match="no matrix"):
        compare(BASE, {"norm.weight": torch.ones(9)})


def test_a_table_tells_copies_and_reordered_copies_from_strangers(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    for seed in range(24):
        torch.save(wide_net(100 + seed), models / f"stranger-{seed:02d}.pt")
    torch.save(BASE, models / "base.pt")
    torch.save(COPIES["noise"][0], models / "noisy.pt")
    torch.save(COPIES["permuted"][0], models / "permuted.pt")
    table = tmp_path / "table.parquet"
    run("embed", "profile", str(models), "--output_file", str(table))
    found = {match.model_id: match.kind for match in scan(COPIES["slight noise"][0], table)}
    assert [name for name, kind in found.items() if kind == "copy"] == ["base.pt", "noisy.pt"]
    assert found["permuted.pt"] == "reordered"
    assert set(list(found.values())[3:]) == {"neighbor"}
    said = run("search", str(table), "--duplicates")
    assert "group 1: 3 models" in said and "group 2" not in said
    assert "permuted.pt: permuted or rescaled copy of base.pt" in said
    said = run("scan", str(models / "permuted.pt"), "--table", str(table))
    assert "3 copies in the table" in said and "base.pt: permuted or rescaled copy" in said


def test_commands_print_the_verdict_and_what_is_near(tmp_path):
    torch.save(BASE, tmp_path / "a.pt")
    torch.save({"state_dict": COPIES["8 bits"][0], "epoch": 1}, tmp_path / "b.pt")
    said = run("compare", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--output_file", str(tmp_path / "c.html"))
    assert said.startswith("quantized copy: ") and (tmp_path / "c.html").is_file()
    said = run("scan", str(tmp_path / "a.pt"), "--top", "2")
    assert "no copies in the table" in said and said.count("like it") == 2
