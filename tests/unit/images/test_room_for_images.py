"""Which images go for another one, and when there is no room for it."""

from __future__ import annotations

import pathlib

import pytest
from test_store_lives import NOW, publish, store_of

from llmux.drivers.images import budget
from llmux.drivers.images.budget import Kept, to_remove
from llmux.errors import CheckpointFailed, TreeState


@pytest.mark.parametrize(
    ("missing", "most", "gone"),
    [
        (10, 99.0, ["b"]),
        (11, 99.0, ["b", "a"]),
        (20, 4.0, ["b", "a"]),
        (20, 3.9, None),
        (21, 99.0, ["b", "a", "c"]),
        (30, 99.0, ["b", "a", "c"]),
        (31, 99.0, None),
    ],
)
def test_just_so_many_images_go_as_must(missing: int, most: float, gone: list[str] | None) -> None:
    kept = [Kept("a", 10, 3.0), Kept("b", 10, 1.0), Kept("c", 10, 9.0)]
    assert to_remove(kept, missing, (), most) == gone
    assert to_remove([Kept("e", 0, 5.0), *kept], 10, (), 99.0) == ["b"]


@pytest.mark.parametrize(
    ("needed", "free", "most_bytes", "said"),
    [
        (100, 105, None, None),
        (100, 105, 100, None),
        (101, 1000, 100, "101 bytes, more than all images may (100)"),
        (100, 104, None, "100 bytes and {home} has 104 free"),
        (100, 104, 100, "100 bytes and {home} has 104 free"),
    ],
)
def test_an_image_needs_its_place_and_a_little_more(
    home: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    needed: int,
    free: int,
    most_bytes: int | None,
    said: str | None,
) -> None:
    monkeypatch.setattr(budget, "disk_space", lambda path: (5000, free))
    images = store_of(home, max_bytes=most_bytes)
    for look in (budget.check_disk, budget.look_for_room):
        if said is None:
            look(images, "m", needed)
            continue
        with pytest.raises(CheckpointFailed) as raised:
            look(images, "m", needed)
        assert said.format(home=home) in str(raised.value)
        assert raised.value.tree is TreeState.RUNNING
        word = "max_bytes" if "more than" in said else "free some space"
        assert word in (raised.value.hint or "") and "discard" in (raised.value.hint or "")


def test_an_image_is_worth_less_the_longer_it_was_not_used(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "disk_space", lambda path: (5000, 5000))
    images = store_of(home, max_bytes=60)
    publish(images, "old", created=NOW - 3 * 3600, cold_seconds=80.0)
    publish(images, "new", created=NOW, cold_seconds=30.0)
    rows = {one.model: (one.size, one.worth) for one in budget._kept(images, replaced="new")}
    assert rows == {"old": (30, 20.0), "new": (30, 0.0)}
    assert budget.look_for_room(images, "c", 1, cold_seconds=20.0) == ["old"]
    with pytest.raises(CheckpointFailed, match="worth more or needed now leave less of 60"):
        budget.look_for_room(images, "c", 1, cold_seconds=19.9)
    with pytest.raises(CheckpointFailed, match="worth more or needed now leave less of 60"):
        budget.look_for_room(images, "c", 60, protected={"old"})
    assert budget.look_for_room(images, "new", 30, cold_seconds=0.0) == ["new"]
    assert budget.look_for_room(images, "c", 1, protected={"old"}) == ["new"]
    images.max_bytes = None
    monkeypatch.setattr(budget, "disk_space", lambda path: (5000, 104))
    assert budget.look_for_room(images, "c", 100) == ["old"]
    with pytest.raises(CheckpointFailed, match="has 104 free"):
        budget.look_for_room(images, "c", 1000)
    assert budget.enforce_budget(images) == []
    images.max_bytes = 59
    assert budget.enforce_budget(images, {"old", "new"}) == []
    assert budget.enforce_budget(images) == ["old"]
    assert [image.model for image in images.images()] == ["new"]
    images.max_bytes = 30
    assert budget.enforce_budget(images) == []
