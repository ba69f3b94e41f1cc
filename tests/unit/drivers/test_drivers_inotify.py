"""What the event loop may expect of inotify."""

from __future__ import annotations

import asyncio
import os
import pathlib
import threading

import pytest

from llmux.drivers.processes.inotify import Inotify, Mask


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
