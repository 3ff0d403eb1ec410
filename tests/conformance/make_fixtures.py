"""Writes the files of cases whose libraries not everybody has into tests/fixtures/checkpoints.

PYTHONPATH=.:tests/fixtures python tests/conformance/make_fixtures.py NAME [NAME ...]   # with the libraries
"""

import shutil
import sys

from case import all_cases


def main(names: list[str]) -> None:
    cases = {case.name: case for case in all_cases()}
    if unknown := set(names) - set(cases) or not names:
        sys.exit(f"name cases to write, not {unknown}; there are {', '.join(cases)}")
    for name in names:
        shutil.rmtree(cases[name].fixture, ignore_errors=True)
        cases[name].keep()
        size = sum(path.stat().st_size for path in cases[name].fixture.rglob("*") if path.is_file())
        sys.stdout.write(f"{cases[name].fixture}: {size:,} bytes\n")


if __name__ == "__main__":
    main(sys.argv[1:])
