"""Parts of a list: together all of it, nothing twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unetrkit.data.parts import Part
from unetrkit.errors import UserError


@given(st.integers(0, 50), st.integers(1, 60))
def test_the_parts_of_a_list_are_all_of_it_once(length: int, parts: int):
    found = [item for k in range(parts) for item in Part(k + 1, parts).of(range(length))]
    assert sorted(found) == list(range(length))


@pytest.mark.parametrize("text", ["", "3", "3/", "a/b", "-1/3", "0/3", "4/3", "1/0", "1/3/5", " 1/3"])
def test_what_is_no_part_is_refused(text: str):
    with pytest.raises(UserError, match="is not a part"):
        Part.read(text)
