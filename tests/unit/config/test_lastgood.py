"""A service that crashes while its file is bad comes back with what was in force."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmux.config.files.last_good import LastGood
from llmux.errors import ConfigError

GOOD = "models: {a: {model_path: org/a}}\n"
BAD = "modles: {}\n"


def files(tmp_path: Path) -> tuple[Path, LastGood]:
    (tmp_path / "etc" / "conf.d").mkdir(parents=True)
    config = tmp_path / "etc" / "config.yaml"
    config.write_text(GOOD)
    (tmp_path / "etc" / "conf.d" / "more.yaml").write_text("models: {b: {model_path: org/b}}\n")
    return config, LastGood(str(tmp_path / "last-good"))


def test_a_bad_file_without_a_copy_is_an_error(tmp_path: Path) -> None:
    config, last_good = files(tmp_path)
    config.write_text(BAD)
    with pytest.raises(ConfigError):
        last_good.load(str(config))


def test_a_bad_file_falls_back_to_the_copy_with_its_drop_ins(tmp_path: Path) -> None:
    config, last_good = files(tmp_path)
    last_good.keep(last_good.load(str(config)).config.sources)
    config.write_text(BAD)
    assert list(last_good.load(str(config)).config.models) == ["a", "b"]


def test_a_good_file_wins_over_the_copy_and_replaces_it(tmp_path: Path) -> None:
    config, last_good = files(tmp_path)
    last_good.keep(last_good.load(str(config)).config.sources)
    config.write_text(GOOD.replace("a:", "c:", 1))
    again = last_good.load(str(config)).config
    assert list(again.models) == ["c", "b"]
    last_good.keep(again.sources)
    config.write_text(BAD)
    assert list(last_good.load(str(config)).config.models) == ["c", "b"]


def test_what_was_loaded_from_the_copy_does_not_replace_it(tmp_path: Path) -> None:
    config, last_good = files(tmp_path)
    last_good.keep(last_good.load(str(config)).config.sources)
    config.write_text(BAD)
    last_good.keep(last_good.load(str(config)).config.sources)
    assert list(last_good.load(str(config)).config.models) == ["a", "b"]


def test_a_clean_stop_forgets_it(tmp_path: Path) -> None:
    config, last_good = files(tmp_path)
    last_good.keep(last_good.load(str(config)).config.sources)
    last_good.forget()
    last_good.forget()
    config.write_text(BAD)
    with pytest.raises(ConfigError):
        last_good.load(str(config))


def test_the_copy_is_for_its_group_and_nobody_else(tmp_path: Path) -> None:
    """Whatever the umask: the gateway's user reads it, and no other does."""
    config, _ = files(tmp_path)
    last_good = LastGood(str(tmp_path / "last-good"), group=os.getgid())
    for umask in (0o000, 0o077):
        before = os.umask(umask)
        try:
            last_good.keep(last_good.load(str(config)).config.sources)
        finally:
            os.umask(before)
        top = tmp_path / "last-good"
        found = {path: path.stat() for path in (top, *top.rglob("*"))}
        assert len(found) == 4
        assert {status.st_gid for status in found.values()} == {os.getgid()}
        for path, status in found.items():
            assert status.st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
