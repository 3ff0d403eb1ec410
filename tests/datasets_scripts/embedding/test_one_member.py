"""One member that cannot be read, or overflows all arithmetic, never stops a run: it is listed with the reason."""

import pyarrow.parquet as pq
import pytest
import torch
from command_line import hf_wsl
from safetensors.torch import save_file


@pytest.fixture
def zoo(tmp_path):
    """A good model beside odd ones, in a folder."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    good = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    members = {
        "good": good,
        "huge": torch.full((16, 8), 1e38),
        "large": good * 1e20,
        "tiny": torch.full((16, 8), 1e-42),
        "zeros": torch.zeros(16, 8),
        "nan": torch.full((16, 8), torch.nan),
        "scalar": torch.ones(()),
    }
    for name, weight in members.items():
        save_file({"fc.weight": weight}, folder / f"{name}.safetensors")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "page.pt").write_text("<!DOCTYPE html><html>not there</html>")
    (folder / "annex.pt").write_text("/annex/objects/SHA256E-s100--0123.pt\n")
    (folder / "xet.pt").write_text("# xet version 0\nfilesize = 100\nhash = '00'\n")
    (folder / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n")
    return folder


@pytest.mark.parametrize("method", ["pooled-statistics", "spectral-norms", "profile", "random-projection"])
def test_embed_lists_what_it_refuses_and_goes_on(zoo, tmp_path, method):
    result = hf_wsl("embed", method, zoo, "--output_file", tmp_path / "t.parquet", "--quiet")
    assert result.exit_code == 0, result.output
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert {"good.safetensors", "zeros.safetensors"} <= {row["model_id"] for row in rows}
    listed = {line.split(": ")[0].strip(): line for line in result.stdout.splitlines()[1:]}
    assert len(rows) + len(listed) == 12
    assert "is an empty file" in listed["empty.safetensors"]
    assert "holds nan" in listed["nan.safetensors"]
    assert "allow_nonfinite" in listed["nan.safetensors"]
    assert "is a git-annex pointer" in listed["annex.pt"]
    assert "is a Xet pointer" in listed["xet.pt"]


def test_tokenize_admits_nan_where_it_is_asked_to(zoo, tmp_path):
    only = zoo / "nan.safetensors"
    result = hf_wsl("tokenize", only, "--output_dir", tmp_path / "a", "--quiet")
    assert result.exit_code == 1
    assert "allow_nonfinite" in result.stderr
    result = hf_wsl("tokenize", only, "--output_dir", tmp_path / "b", "--quiet", "--allow_nonfinite")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["tokenize", "collect", "embed", "generate"])
def test_the_help_of_commands_that_read_models_has_the_option(command):
    assert "--allow_nonfinite" in hf_wsl(command, "--help").stdout
