"""The context's own interface."""

from __future__ import annotations

import asyncio

import pytest

from millstream import ContextRepo
from millstream.errors import ContextError


def test_local_values_hide_global_ones() -> None:
    repo = ContextRepo({"a": 1})
    repo.set_global("b", {"c": [1]})
    token = repo.set_local("a", 2)
    assert repo.get("a") == repo.get_local("a") == 2
    assert "a" in repo
    repo.reset_local("a", token)
    assert repo.get("a") == 1
    assert repo.get("none", 5) == 5
    with repo.scope("a", 3), repo.scopes({"x": 1, "y": 2}):
        assert repo.context == {"a": 3, "b": {"c": [1]}, "x": 1, "y": 2}
    assert repo.context == {"a": 1, "b": {"c": [1]}}
    repo.reset_global("a")
    repo.clear()
    assert repo.context == {}


def test_paths_follow_keys_and_attributes() -> None:
    repo = ContextRepo({"b": {"c": "text"}})
    assert repo.resolve("b.c") == "text"
    assert callable(repo.resolve("b.c.upper"))
    with pytest.raises(ContextError, match="'d'"):
        repo.resolve("b.d")
    with pytest.raises(ContextError, match="'z' is not in the context"):
        repo.resolve("z.d")


async def test_a_local_value_belongs_to_its_task() -> None:
    repo = ContextRepo()

    async def task(value: int) -> int:
        repo.set_local("x", value)
        await asyncio.sleep(0)
        got: int = repo.get("x")
        return got

    assert await asyncio.gather(task(1), task(2)) == [1, 2]
    assert repo.get("x") is None
