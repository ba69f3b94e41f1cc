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
        assert {status.st_uid for status in found.values()} == {os.getuid()}
        for path, status in found.items():
            assert status.st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_what_cannot_be_kept_or_forgotten_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A path through a file is no directory, for root as well."""
    config, _ = files(tmp_path)
    last_good = LastGood(str(config / "last-good"))
    sources = last_good.load(str(config)).config.sources
    last_good.keep(sources)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"cannot keep a copy of the configuration in {config}/last-good.new: "
    )
    assert record.getMessage().endswith(f"Not a directory: '{config}/last-good.new'")
    caplog.clear()
    last_good.forget()
    (record,) = caplog.records
    assert record.getMessage().startswith("cannot remove the copy of the configuration: [Errno 20]")
    last_good.keep(())
    assert len(caplog.records) == 1, "nothing was loaded, nothing is kept"


def test_a_copy_that_cannot_be_finished_leaves_the_former_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, last_good = files(tmp_path)
    sources = last_good.load(str(config)).config.sources
    last_good.keep(sources)
    last_good.keep((*sources, str(tmp_path / "absent.yaml")))
    assert "cannot keep a copy" in caplog.text
    config.write_text(BAD)
    assert list(last_good.load(str(config)).config.models) == ["a", "b"]
    assert f"{config}:1:1: modles: unknown key" in caplog.text
    assert "; continuing with the last good configuration" in caplog.text
    last_good.keep(sources)
    with pytest.raises(ConfigError) as caught:
        last_good.load(str(config))
    assert str(config) in str(caught.value), "the file's mistakes, not the copy's"
    assert "cannot continue with the last good configuration: " in caplog.text


def test_a_link_in_place_of_the_copy_is_removed_and_not_followed(tmp_path: Path) -> None:
    config, last_good = files(tmp_path)
    (tmp_path / "last-good").symlink_to(tmp_path / "etc")
    last_good.keep(last_good.load(str(config)).config.sources)
    assert not (tmp_path / "last-good").is_symlink()
    assert sorted(path.name for path in (tmp_path / "etc").iterdir()) == ["conf.d", "config.yaml"]


def test_files_that_are_missing_do_not_make_it_bad_unless_they_may_be_looked_for(
    tmp_path: Path,
) -> None:
    config, last_good = files(tmp_path)
    config.write_text("models: {a: {model_path: /no/such}}\n")
    assert len(last_good.load(str(config)).notes) == 1
    assert last_good.load(str(config), check_files=False).notes == ()
    last_good.keep(last_good.load(str(config)).config.sources)
    config.write_text(BAD)
    assert list(last_good.load(str(config)).config.models) == ["a", "b"], "nor is the copy bad"
