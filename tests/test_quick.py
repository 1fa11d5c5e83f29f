"""The list of slow tests in quick.py names tests that there are."""

from pathlib import Path

import pytest
from quick import SLOW

HERE = Path(__file__).parent


@pytest.mark.parametrize("entry", SLOW)
def test_an_entry_of_the_list_stands_for_a_test(entry: str) -> None:
    file, _, name = entry.partition("::")
    assert (HERE / file).exists()
    assert f"def {name or 'test_'}" in (HERE / file).read_text()
