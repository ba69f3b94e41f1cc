"""systemd keeps a scope's file in /run and says "not found" when it cannot: the error names it."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("pystemd")

from pystemd.dbusexc import DBusBaseError, DBusError

from llmux.drivers.systemd.bus import NO_SUCH_UNIT, kind_of
from llmux.drivers.systemd.scope import not_kept

SAID = "Unit llmux-alpha.scope not found."
TARGET = 'model "alpha"'


def run(
    *, free_bytes: int = 1 << 30, files: int = 1000, free_files: int = 1000
) -> os.statvfs_result:
    blocks = free_bytes // 4096
    return os.statvfs_result(
        (4096, 4096, 1 << 20, blocks, blocks, files, free_files, free_files, 0, 255)
    )


@pytest.mark.parametrize("full", [run(free_bytes=0), run(free_bytes=8192), run(free_files=0)])
def test_a_full_run_is_named(full: os.statvfs_result) -> None:
    error = not_kept(TARGET, "llmux-alpha.scope", SAID, full)
    assert str(error).startswith('cannot start model "alpha": /run is full')
    assert SAID in str(error)
    assert "df -h /run" in str(error.hint)


@pytest.mark.parametrize("roomy", [run(), run(files=0, free_files=0)])
def test_a_run_with_room_is_not_called_full(roomy: os.statvfs_result) -> None:
    error = not_kept(TARGET, "llmux-alpha.scope", SAID, roomy)
    assert "is full" not in str(error)
    assert "/run/systemd/transient: Unit llmux-alpha.scope not found." in str(error)


def test_systemds_word_for_it_is_known_with_a_class_and_with_a_name() -> None:
    """pystemd has classes for some errors, which then have no name."""
    name = b"org.freedesktop.systemd1.NoSuchUnit"
    assert kind_of(DBusError(-2, name, SAID.encode())) in NO_SUCH_UNIT
    named = DBusBaseError(-2, name, SAID.encode())
    assert kind_of(named) in NO_SUCH_UNIT
    other = DBusError(-17, b"org.freedesktop.systemd1.UnitExists", b"it is there")
    assert kind_of(other) not in NO_SUCH_UNIT
