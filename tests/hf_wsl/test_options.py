"""Options: a dataclass filled from defaults, a YAML file and arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_wsl.command_line import parse, run_command
from hf_wsl.options import REQUIRED, ConfigError, argument, build, option, part_of


@dataclass(frozen=True)
class Images:
    images: str = option("", "folder")
    image_size: int = option(224, "pixels")
    flip: bool = option(True, "left to right")
    seed: int = option(0, "of the splits")


@dataclass(frozen=True)
class Greeting:
    loud: bool = option(False, "Shout.", group="voice")
    pauses: list[float] = option([], "Seconds between the greetings.")
    tone: str = option("warm", "Of the voice.", ("warm", "cold"))


@dataclass(frozen=True)
class Greet(Greeting):
    EXAMPLE = "greet Ada --times 2"

    names: list = argument("Whom to greet.")
    times: int = option(1, "Greetings for each.")
    friends: list = option([], "Who greets along.")
    title: str | None = option(None, "Before the name.")
    data: dict = option({}, "options of the images", of=(Images,), hidden=("seed",))
    extra: dict = option({}, "anything")
    output_dir: Path = option(REQUIRED, "Where the greetings go.", metavar="DIR", was=("out",))
    polite: bool = option(True, "Say please.", short="p")


def read(*arguments: str) -> Greet:
    return parse(Greet, ["Ada", "--output_dir", "here", *arguments], program="greet")


def test_arguments_are_given_by_their_place_before_or_between_options():
    assert read().names == ["Ada"]
    assert read("Grace", "--times", "2", "Joan, Maria").names == ["Ada", "Grace", "Joan, Maria"]
    assert read("--", "--times").names == ["Ada", "--times"]
    assert parse(Greet, ["--output_dir=here", "--loud", "Ada"], program="greet").names == ["Ada"]


def test_names_take_dashes_or_underscores_and_no_abbreviation():
    assert read("--output-dir", "there").output_dir == Path("there")
    assert read("--data.image-size", "32").data == read("--data.image_size=32").data == {"image_size": 32}
    with pytest.raises(ConfigError, match="unknown option '--time'. Did you mean '--times'?"):
        read("--time", "2")


def test_lists_are_repeated_or_separated_by_commas():
    assert read("--friends", "a,b", "--friends", "c").friends == ["a", "b", "c"]
    assert read("--pauses", "1,2e-1").pauses == [1.0, 0.2]
    with pytest.raises(ConfigError, match="option 'pauses' takes a number, not 'long'"):
        read("--pauses", "1,long")


def test_flags_need_no_value_and_can_be_switched_off():
    assert read("--loud").loud and read("--loud", "true").loud and read("--loud", "Grace").names == ["Ada", "Grace"]
    for words in (["--no_polite"], ["--no-polite"], ["--polite", "false"], ["--polite=no"]):
        assert read(*words).polite is False
    assert read("-p").polite is True
    with pytest.raises(ConfigError, match="takes true or false, not 'perhaps'"):
        read("--loud=perhaps")


def test_groups_have_the_types_of_their_dataclass_or_those_of_yaml():
    assert read("--data.flip", "false", "--data.images", "1e3").data == {"flip": False, "images": "1e3"}
    assert read("--extra.a-b", "[1, x]", "--extra.c=1e-3").extra == {"a-b": [1, "x"], "c": 0.001}
    with pytest.raises(ConfigError, match="option 'data': option 'image_size' takes a whole number, not 'large'"):
        read("--data.image_size", "large")
    with pytest.raises(ConfigError, match="unknown option '--data.imagesize'. Did you mean '--data.image_size'?"):
        read("--data.imagesize", "3")
    with pytest.raises(ConfigError, match="mine: option 'data': unknown option 'image'. Did you mean 'images'?"):
        build(Greet, ("mine", {"data": {"image": "x"}}))


def test_a_file_gives_arguments_too_and_the_command_line_outranks_it(tmp_path):
    (tmp_path / "greet.yaml").write_text(
        "names: [Ada]\noutput_dir: here\ntimes: '3'\ndata: {image_size: 8, flip: no}\n"
    )
    given = parse(Greet, ["--config", str(tmp_path / "greet.yaml"), "--data.image_size", "9"], program="greet")
    assert (given.names, given.times, given.data) == (["Ada"], 3, {"image_size": 9, "flip": False})


def test_what_is_required_and_missing_is_named():
    with pytest.raises(ConfigError, match=r"options 'names', 'output_dir' \(--output_dir ...\) are missing"):
        parse(Greet, [], program="greet")


def test_an_earlier_name_is_refused_with_the_new_one():
    with pytest.raises(ConfigError, match="unknown option '--out'. It is '--output_dir' now."):
        read("--out", "there")


def test_help_has_groups_types_choices_and_the_example(capsys):
    with pytest.raises(SystemExit):
        parse(Greet, ["--help"], program="greet", summary="Greet people.")
    text = " ".join(capsys.readouterr().out.split())
    for shown in (
        "usage: greet [options] NAMES ... Greet people.",
        "voice: --loud [true|false] Shout. (default: false)",
        "--pauses FLOAT,...",
        "--tone warm|cold Of the voice. (default: warm)",
        "--output_dir DIR Where the greetings go. (required)",
        "--data.image_size INT pixels (default: 224)",
        "--extra.KEY VALUE anything",
        "-p, --polite [true|false]",
        "Example: greet Ada --times 2",
    ):
        assert shown in text, shown
    assert "--data.seed" not in text


def test_the_options_of_a_part_are_taken_from_the_whole():
    assert part_of(read("--loud"), Greeting) == Greeting(loud=True)


def test_a_command_prints_its_lines_and_gives_an_exit_code(tmp_path, capsys):
    arguments = ["Ada", "--output_dir", str(tmp_path)]
    assert run_command(Greet, lambda options: [f"Hello {options.names[0]}"], arguments, program="greet") == 0
    assert run_command(Greet, lambda options: None, arguments, program="greet") == 0
    assert capsys.readouterr().out == "Hello Ada\n"
    assert run_command(Greet, lambda options: None, [*arguments, "--tims", "2"], program="greet") == 1
    assert capsys.readouterr().err.startswith("error: command line: unknown option '--tims'.")
    assert run_command(Greet, lambda options: None, ["--help"], program="greet") == 0


def test_processes_of_a_run_say_an_error_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_command(Greet, lambda options: None, ["Ada"], program="greet") == 1
    assert capsys.readouterr().err == ""
