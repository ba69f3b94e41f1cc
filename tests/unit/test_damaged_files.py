"""Files that llmux reads back, damaged in every way: refused by name or replaced; it goes on."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from llmux.config.files.last_good import LastGood
from llmux.config.keyfile import load_keys, make_key
from llmux.config.load import load_config
from llmux.drivers.engine.output import EngineFiles
from llmux.drivers.event_file import EventFile
from llmux.drivers.images.notes import read_note, write_note
from llmux.drivers.processes.process import start_ticks
from llmux.drivers.store import FileStateStore
from llmux.errors import ConfigError, StateFileError
from llmux.gateway.admission.keys import Guard
from llmux.ports import UnitHandle

Damage = Callable[[Path], object]


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_bytes(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


def of_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def of_other_types(path: Path) -> None:
    path.write_text('[{"models": 5, "name": [], "sha256": {}, "version": null}, 2026-02-31]\n')


def deep(path: Path) -> None:
    path.write_text('{"state":' + "[" * 200_000)


def deep_list(path: Path) -> None:
    path.write_text("- " * 200_000 + "x\n")


def huge(path: Path) -> None:
    os.truncate(path, 1 << 40)  # sparse


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGE = [
    emptied, halved, of_bytes, of_zeros, of_other_types, deep, deep_list, huge, a_directory, a_pipe,
    a_circle,
]  # fmt: skip


def name_of(damage: Damage) -> str:
    return damage.__name__


KINDS = pytest.mark.parametrize("damage", DAMAGE, ids=name_of)


@KINDS
def test_a_damaged_state_file_is_a_hint_that_is_lost(tmp_path: Path, damage: Damage) -> None:
    path = tmp_path / "state.json"
    store = FileStateStore(str(path))
    store.save({"models": {"a": {"epoch": 7}}})
    damage(path)
    with pytest.raises(StateFileError, match=f"{path}.*kept as {path}.damaged"):
        store.load()
    assert os.path.lexists(f"{path}.damaged")
    assert store.load() == {}, "it is met once"
    store.save({"models": {}})
    assert store.load() == {"models": {}}


def test_a_state_file_that_cannot_be_put_aside_is_said_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("{")
    (tmp_path / "state.json.damaged").mkdir()
    store = FileStateStore(str(path))
    with pytest.raises(StateFileError, match=r"cannot be put aside as .*: Is a directory"):
        store.load()
    store.save({"models": {}})
    assert store.load() == {"models": {}}


@KINDS
def test_damaged_keys_leave_those_in_force(
    tmp_path: Path, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    secret, line = make_key("ci")
    path.write_text(f"{line}\n{make_key('other')[1]}\n")
    guard = Guard(lambda: load_keys(str(path)), workers=1, clock=lambda: 0.0)
    damage(path)
    guard.reload()
    if damage is emptied:  # what an operator wrote: no key is valid any more
        assert load_keys(str(path)) == ()
        return
    assert f"{path}:" in caplog.text
    use = guard.identify(b"/v1/models", secret.encode(), None)
    assert use is not None
    assert use.key.name == "ci"


@pytest.mark.parametrize("damage", [kind for kind in DAMAGE if kind is not deep], ids=name_of)
def test_a_damaged_copy_of_the_configuration_is_named_beside_the_file(
    tmp_path: Path, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    config, copy = tmp_path / "config.yaml", tmp_path / "last-good" / "config.yaml"
    config.write_text("models: {a: {model_path: org/a}}\n")
    last_good = LastGood(str(copy.parent))
    last_good.keep(last_good.load(str(config)).config.sources)
    damage(copy)
    if damage is a_pipe:
        copy.unlink()  # its directory is root's; a pipe as configuration is `llmux check <(…)`
    assert list(last_good.load(str(config)).config.models) == ["a"]  # not looked at
    config.write_text("modles: {}\n")
    if damage is emptied:  # it says so little that nothing is wrong
        assert not last_good.load(str(config)).config.models
        return
    with pytest.raises(ConfigError) as raised:
        last_good.load(str(config))
    assert str(config) in str(raised.value)
    assert damage is a_pipe or str(copy) in caplog.text
    config.write_text("models: {b: {model_path: org/b}}\n")
    last_good.keep(last_good.load(str(config)).config.sources)
    config.write_text("modles: {}\n")
    assert list(last_good.load(str(config)).config.models) == ["b"]


@pytest.mark.parametrize("name", ["last-good", "last-good.new"])
def test_a_file_in_place_of_the_copys_directory_is_replaced(tmp_path: Path, name: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("models: {a: {model_path: org/a}}\n")
    (tmp_path / name).write_text("x")
    last_good = LastGood(str(tmp_path / "last-good"))
    last_good.keep(last_good.load(str(config)).config.sources)
    config.write_text("modles: {}\n")
    assert list(last_good.load(str(config)).config.models) == ["a"]
    last_good.forget()
    assert not (tmp_path / "last-good").exists()


@pytest.mark.parametrize("what", ["-5 -5 - -5", "-5 0 - 0", "9" * 250, "1e3 x", "0 0 \xff 0"])
def test_offsets_out_of_range_cost_no_line_of_the_engine(tmp_path: Path, what: str) -> None:
    assert follow(tmp_path, lambda mark: mark.write_text(what))[-1:] == ["new"]


@KINDS
def test_damaged_offsets_do_not_end_anything(
    tmp_path: Path, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    heard = follow(tmp_path, damage)
    assert heard[-1:] == ["new"] or "stdout.log" in caplog.text


def follow(directory: Path, damage: Damage) -> list[str]:
    """Lines of an engine whose offset was damaged before it was attached."""
    heard: list[str] = []

    def script(output: EngineFiles) -> None:
        path = Path(output.paths("alpha")[0])
        path.write_text("old\n")
        damage(path.with_name("stdout.log.offset"))
        own = os.getpid()
        output.attach(UnitHandle("alpha", "llmux-alpha", own, start_ticks(own) or 1))
        with path.open("a") as file:
            file.write("new\n")
        output.tail("alpha")
        output.previous("alpha")

    async def main() -> None:
        output = EngineFiles(str(directory), on_line=lambda _, line: heard.append(line))
        script(output)
        await output.close()

    asyncio.run(main())
    return heard


def a_file_of_another(path: Path) -> None:
    path.write_bytes(b"x" * 1000)


def a_link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("left", [os.mkfifo, a_file_of_another, a_link])
def test_what_a_killed_writer_left_is_not_written_into(
    tmp_path: Path, left: Callable[[Path], None]
) -> None:
    """A pipe held the whole supervisor."""
    path = tmp_path / "state.json"
    left(tmp_path / "state.json.new")
    store = FileStateStore(str(path))
    store.save({"models": {}})
    assert store.load() == {"models": {}}
    left(tmp_path / "note.json.new")
    write_note(str(tmp_path / "note.json"), {"pid": 1})
    assert read_note(str(tmp_path / "note.json")) == {"pid": 1}
    assert sorted(os.listdir(tmp_path)) == ["note.json", "state.json"]


@KINDS
def test_a_damaged_note_of_a_dump_is_none(tmp_path: Path, damage: Damage) -> None:
    path = tmp_path / "dumping.json"
    write_note(str(path), {"pid": 1})
    damage(path)
    assert read_note(str(path)) == {}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_configuration_that_is_no_file_is_refused_and_waited_for_by_nobody(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "config.yaml"
    make(path)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert "not a plain file" in str(caught.value)


def test_a_state_file_of_a_newer_version_is_kept_for_that(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    written = json.dumps({"version": 99, "state": {}})
    path.write_text(written)
    with pytest.raises(StateFileError, match="newer"):
        FileStateStore(str(path)).load()
    assert (tmp_path / "state.json.damaged").read_text() == written


# ---- the events of the last hour -----------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE, ids=name_of)
@pytest.mark.parametrize("which", ["events", "events.former"])
def test_damaged_events_cost_no_more_than_themselves(
    tmp_path: Path, which: str, damage: Damage
) -> None:
    store = EventFile(str(tmp_path / "events"), max_bytes=200)
    for number in range(40):
        store.append({"id": number})
    damage(tmp_path / which)
    after = EventFile(str(tmp_path / "events"), max_bytes=200)
    with suppress(StateFileError):
        assert len(after.load()) <= 40
    with suppress(StateFileError):  # a directory in its place; the next one is tried as well
        after.append({"id": 40})
        assert after.load()[-1] == {"id": 40}
