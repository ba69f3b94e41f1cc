"""What the event loop may expect of inotify."""

from __future__ import annotations

import asyncio
import os
import pathlib
import threading
from collections.abc import Callable

import pytest

from llmux.drivers.processes.inotify import Inotify, Mask

Heard = Callable[[str], Callable[[Mask, str], None]]


def test_closing_does_not_hold_the_loop_up(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes its time over it."""
    closed_by: dict[int, threading.Thread] = {}
    really_close = os.close

    def close(fd: int) -> None:
        closed_by[fd] = threading.current_thread()
        really_close(fd)

    async def scenario() -> int:
        inotify = Inotify()
        inotify.watch(str(tmp_path), Mask.CREATE, lambda *_: None)
        monkeypatch.setattr(os, "close", close)
        fd: int = inotify._fd
        inotify.close()
        inotify.close()
        return fd

    fd = asyncio.run(scenario())
    assert closed_by[fd] is not threading.main_thread()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def heard(scenario: Callable[[Inotify, Heard], None]) -> list[tuple[str, Mask, str]]:
    """What the callbacks were told of all that the scenario did before the loop looked."""

    async def body() -> list[tuple[str, Mask, str]]:
        told: list[tuple[str, Mask, str]] = []
        seen = asyncio.Event()

        def listener(holder: str) -> Callable[[Mask, str], None]:
            def note(mask: Mask, name: str) -> None:
                told.append((holder, mask, name))
                if name == "last":
                    seen.set()

            return note

        inotify = Inotify()
        try:
            scenario(inotify, listener)
            async with asyncio.timeout(60):
                await seen.wait()
        finally:
            inotify.close()
        return told[:-1]

    return asyncio.run(body())


def test_events_of_a_watch_that_was_given_up_are_nobodys(tmp_path: pathlib.Path) -> None:
    """They are in the same read as the next watch's, which must get its own."""
    first, second = tmp_path / "first", tmp_path / "second"

    def scenario(inotify: Inotify, listener: Heard) -> None:
        for directory in (first, second):
            directory.mkdir()
        given_up = inotify.watch(str(first), Mask.CREATE, listener("first"))
        inotify.watch(str(second), Mask.CREATE, listener("second"))
        (first / "a").touch()
        inotify.unwatch(given_up)
        inotify.unwatch(given_up)
        (second / "b").touch()
        (second / "last").touch()

    assert heard(scenario) == [("second", Mask.CREATE, "b")]


def test_two_holders_of_one_file_hear_of_what_each_asked_for(tmp_path: pathlib.Path) -> None:
    def scenario(inotify: Inotify, listener: Heard) -> None:
        inotify.watch(str(tmp_path), Mask.CREATE, listener("creations"))
        inotify.watch(str(tmp_path), Mask.ATTRIB, listener("modes"))
        leaves = inotify.watch(str(tmp_path), Mask.CREATE, listener("leaves"))
        inotify.unwatch(leaves)
        (tmp_path / "a").touch()
        (tmp_path / "a").chmod(0o600)
        (tmp_path / "last").touch()

    told = heard(scenario)
    assert ("creations", Mask.CREATE, "a") in told
    assert ("modes", Mask.ATTRIB, "a") in told
    assert {holder for holder, _, _ in told} == {"creations", "modes"}
    assert all((holder == "modes") is (mask == Mask.ATTRIB) for holder, mask, _ in told)


def test_who_left_hears_nothing_of_the_file_that_is_gone(tmp_path: pathlib.Path) -> None:
    gone = tmp_path / "gone"

    def scenario(inotify: Inotify, listener: Heard) -> None:
        gone.touch()
        watch = inotify.watch(str(gone), Mask.DELETE_SELF, listener("gone"))
        inotify.watch(str(tmp_path), Mask.CREATE, listener("others"))
        gone.unlink()
        inotify.unwatch(watch)
        gone.touch()
        inotify.watch(str(gone), Mask.MODIFY, listener("again"))
        gone.write_text("x")
        (tmp_path / "last").touch()

    told = heard(scenario)
    assert ("again", Mask.MODIFY, "") in told
    assert not any(holder == "gone" for holder, _, _ in told), "it did not care any more"


def test_the_kernel_watches_what_somebody_holds_and_no_more(tmp_path: pathlib.Path) -> None:
    async def body() -> None:
        inotify = Inotify()

        def watched() -> int:
            return pathlib.Path(f"/proc/self/fdinfo/{inotify._fd}").read_text().count("inotify wd")

        held = [inotify.watch(str(tmp_path), Mask.CREATE, lambda *_: None) for _ in range(2)]
        held.append(inotify.watch("/", Mask.CREATE, lambda *_: None))
        counts = [watched()]
        for watch in held:
            inotify.unwatch(watch)
            counts.append(watched())
        inotify.close()
        assert counts == [2, 2, 1, 0]

    asyncio.run(body())


MASKS = {
    Mask.MODIFY: ["file"],
    Mask.ATTRIB: ["file"],
    Mask.MOVED_TO: ["file"],
    Mask.CREATE: ["new"],
    Mask.DELETE_SELF: [],
}


@pytest.mark.parametrize("mask", MASKS)
def test_each_event_is_the_one_of_its_name(tmp_path: pathlib.Path, mask: Mask) -> None:
    place, other = tmp_path / "place", tmp_path / "other"
    for directory in (place, other):
        directory.mkdir()

    def scenario(inotify: Inotify, listener: Heard) -> None:
        (other / "file").write_text("x")
        inotify.watch(str(place), mask, listener("place"))
        (place / "new").touch()
        (place / "new").read_text()
        (other / "file").rename(place / "file")
        with (place / "file").open("a") as file:
            file.write("x")
        (place / "file").chmod(0o600)
        (place / "file").read_text()
        (place / "file").rename(other / "file")
        (place / "new").unlink()
        os.listdir(place)
        inotify.watch(str(tmp_path), Mask.CREATE, listener("last"))
        (tmp_path / "last").touch()

    told = [(seen, name) for _, seen, name in heard(scenario)]
    assert told == [(mask, name) for name in MASKS[mask]]


def test_a_directory_that_goes_says_so_once(tmp_path: pathlib.Path) -> None:
    gone = tmp_path / "gone"

    def scenario(inotify: Inotify, listener: Heard) -> None:
        gone.mkdir()
        watch = inotify.watch(str(gone), Mask.DELETE_SELF, listener("gone"))
        inotify.watch(str(tmp_path), Mask.CREATE, listener("last"))
        gone.rmdir()
        inotify._drain()
        inotify.unwatch(watch)  # the kernel has dropped it
        (tmp_path / "last").touch()

    told = heard(scenario)
    assert told == [("gone", Mask.DELETE_SELF, ""), ("gone", Mask.IGNORED, "")]


def test_its_descriptor_is_nobody_elses_and_the_loop_lets_go_of_it() -> None:
    async def body() -> None:
        inotify = Inotify()
        fd: int = inotify._fd
        assert (os.get_inheritable(fd), os.get_blocking(fd)) == (False, False)
        inotify.close()
        assert not asyncio.get_running_loop().remove_reader(fd)

    asyncio.run(body())
