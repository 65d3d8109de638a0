"""The table of formats in docs/checkpoints.md is generated from the tests that check them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "checkpoints.md"
BEGIN, END = "<!-- formats -->\n", "<!-- /formats -->"


def rows():
    """Return format, direction and what is checked, from the mark of every test that has one."""
    found = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        for test in ast.parse(file.read_text()).body:
            for mark in getattr(test, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.format":
                    found.add(tuple(map(ast.literal_eval, mark.args)))
    return sorted(found, key=lambda row: [text.lower() for text in row])


def table():
    lines = ["| format | direction | what is checked |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows()]) + "\n"


def test_the_table_of_formats_is_what_the_tests_check():
    before, _, rest = PAGE.read_text().partition(BEGIN)
    shown, _, after = rest.partition(END)
    if shown.strip() != table().strip():
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
        pytest.fail(
            "docs/checkpoints.md was out of date and has been rewritten; look at it and commit it."
        )


def test_every_format_is_checked_in_the_directions_it_has():
    directions = {}
    for name, direction, _ in rows():
        directions.setdefault(name, set()).update(direction.split(" and "))
    both = {name for name, ways in directions.items() if ways >= {"in", "out"}}
    assert {"LLaVA", "Llama 3.2 Vision (Mllama)", "torchfuse", "CLIP vision towers"} <= both
