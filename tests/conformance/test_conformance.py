"""Every kind of checkpoint is read bit for bit, dequantized within a bound, or refused for its reason.

`make conformance` writes the same cases, made anew where their libraries are installed, into docs/checkpoints.md.
"""

import pytest
from case import Case, available, try_case


@pytest.mark.parametrize("case", available(), ids=lambda case: case.name)
def test_a_checkpoint_is_read_exactly_or_refused_for_its_reason(case: Case, tmp_path):
    source, truth, _ = case.prepare(tmp_path, anew=False)
    report = try_case(case, source, truth)
    assert not report.problem, f"{case.name} {report.problem}"
