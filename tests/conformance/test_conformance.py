"""Every kind of checkpoint is read bit for bit, dequantized within a bound, or refused for its reason.

`make conformance` writes the same cases, made anew where their libraries are installed, into docs/checkpoints.md.
"""

import json

import pytest
from case import Case, available, try_case
from report import BEGIN, END, PAGE, RESULTS, section_of


@pytest.mark.parametrize("case", available(), ids=lambda case: case.name)
def test_a_checkpoint_is_read_exactly_or_refused_for_its_reason(case: Case, tmp_path):
    source, truth, _ = case.prepare(tmp_path, anew=False)
    report = try_case(case, source, truth)
    assert not report.problem, f"{case.name} {report.problem}"


def test_the_page_shows_the_committed_results():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert section_of(results["rows"]) == PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert not [row["name"] for row in results["rows"] if "problem" in row]
