"""An image on its way over ssh, and what the other host must have."""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_store_lives import GOOD

from llmux.drivers.criu.known_files import look
from llmux.drivers.images.files import SEGMENT, FileSums
from llmux.drivers.images.identity import content_stamp
from llmux.drivers.images.manifest import KeptPath, KnownFile, Manifest, ShmGroup, TreeProcess
from llmux.drivers.transfer import header, remote
from llmux.drivers.transfer.header import BadStream, Header, Host, PathFacts, obstacles
from llmux.errors import LlmuxError

ME = os.geteuid()
ID, SALT = "0" * 32, "ab" * 16
BASE = replace(
    GOOD,
    runtime_dir=KeptPath("/run/m", 5, 5, 0o700),
    append_files=(KeptPath("/log/out", 5, 5, 0o640),),
    recipe={"uds": "/run/m/api.sock", "port": None},
    unix_paths=("/run/m/api.sock",),
)
HERE = Host("m", None, None, {"i": "1"}, {"k": "v", "uid": "5"}, "/run/m", ("/log/out",),
            "/run/m/api.sock", None, "4.2.1")  # fmt: skip


def made(manifest: Manifest = BASE, *paths: PathFacts, **fields: Any) -> Header:
    values = {"id": ID, "first": 0, "salt": SALT, "portable": {"k": "v", "uid": "5"}, **fields}
    return Header(paths=paths, manifest=manifest, **values)


# ---- ssh -----------------------------------------------------------------------------------------

SSH = """#!/bin/sh
printf '%s\\n' "$@" > "$0.asked"
. "$0.script"
"""


@pytest.fixture
def ssh(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Say what ssh does; returns what it was last asked."""
    program = tmp_path / "ssh"
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def does(script: str) -> list[str]:
        (tmp_path / "ssh.script").write_text(script)
        asked = tmp_path / "ssh.asked"
        return asked.read_text().splitlines() if asked.exists() else []

    return does


def test_the_other_host_says_what_has_arrived(ssh: Callable[[str], list[str]]) -> None:
    ssh("echo ' abc:7 '; echo noise >&2; cat")
    read, write = os.pipe()
    os.write(write, b"what was typed is not for it")
    os.close(write)
    stdin = os.dup(0)
    os.dup2(read, 0)
    try:
        assert remote.received_there("h", "org/a b") == "abc:7"
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(read)
    asked = ssh("exit 3")
    assert asked == ["-o", "BatchMode=yes", "--", "h", "llmux images received 'org/a b'"]
    with pytest.raises(LlmuxError, match="cannot export to h: ssh ended with status 3") as raised:
        remote.received_there("h", "m")
    assert "ssh h llmux version" in (raised.value.hint or "")


def test_the_stream_goes_to_the_other_hosts_import(
    ssh: Callable[[str], list[str]], tmp_path: pathlib.Path
) -> None:
    ssh(f"cat > {tmp_path}/taken")

    def write_all(out: Any) -> None:
        out.write(b"x" * 100_000)

    remote.import_there("h", write_all)
    assert (tmp_path / "taken").read_bytes() == b"x" * 100_000
    asked = ssh("exec <&-; exit 4")
    assert asked == ["-o", "BatchMode=yes", "--", "h", "llmux images import"]

    def write(out: Any) -> None:
        while True:  # until nobody reads
            out.write(b"x" * 100_000)

    with pytest.raises(LlmuxError, match="`llmux images import` ended with status 4") as raised:
        remote.import_there("h", write)
    assert "message above" in (raised.value.hint or "")


def test_an_option_is_no_host() -> None:
    for call in (lambda: remote.received_there("-oProxyCommand=x", "m"),
                 lambda: remote.import_there("-x", lambda out: None)):  # fmt: skip
        with pytest.raises(LlmuxError, match="not a host"):
            call()


# ---- what both hosts must have -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "host", "found"),
    [
        ({}, {}, []),
        ({}, {"criu": "4.2"}, []),
        ({}, {"criu": "4.10"}, []),
        ({}, {"criu": "4.1.9"}, ["criu made it in version 4.2 and is 4.1.9 here"]),
        ({}, {"criu": ""}, ["criu made it in version 4.2 and is absent here"]),
        ({}, {"portable": {"k": "w", "uid": "5"}}, ["k: v there, w here"]),
        ({}, {"portable": {"k": "v", "uid": "6"}},
         ["uid: 5 there, 6 here", "uid: /run/m belongs to user 5, which the engine is not"]),
        ({}, {"portable": {"uid": "5"}}, ["k: v there, not known here"]),
        ({}, {"portable": {"k": "v"}},
         ["uid: 5 there, not known here",
          "uid: /run/m belongs to user 5, which the engine is not"]),
        ({}, {"portable": {"k": "v", "uid": "5", "x": "y" * 201}},
         [f"x: not known there, {'y' * 200} here"]),
        ({}, {"runtime_dir": "/run/n"}, ["runtime directory: /run/m there, /run/n here"]),
        ({"runtime_dir": None}, {"runtime_dir": "/run/n"}, []),
        ({}, {"outputs": ("/x",)}, ["output: /log/out is not a file of this model's output here"]),
        ({}, {"uds": None}, ["address: the engine listens elsewhere here"]),
        ({}, {"uds": "/other"}, ["address: the engine listens elsewhere here"]),
        ({}, {"port": 7}, []),
        ({"recipe": {"port": 7}}, {"uds": None, "port": 7}, []),
        ({"recipe": {"port": 7}}, {"uds": None, "port": 8},
         ["address: the engine listens elsewhere here"]),
        ({"identity": {"0.GPU UUID": "1"}}, {"portable": {"k": "v", "uid": "5", "0.GPU UUID": "2"}},
         []),
        ({"identity": {"0.GPU UUID": "1"}, "recipe": {**BASE.recipe, "cuda_pids": [7]}},
         {"portable": {"k": "v", "uid": "5", "0.GPU UUID": "2"}},
         ["0.GPU UUID: not known there, 2 here"]),
    ],
)  # fmt: skip
def test_each_thing_that_differs_is_named(
    manifest: dict[str, Any], host: dict[str, Any], found: list[str]
) -> None:
    assert obstacles(made(replace(BASE, **manifest)), replace(HERE, **host)) == found


def test_every_file_of_the_engine_is_compared_and_llmuxs_own_are_not(
    tmp_path: pathlib.Path,
) -> None:
    place = pathlib.Path(os.path.realpath(tmp_path))
    for name in ("a", "b"):
        (place / name).write_text(name)
        (place / name).chmod(0o640)
    whole = [
        PathFacts(str(place / name), stat.S_IFREG | 0o640, ME, content_stamp(str(place / name)))
        for name in ("a", "b")
    ]
    own = [PathFacts(path, 1, 2) for path in ("/run/m", "/log/out")]
    null = os.stat("/dev/null")
    device = PathFacts("/dev/null", null.st_mode, null.st_uid, None, null.st_rdev)
    directory = PathFacts(str(place), place.stat().st_mode, ME)
    assert obstacles(made(BASE, *own, *whole, device, directory), HERE) == []
    gone = PathFacts("/no/such", 0, 0)
    wrong = [
        (gone, "path /no/such: No such file or directory"),
        (replace(whole[0], uid=77), f"path {place}/a: its uid is 77 there and {ME} here"),
        (replace(whole[0], mode=stat.S_IFREG | 0o600),
         f"path {place}/a: its mode is 100600 there and 100640 here"),
        (replace(whole[0], state="x"),
         f"path {place}/a: its state is x there and {whole[0].state} here"),
        (replace(device, device=5),
         f"path /dev/null: its device is 5 there and {null.st_rdev} here"),
        (replace(whole[0], uid=77, state="x"),
         f"path {place}/a: its uid is 77 there and {ME} here"),
    ]  # fmt: skip
    for facts, words in wrong:
        assert obstacles(made(BASE, own[0], facts, whole[1]), HERE) == [words]
    two = [gone, replace(whole[1], uid=77)]
    assert obstacles(made(BASE, own[1], *two), HERE) == [
        wrong[0][1], f"path {place}/b: its uid is 77 there and {ME} here",
    ]  # fmt: skip


def test_a_header_describes_files_and_is_made_this_hosts_own(tmp_path: pathlib.Path) -> None:
    place = pathlib.Path(os.path.realpath(tmp_path))
    (place / "a").write_text("a")
    known = (look(str(place / "a")), look("/dev/null"), look(str(place)))
    manifest = replace(BASE, known=known)
    head = header.make_header(manifest, b"text", {"k": "v"}, SALT)
    assert (head.first, head.salt, head.portable) == (0, SALT, {"k": "v"})
    assert head.id != header.make_header(manifest, b"other", {}, SALT).id and len(head.id) == 32
    null = os.stat("/dev/null")
    assert head.paths == (
        PathFacts(str(place / "a"), (place / "a").stat().st_mode, ME, content_stamp(f"{place}/a")),
        PathFacts("/dev/null", null.st_mode, null.st_uid, None, null.st_rdev),
        PathFacts(str(place), place.stat().st_mode, ME),
    )
    assert Header.from_json(head.to_json()) == head
    facts = (*head.paths, PathFacts("/no/such", 0o100640, 77))
    here = header.localize(replace(head, paths=facts), HERE)
    assert here.known == (*known, KnownFile("/no/such", 0, 0, 77, 0o100640))
    assert here.identity == {"i": "1"}
    assert here.recipe == {**BASE.recipe, "identity": {"i": "1"}}
    gone = replace(manifest, known=(*known, KnownFile(f"{place}/gone", 0, 0, 0, 0)))
    with pytest.raises(LlmuxError, match=f"export the image of m: {place}/gone: No such file"):
        header.make_header(gone, b"", {}, SALT)


PROBLEMS: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, None),
    ({"id": "0" * 31}, {}, "its id, salt or first segment"),
    ({"id": "g" * 32}, {}, "its id, salt or first segment"),
    ({"salt": "a" * 31}, {}, "its id, salt or first segment"),
    ({"salt": "a" * 64}, {}, None),
    ({"salt": "a" * 65}, {}, "its id, salt or first segment"),
    ({"first": -1}, {}, "its id, salt or first segment"),
    ({"first": 5}, {}, None),
    ({}, {"files": ()}, "a file is listed twice, or none is"),
    ({}, {"files": (FileSums("a" * 80, 0, ()),)}, None),
    ({}, {"files": (FileSums("a" * 81, 0, ()),)}, "is not the name of an image's file"),
    ({}, {"files": (FileSums(".a", 0, ()),)}, "is not the name of an image's file"),
    ({}, {"files": (FileSums("a/b/c", 0, ()),)}, "is not the name of an image's file"),
    ({}, {"files": (FileSums("a/b", 0, ()), FileSums("a", 0, ()))}, "a cannot be an image's file"),
    ({}, {"files": (FileSums("a", -1, ()),)}, "a has 0 checksums for -1 bytes"),
    ({}, {"files": (FileSums("a", SEGMENT, (1,)),)}, None),
    ({}, {"files": (FileSums("a", SEGMENT + 1, (1,)),)}, "a has 1 checksums for"),
    ({}, {"shm": (ShmGroup(("n",), "pages-1.img", 4, 0o777, 0, 0),)}, None),
    ({}, {"shm": (ShmGroup(("n",), "pages-1.img", 5, 0o777, 0, 0),)}, "is not in it as it says"),
    ({}, {"shm": (ShmGroup(("n",), "other", 4, 0o777, 0, 0),)}, "is not in it as it says"),
    ({}, {"shm": (ShmGroup(("n",), "pages-1.img", 4, 0o1777, 0, 0),)}, "is not in it as it says"),
    ({}, {"shm": (ShmGroup((), "pages-1.img", 4, 0, 0, 0),)}, "has no name in /dev/shm"),
    *[({}, {"shm": (ShmGroup((name,), "pages-1.img", 4, 0, 0, 0),)},
       "is not the name of a file in /dev/shm") for name in ("", ".", "..", "a/b", "a\0")],
    ({}, {"processes": ()}, "its process ids"),
    ({}, {"processes": (TreeProcess(70, "x", (70, 1)),)}, "its process ids"),
    ({}, {"processes": (TreeProcess(70, "x", (70, 2)),)}, None),
    ({}, {"processes": (TreeProcess(71, "x", (71,)),)}, "its process ids"),
    ({}, {"unix_paths": ("run/x",)}, "'run/x' is not an absolute path"),
    ({}, {"unix_paths": ("/run//x",)}, "'/run//x' is not an absolute path"),
    ({}, {"unix_paths": ("/run/\0x",)}, "is not an absolute path"),
    ({"paths": (PathFacts("/a", 0, 0),)}, {}, "the paths of its manifest differ"),
    ({"paths": (PathFacts("/a", 0, 0),)}, {"known": (KnownFile("/a", 0, 0, 0, 0),)}, None),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "manifest", "said"), PROBLEMS)
def test_a_header_is_within_its_bounds(
    fields: dict[str, Any], manifest: dict[str, Any], said: str | None
) -> None:
    head = replace(made(replace(BASE, **manifest)), **fields)
    problem = next(header._bounds(head), None)
    assert (problem is None) is (said is None)
    assert (said or "") in (problem or "")
    if said is None:
        assert Header.from_json(head.to_json()) == head
    else:
        with pytest.raises(BadStream):
            Header.from_json(head.to_json())
    for data in (b"", b"[]", b"{}", b"\xff"):
        with pytest.raises(BadStream, match="the head of the stream cannot be read"):
            Header.from_json(data)


def test_ids_that_are_taken_are_named_with_their_process(tmp_path: pathlib.Path) -> None:
    processes = (TreeProcess(70, "a", (70, 71)), TreeProcess(80, "b", (80, 81)))
    manifest = replace(BASE, processes=processes)
    for tid, comm in ((71, "x\n"), (81, "y\n")):
        (tmp_path / str(tid)).mkdir()
        (tmp_path / str(tid) / "comm").write_text(comm)
    assert header.taken_pids(manifest, str(tmp_path)) == ["71 (x)", "81 (y)"]
