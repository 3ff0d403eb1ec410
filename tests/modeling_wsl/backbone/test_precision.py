"""The arithmetic that a machine is faster in."""

import itertools

import pytest

from modeling_wsl.backbone import precision
from modeling_wsl.backbone.precision import choose_precision


def test_the_faster_arithmetic_of_this_machine_is_chosen_and_its_seconds_are_told():
    chosen, seconds = choose_precision("cpu", 64, rows=256)
    assert set(seconds) == {"float32", "bfloat16"} and min(seconds.values()) > 0
    assert chosen == ("bfloat16" if seconds["bfloat16"] < 0.95 * seconds["float32"] else "float32")
    assert choose_precision("cpu", 64, rows=256) == (chosen, seconds)  # the same answer for the whole process


@pytest.mark.parametrize(("of_bfloat16", "expected"), [(0.5, "bfloat16"), (0.97, "float32"), (2.0, "float32")])
def test_bfloat16_must_win_clearly(monkeypatch, of_bfloat16, expected):
    clock = itertools.accumulate(itertools.chain([0.0, 1.0], itertools.cycle([0.0, 1.0, 0.0, of_bfloat16])))
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(clock))
    assert choose_precision("cpu", 8 + int(100 * of_bfloat16), rows=4)[0] == expected


def test_a_device_without_bfloat16_computes_in_float32():
    assert choose_precision("nowhere", 8) == ("float32", {})
