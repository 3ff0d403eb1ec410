"""The README's example runs as it stands, and its figures and links are what they claim to be."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_wsl.cli import COMMANDS
from hf_wsl.command_line import parse


README = Path(__file__).parents[2] / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    names = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["state"].keys() == names["anchor"].state_dict().keys()
    assert names["embedding"]["position"].shape == (128,)
    assert len(names["models"]) == 2
    assert (tmp_path / "generated" / "provenance.json").is_file()


def readme_commands():
    """The words of each `hf-wsl` command of the README and the documentation, without the program.

    `accelerate launch` is another way in.
    """
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["hf-wsl"]:
                yield words[1:]
            elif words[:3] == ["accelerate", "launch", "-m"]:
                yield [words[3].removeprefix("trainers."), *words[4:]]


def options_of(name):
    (options,) = (command.options for command in COMMANDS if command.name == name)
    if isinstance(options, str):
        module, _, attribute = options.partition(":")
        options = getattr(importlib.import_module(module), attribute)
    return options


def read(name, *arguments):
    return parse(options_of(name), arguments, program=name)


def test_the_commands_of_the_readme_have_options_that_there_are():
    commands = list(readme_commands())
    assert len(commands) > 10
    for words in commands:
        read(*words)


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_the_example_of_a_command_has_options_that_there_are(name):
    program, *words = shlex.split(options_of(name).EXAMPLE)
    assert program == "hf-wsl" and words[0] == name
    read(*words)


def test_every_local_link_of_a_page_leads_somewhere():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        local = [link for link in links if "://" not in link]
        assert local or page is not README
        assert not [link for link in local if not (page.parent / link).exists()], page


def test_the_figures_of_the_readme_are_those_of_the_committed_results():
    command = [sys.executable, README.parent / "benchmarks" / "fill_docs.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python benchmarks/fill_docs.py"
