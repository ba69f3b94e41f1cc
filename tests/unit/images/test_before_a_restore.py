"""The host around a dump and a restore: what is made, cleared, killed and refused there."""

from __future__ import annotations

import asyncio
import os
import pathlib
import shutil
import stat
import subprocess
from collections.abc import Iterator

import pytest

from llmux.drivers.criu import host, shm
from llmux.drivers.criu.tools import end_dump, failed, finish_despite_cancellation
from llmux.drivers.images.manifest import KeptPath, Manifest, ManifestError, load_manifest
from llmux.drivers.images.store import ImageStore
from llmux.drivers.transfer.file import open_file
from llmux.errors import Blame, LlmuxError, TreeState

ME, MINE = os.geteuid(), os.getegid()


@pytest.fixture
def home() -> Iterator[pathlib.Path]:
    """Below /, whose every parent is root's or ours: pytest uses directories of others."""
    path = pathlib.Path(f"/var/tmp/llmux-before-{os.getpid()}")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


# ---- what the image expects to find --------------------------------------------------------------


def manifest(runtime: KeptPath | None, *files: KeptPath) -> Manifest:
    """Of these fields alone."""
    made = object.__new__(Manifest)
    for name, value in (("runtime_dir", runtime), ("append_files", files)):
        object.__setattr__(made, name, value)
    return made


@pytest.mark.parametrize("there", ["nothing", "directories", "all, with other modes"])
def test_directories_and_files_are_as_they_were_whatever_is_there(
    home: pathlib.Path, there: str
) -> None:
    runtime, logs = home / "run" / "m", home / "log" / "m"
    out, err = logs / "stdout", logs / "stderr"
    if there != "nothing":
        runtime.mkdir(parents=True)
        logs.mkdir(parents=True)
    if there == "all, with other modes":
        runtime.chmod(0o777)
        out.write_text("said before")
        out.chmod(0o666)
    kept = [KeptPath(str(path), ME, MINE, 0o640) for path in (out, err)]
    for _ in range(2):
        host.put_right(manifest(KeptPath(str(runtime), ME, MINE, 0o2750), *kept))
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o2750
        assert {stat.S_IMODE(path.stat().st_mode) for path in (out, err)} == {0o640}
    assert out.read_text() == ("said before" if there.startswith("all") else "")
    host.put_right(manifest(None))


@pytest.mark.parametrize("what", ["runtime", "file", "above"])
def test_what_leads_elsewhere_is_not_followed(home: pathlib.Path, what: str) -> None:
    away = home / "away"
    away.mkdir(mode=0o700)
    runtime, out = home / "run", home / "log"
    if what == "runtime":
        runtime.symlink_to(away)
    elif what == "file":
        (away / "passwd").write_text("root")
        out.symlink_to(away / "passwd")
    else:
        (home / "log").write_text("a file where the directory is to be")
        out = home / "log" / "m"
    with pytest.raises(host.HostNotReady):
        host.put_right(
            manifest(KeptPath(str(runtime), ME, MINE, 0o755), KeptPath(str(out), ME, MINE, 0o666))
        )
    assert stat.S_IMODE(away.stat().st_mode) == 0o700


def test_each_restore_has_an_empty_directory_of_its_own(home: pathlib.Path) -> None:
    store = ImageStore(str(home / "images"))
    for _ in range(2):
        path = pathlib.Path(store.restore_directory("m"))
        assert os.listdir(path) == []
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        (path / "root.pid").write_text("7")
        (path / "kept").mkdir()


# ---- what a killed supervisor left ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "killed"),
    [
        (["criu", "dump", "--images-dir", "/i/m/dumping"], True),
        (["/usr/sbin/criu", "dump", "--tree", "7", "--images-dir", "/i/m/dumping", "-v4"], True),
        (["criu", "restore", "--images-dir", "/i/m/dumping"], False),
        (["criu", "dump", "--images-dir", "/i/other/dumping"], False),
        (["criu", "dump", "--images-dir", "/i/m/dumping-2"], False),
        (["tail", "-f", "/i/m/dumping/dump.log"], False),
        ([], False),
    ],
)
def test_only_a_criu_that_dumps_there_is_killed(
    tmp_path: pathlib.Path, arguments: list[str], killed: bool
) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        own = tmp_path / str(process.pid)
        for entry in (own, tmp_path / "self", tmp_path / "999999999"):  # the last one has ended
            entry.mkdir()
        own.joinpath("cmdline").write_bytes(b"".join(a.encode() + b"\0" for a in arguments))
        for other in "123456789":
            (tmp_path / other).mkdir()
            (tmp_path / other / "cmdline").write_bytes(b"/i/m/dumping\0")
        end_dump("/i/m/dumping", str(tmp_path))
        if killed:
            ended = os.WEXITED | os.WNOWAIT | os.WNOHANG
            assert os.waitid(os.P_PID, process.pid, ended) is not None, "and waited for"
        else:
            assert process.poll() is None
            process.kill()
        assert process.wait(20) == -9


@pytest.mark.parametrize(
    ("place", "removed"),
    [("shm/sem.x", True), ("shm/y.ghost", True), ("tmp/x.cr.1.ghost", True), ("tmp/x", False),
     ("tmp/shm", False), ("tmp/x.ghost.keep", False)],
)  # fmt: skip
def test_leftovers_are_removed_in_shm_and_ghosts_anywhere(
    home: pathlib.Path, place: str, removed: bool
) -> None:
    for name in ("shm", "tmp"):
        (home / name).mkdir(mode=0o700)
    path, other = home / place, home / "shm" / "another"
    for one in (path, other):
        one.write_text("left")
    missing = str(home / "shm" / "missing")
    shm.remove_leftovers([missing, str(path)], ME, shm=str(home / "shm"))
    assert path.exists() is not removed
    assert other.exists()


# ---- files to import -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("good", None),
        ("open directory", "can be written by others"),
        ("open file", "can be written by others"),
        ("a link", "is not a plain file"),
        ("missing", "No such file"),
    ],
)
def test_a_file_is_imported_only_where_nobody_else_could_have_changed_it(
    home: pathlib.Path, what: str, said: str | None
) -> None:
    directory = home / "d"
    directory.mkdir(mode=0o700)
    path = directory / "image.tar"
    if what != "missing":
        path.write_bytes(b"stream")
        path.chmod(0o666 if what == "open file" else 0o600)
    if what == "open directory":
        directory.chmod(0o777)
    if what == "a link":
        path = directory / "link"
        path.symlink_to("image.tar")
    if said is None:
        with open_file(str(path)) as file:
            assert file.read() == b"stream"
        return
    with pytest.raises(LlmuxError, match=f"cannot import {path}: .*{said}"):
        open_file(str(path))


# ---- failing -------------------------------------------------------------------------------------


def test_a_failure_has_its_hint_and_blames_the_host_unless_it_is_said_otherwise() -> None:
    error = failed("dump", "m", "it fails", "free some space")
    assert (error.hint, error.tree, error.blame) == ("free some space", TreeState.GONE, Blame.HOST)
    assert str(error) == 'cannot dump model "m": it fails (free some space)'
    other = failed("dump", "m", "it", None, tree=TreeState.BROKEN, blame=Blame.IMAGE)
    assert (other.hint, other.tree, other.blame) == (None, TreeState.BROKEN, Blame.IMAGE)


@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device")])
def test_work_that_must_not_stop_midway_is_finished_when_its_caller_is_cancelled(
    error: OSError | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()
        done: list[str] = []

        async def work() -> str:
            begun.set()
            await go_on.wait()
            if error is not None:
                raise error
            done.append("done")
            return "result"

        caller = asyncio.ensure_future(finish_despite_cancellation(work()))
        await begun.wait()
        for _ in range(3):
            caller.cancel()
            await asyncio.sleep(0)
            assert not caller.done()
        go_on.set()
        await asyncio.wait([caller])
        assert caller.cancelled()
        assert done == ([] if error else ["done"])
        assert ("No space left" in caplog.text) is (error is not None)
        begun.clear()
        if error is None:
            assert await finish_despite_cancellation(work()) == "result"
        else:
            with pytest.raises(OSError, match="No space left"):
                await finish_despite_cancellation(work())

    asyncio.run(body())


def test_memory_that_is_kept_lies_where_only_its_owner_reads(home: pathlib.Path) -> None:
    shared, image = home / "shm", home / "image"
    shared.mkdir()
    image.mkdir(mode=0o700)
    (shared / "psm_1").write_bytes(b"s" * 4096)
    status = (shared / "psm_1").stat()
    umask = os.umask(0)
    try:
        groups = {(status.st_dev, status.st_ino): ["psm_1"]}
        (group,) = shm.keep(groups, str(image), {}, shm=str(shared))
    finally:
        os.umask(umask)
    assert (image / group.file).read_bytes() == b"s" * 4096
    assert (group.names, group.size) == (("psm_1",), 4096)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (image / "shm", image / group.file)]
    assert modes == [0o700, 0o600]
    assert shm.keep({}, str(image), {}, shm=str(shared)) == ()


def test_a_manifest_behind_a_link_is_none(home: pathlib.Path) -> None:
    (home / "image").mkdir()
    (home / "elsewhere").write_text("{}")
    (home / "image" / "manifest.json").symlink_to(home / "elsewhere")
    with pytest.raises(ManifestError, match="symbolic links"):
        load_manifest(str(home / "image"))
