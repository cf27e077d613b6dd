"""An error must say the same in the process that raised it and in the one that reports it."""

from __future__ import annotations

import pickle

import pytest

from unetrkit.errors import MissingExtra, UserError


@pytest.mark.parametrize("error", [UserError("a", hint="b"), MissingExtra("NRRD", "io")])
def test_message_hint_and_type_survive_a_process_boundary(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (again.message, again.hint, str(again)) == (error.message, error.hint, str(error))
