"""The README's example runs as it stands, and its figures and links are what they claim to be."""

import re
import subprocess
import sys
from pathlib import Path


README = Path(__file__).parents[2] / "README.md"


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    names = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["state"].keys() == names["anchor"].state_dict().keys()
    assert names["embedding"].shape == (128,)
    assert len(names["models"]) == 2
    assert (tmp_path / "generated" / "provenance.json").is_file()


def test_every_local_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    local = [link for link in links if "://" not in link]
    assert local
    assert not [link for link in local if not (README.parent / link).exists()]


def test_the_figures_of_the_readme_are_those_of_the_committed_results():
    command = [sys.executable, README.parent / "benchmarks" / "fill_readme.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python benchmarks/fill_readme.py"
