"""What a call with `best_of` warns of: each prompt by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mm.engine.calls import _warn_of_missing


def test_each_prompt_is_named_with_what_its_pictures_lack() -> None:
    given = {"prompt": ["a cat", "a thing", "two dogs", "a cat"], "best_of": 3}
    found = SimpleNamespace(right=[False, None, True, False], missing=[["1 cat"], [], [], ["a cat"]])
    with pytest.warns(UserWarning) as caught:
        _warn_of_missing(found, given, [4, 5, 6, 7])
    assert [str(each.message) for each in caught] == [
        "'a cat': the model does not see in any of 3 tries 1 cat (seed 4); a cat (seed 7)",
        "best_of: 'a thing' is not read in full, or names what the model was erased of, so its pictures were "
        "not checked, and drawn once each",
    ]
