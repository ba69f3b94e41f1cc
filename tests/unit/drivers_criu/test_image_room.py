"""checkpoint.max_bytes and a full disk: which images go for another one, and when none may."""

from __future__ import annotations

import asyncio
import pathlib

import pytest
from test_images import publish

from llmux.drivers.images.budget import Kept, to_remove
from llmux.drivers.images.room import ImageRoom
from llmux.drivers.images.store import ImageStore
from llmux.errors import CheckpointFailed, TreeState

MB = 1_000_000


@pytest.fixture
def home(tmp_path: pathlib.Path) -> pathlib.Path:
    tmp_path.chmod(0o700)
    return tmp_path


def store_of(home: pathlib.Path, max_bytes: int = 10 * MB) -> ImageStore:
    return ImageStore(str(home), max_bytes=max_bytes, clock=lambda: 1e9)


def filled(home: pathlib.Path) -> tuple[ImageStore, ImageRoom]:
    store = store_of(home)
    for name in ("a", "b"):
        publish(store, name, disk_bytes=4 * MB, cold_seconds=60.0, created=1e9)
    return store, ImageRoom(store)


def models(store: ImageStore) -> list[str]:
    return sorted(image.model for image in store.images())


def kept(*rows: tuple[str, int, float]) -> list[Kept]:
    return [Kept(*row) for row in rows]


@pytest.mark.parametrize(
    ("missing", "protected", "most", "removed"),
    [
        (0, (), 0.0, []),
        (-5, (), 0.0, []),
        (1, (), 99.0, ["small"]),
        (2, (), 99.0, ["big"]),  # the small one alone is not enough, and then not needed
        (11, (), 99.0, ["small", "big"]),
        (11, (), 3.0, None),  # worth more than what comes
        (12, (), 99.0, None),
        (1, ("small",), 99.0, ["big"]),
        (1, ("small", "big"), 99.0, None),
    ],
)
def test_the_least_valuable_go_and_no_more_than_needed(
    missing: int, protected: tuple[str, ...], most: float, removed: list[str] | None
) -> None:
    rows = kept(("big", 10, 3.0), ("small", 1, 0.1))
    assert to_remove(rows, missing, protected, most) == removed


def test_the_budget_holds_before_an_image_is_made(home: pathlib.Path) -> None:
    store, room = filled(home)
    asyncio.run(room.make("c", 2 * MB, cold_seconds=60.0))
    assert models(store) == ["a", "b"]
    assert room.take_removed() == []
    asyncio.run(room.make("c", 3 * MB, cold_seconds=60.0))
    assert len(models(store)) == 1
    (gone,) = room.take_removed()
    assert gone not in models(store)
    assert room.take_removed() == []


def test_a_former_image_of_the_model_goes_first(home: pathlib.Path) -> None:
    store, room = filled(home)
    asyncio.run(room.make("b", 6 * MB, cold_seconds=1.0))
    assert models(store) == ["a"]


def test_images_that_are_worth_more_stay(home: pathlib.Path) -> None:
    store, room = filled(home)
    with pytest.raises(CheckpointFailed, match="worth more") as raised:
        asyncio.run(room.make("c", 3 * MB, cold_seconds=5.0))
    assert raised.value.tree is TreeState.RUNNING
    assert "raise checkpoint.max_bytes" in (raised.value.hint or "")
    assert models(store) == ["a", "b"]


@pytest.mark.parametrize("how", ["read ahead", "being restored"])
def test_what_is_restored_next_is_not_removed_for_what_leaves(home: pathlib.Path, how: str) -> None:
    """Two images that the budget has no room for: the outgoing model is stopped, not dumped."""
    store = store_of(home, max_bytes=5 * MB)
    publish(store, "comes", disk_bytes=3 * MB, cold_seconds=1.0)
    room = ImageRoom(store)
    if how == "read ahead":
        room.expect("comes")
    else:
        room.in_use.add("comes")
    for look in (room.check("leaves", 3 * MB), room.make("leaves", 3 * MB, 600.0)):
        with pytest.raises(CheckpointFailed):
            asyncio.run(look)
    asyncio.run(room.enforce(()))
    assert models(store) == ["comes"]
    room.restored("comes")
    asyncio.run(room.make("leaves", 3 * MB, 600.0))
    assert models(store) == []


def test_a_look_removes_nothing(home: pathlib.Path) -> None:
    store, room = filled(home)
    asyncio.run(room.check("c", 9 * MB))
    assert models(store) == ["a", "b"]


def test_a_smaller_budget_is_in_force_at_once(home: pathlib.Path) -> None:
    filled(home)
    store = store_of(home, max_bytes=5 * MB)
    room = ImageRoom(store)
    asyncio.run(room.enforce(()))
    assert len(models(store)) == 1
    assert len(room.take_removed()) == 1


@pytest.mark.parametrize("how", ["spared", "read ahead", "being restored"])
def test_no_budget_is_worth_an_image_that_is_needed(home: pathlib.Path, how: str) -> None:
    filled(home)
    store = store_of(home, max_bytes=1 * MB)
    room = ImageRoom(store)
    if how == "read ahead":
        room.expect("a")
    elif how == "being restored":
        room.in_use.add("a")
    asyncio.run(room.enforce({"a"} if how == "spared" else ()))
    assert models(store) == ["a"]


def test_without_a_budget_nothing_goes_while_the_disk_has_room(home: pathlib.Path) -> None:
    filled(home)
    store = ImageStore(str(home), clock=lambda: 1e9)
    room = ImageRoom(store)
    asyncio.run(room.make("c", 1, cold_seconds=600.0))
    asyncio.run(room.enforce(()))
    assert models(store) == ["a", "b"]


def test_before_the_first_image_there_is_no_directory(home: pathlib.Path) -> None:
    store = ImageStore(str(home / "none"))
    assert store.images() == []
    assert store.sweep() == []


def test_what_is_no_images_home_hides_no_image(home: pathlib.Path) -> None:
    store, _ = filled(home)
    (home / "aa-notes.txt").write_text("an operator's")
    (home / "ab").mkdir(mode=0o700)
    assert models(store) == ["a", "b"]
    assert store.sweep() == []
