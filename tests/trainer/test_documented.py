"""The table of behaviours in docs/trainer.md: complete, and true about the tests."""

from __future__ import annotations

import re

from tests.support.processes import ROOT

TABLE = re.findall(r"^\| (\d+) \| .+ \| (.+) \|$", (ROOT / "docs" / "trainer.md").read_text(), flags=re.M)


def test_every_behaviour_is_mapped_to_a_test_that_is_named_after_it() -> None:
    """All 52, each with a test in every file that the table names."""
    assert [int(number) for number, _ in TABLE] == list(range(1, 53))
    for number, files in TABLE:
        for file in files.split(", "):
            tests = (ROOT / "tests" / "trainer" / f"test_{file}.py").read_text()
            assert re.search(rf"def test_behaviours?_(\d+_)*{number}_", tests), f"behaviour {number} in test_{file}.py"
