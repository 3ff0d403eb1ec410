"""Runs the conformance table: writes results/conformance.json and the table in docs/checkpoints.md.

PYTHONPATH=.:tests/fixtures python tests/conformance/report.py           # what `make conformance` runs
PYTHONPATH=.:tests/fixtures python tests/conformance/report.py --only NAME [NAME ...]   # prints these rows
"""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

from case import Case, all_cases, available, in_new_folder, try_case

from hf_wsl.files import write_json, write_text
from hf_wsl.tables import markdown_table, plain


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "checkpoints.md"
RESULTS = ROOT / "results" / "conformance.json"
BEGIN = "<!-- conformance: written by `make conformance` -->"
END = "<!-- /conformance -->"


def row_of(case: Case) -> dict:
    def run(folder: Path) -> dict:
        source, truth, maker = case.prepare(folder, anew=True)
        report = try_case(case, source, truth)
        says = report.says.replace(str(folder), "…").replace(str(case.fixture / "files"), "…")
        row = {"name": case.name, "kind": case.kind, "layout": case.layout, "maker": maker}
        row |= {"outcome": report.outcome, "largest_relative_error": report.error, "says": says}
        return row | ({"problem": report.problem} if report.problem else {})

    return in_new_folder(run)


def section_of(rows: list[dict]) -> str:
    """The section of the page, between its marks."""

    def exact(row: dict) -> str:
        error = row["largest_relative_error"]
        return "" if error is None else "bit for bit" if error == 0 else f"within {error:.1g}"

    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = [
            [
                row["layout"],
                row["maker"],
                row["outcome"] + " (wrong)" * ("problem" in row),
                exact(row),
                plain(row["says"]),
            ]
            for row in rows
            if row["kind"] == kind
        ]
        header = ["file", "made by", "outcome", "exact", "what the reader says"]
        lines += [f"### {kind}", "", markdown_table(header, cells, text_columns=5), ""]
    counts = Counter(row["outcome"] for row in rows).most_common()
    counted = ", ".join(f"{count} {outcome}" for outcome, count in counts)
    return "\n".join([f"\n{len(rows)} files: {counted}.", "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Print these rows and write nothing.")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    rows = [row_of(case) for case in available() if not only or case.name in only]
    for row in rows:
        mark = "WRONG" if "problem" in row else "ok"
        print(f"{mark:6}{row['name']}: {row['outcome']} {row['largest_relative_error']} {row.get('problem', '')}")  # noqa: T201
    left_out = [case.name for case in all_cases() if case not in available()]
    counts = Counter(row["outcome"] for row in rows)
    print(f"{len(rows)} rows: {dict(counts)}; left out for want of packages: {left_out or 'none'}")  # noqa: T201
    if not only:
        write_json(RESULTS, {"rows": rows, "left_out": left_out})
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        write_text(PAGE, before + BEGIN + section_of(rows) + END + rest.partition(END)[2])
    sys.exit(any("problem" in row for row in rows))


if __name__ == "__main__":
    main()
