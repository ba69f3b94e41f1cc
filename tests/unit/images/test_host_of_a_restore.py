"""What a host must have before an image can be restored on it, read from a /proc of ours."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import stat

import pytest

from llmux.drivers.criu import host
from llmux.drivers.images.manifest import KeptPath, Manifest, TreeProcess

ME, MINE = os.geteuid(), os.getegid()


def manifest(**values: object) -> Manifest:
    """Of these fields alone."""
    made = object.__new__(Manifest)
    empty = {"processes": (), "tcp_ports": (), "unix_paths": (), "runtime_dir": None}
    for name, value in {**empty, **values}.items():
        object.__setattr__(made, name, value)
    return made


def status(proc: pathlib.Path, pid: int, name: str = "python3", **more: str) -> None:
    directory = proc / str(pid)
    directory.mkdir(parents=True)
    fields = {"Name": name, "State": "S (sleeping)", "Tgid": str(pid), **more}
    text = "".join(f"{key}:\t{value}\n" for key, value in fields.items() if value)
    (directory / "status").write_text(text + "odd line\n")


IMAGE = manifest(processes=(TreeProcess(7, "vllm", (7, 8)), TreeProcess(9, "core", (9,))))


@pytest.mark.parametrize(
    ("taken", "more", "said"),
    [
        (6, {}, None),
        (7, {}, "pid 7 of the image is taken by process 7 (bash)"),
        (8, {"Tgid": "3"}, "thread id 8 of the image is taken by process 3 (bash)"),
        (9, {"State": "Z (zombie)"}, "pid 9 of the image is taken by process 9 (bash, a zombie)"),
        (9, {"State": "", "Tgid": ""}, "pid 9 of the image is taken by process ? (bash)"),
    ],
)
def test_every_id_must_be_free_threads_too(
    tmp_path: pathlib.Path, taken: int, more: dict[str, str], said: str | None
) -> None:
    status(tmp_path, taken, "bash", **more)
    if said is None:
        host.check_pids(IMAGE, str(tmp_path))
        return
    with pytest.raises(host.HostNotReady) as raised:
        host.check_pids(IMAGE, str(tmp_path))
    assert str(raised.value) == said


def test_a_process_without_a_name_is_named_all_the_same(tmp_path: pathlib.Path) -> None:
    status(tmp_path, 9, "")
    with pytest.raises(host.HostNotReady, match=r"taken by process 9 \(\?\)"):
        host.check_pids(IMAGE, str(tmp_path))


def listens(proc: pathlib.Path, *rows: tuple[str, str]) -> None:
    """(local address, state) of each row of /proc/net/tcp."""
    net = proc / "self" / "net"
    net.mkdir(parents=True)
    lines = [
        f"{n}: {local} 00000000:0000 {state} 0:0 0:0 0 0 0 {100 + n} 1"
        for n, (local, state) in enumerate(rows)
    ]
    (net / "tcp").write_text("\n".join(["sl local_address", *lines]) + "\n")


def test_a_port_of_the_engines_must_be_free(tmp_path: pathlib.Path) -> None:
    listens(tmp_path, ("0100007F:1F90", "0A"), ("0100007F:1F91", "01"), ("0100007F:1F92", "0A"))
    for ports in ((), (8081,), (80, 8083)):  # 8081 is a connection's
        host.check_ports(manifest(tcp_ports=ports), str(tmp_path))
    for port in (8080, 8082):
        with pytest.raises(host.HostNotReady) as raised:
            host.check_ports(manifest(tcp_ports=(80, port)), str(tmp_path))
        assert str(raised.value) == (
            f"the engine's port {port} is in use: something listens on 127.0.0.1:{port}"
        )


def sockets(proc: pathlib.Path, *rows: tuple[str, int]) -> None:
    net = proc / str(os.getpid()) / "net"
    net.mkdir(parents=True, exist_ok=True)
    lines = [f"0: 2 0 {flags:08X} 0001 01 {n + 5} {path}" for n, (path, flags) in enumerate(rows)]
    (net / "unix").write_text("\n".join(["Num", *lines, "0: 2 0 00010000 0001 01 77"]) + "\n")


def test_sockets_that_the_engine_left_are_removed_in_its_own_directory_alone(
    home: pathlib.Path,
) -> None:
    run, other, proc = home / "run", home / "other", home / "proc"
    run.mkdir()
    other.mkdir()
    paths = [run / "a", run / "b", other / "c", run / "gone"]
    for path in paths[:3]:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
    (run / "kept").write_text("a file of the engine's, and none of its sockets")
    kept = KeptPath(str(run), ME, MINE, 0o700)
    image = manifest(runtime_dir=kept, unix_paths=tuple(map(str, paths)))
    sockets(proc, (str(paths[0]), 0))  # bound, and nobody accepts there
    host.clear_sockets(manifest(unix_paths=tuple(map(str, paths))), str(proc))
    host.clear_sockets(manifest(runtime_dir=kept), str(proc))
    assert all(path.exists() for path in paths[:3])
    host.clear_sockets(image, str(proc))
    assert [path.exists() for path in paths] == [False, False, True, False]
    assert (run / "kept").exists()


@pytest.mark.parametrize("what", ["listening", "a file", "listening elsewhere"])
def test_what_is_in_the_way_of_a_socket_is_said_and_stays(home: pathlib.Path, what: str) -> None:
    run, proc = home / "run", home / "proc"
    run.mkdir()
    path = run / "s" if what != "listening elsewhere" else home / "s"
    if what == "a file":
        path.write_text("")
        sockets(proc)
        words = f"{path} is in the way of the engine's socket and is no socket"
    else:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        sockets(proc, (str(path), 0x10000))
        words = f"another process listens on the engine's socket {path}"
    image = manifest(runtime_dir=KeptPath(str(run), ME, MINE, 0o700), unix_paths=(str(path),))
    with pytest.raises(host.HostNotReady) as raised:
        host.clear_sockets(image, str(proc))
    assert str(raised.value) == words
    assert path.exists()


def test_directories_are_made_all_the_way_and_a_failure_names_its_place(
    home: pathlib.Path,
) -> None:
    (home / "file").write_text("")
    umask = os.umask(0)
    try:
        out = home / "a" / "b" / "out"
        image = manifest(append_files=(KeptPath(str(out), ME, MINE, 0o600),))
        host.put_right(image)
        assert stat.S_IMODE(out.parent.stat().st_mode) == 0o755
        os.umask(0o022)
        host.put_right(manifest(runtime_dir=KeptPath(f"{home}/r/m", ME, MINE, 0o750),
                                append_files=()))  # fmt: skip
        assert stat.S_IMODE((home / "r").stat().st_mode) == 0o755
    finally:
        os.umask(umask)
    for kind in ("runtime_dir", "append_files"):
        path = f"{home}/file/x" if kind == "append_files" else f"{home}/file"
        kept = KeptPath(path, ME, MINE, 0o600)
        image = manifest(**{"append_files": (), kind: (kept,) if kind != "runtime_dir" else kept})
        with pytest.raises(host.HostNotReady, match=f"^{home}/file: "):
            host.put_right(image)


def test_links_and_pipes_in_the_place_of_kept_files_are_refused(home: pathlib.Path) -> None:
    (home / "file").touch(mode=0o600)
    (home / "link").symlink_to(home / "file")
    (home / "directory").symlink_to(home)
    os.mkfifo(home / "pipe")
    for name in ("link", "pipe"):
        kept = KeptPath(f"{home}/{name}", ME, MINE, 0o644)
        with pytest.raises(host.HostNotReady, match=f"^{home}/{name}: "):
            host.put_right(manifest(append_files=(kept,)))
    kept = KeptPath(f"{home}/directory", ME, MINE, 0o755)
    with pytest.raises(host.HostNotReady, match=f"^{home}/directory: "):
        host.put_right(manifest(runtime_dir=kept, append_files=()))
    assert stat.S_IMODE((home / "file").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user: needs root")
def test_owners_are_put_right_one_by_one(home: pathlib.Path) -> None:
    for number, (uid, gid) in enumerate([(ME, 4242), (4243, MINE), (4243, 4242)]):
        path = home / str(number)
        path.touch(mode=0o640)
        kept = KeptPath(str(path), uid, gid, 0o2640)
        host.put_right(manifest(append_files=(kept,)))
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (uid, gid)
        assert stat.S_IMODE(found.st_mode) == 0o2640


@pytest.mark.parametrize(
    ("name", "more", "members", "wrong"),
    [
        ("vllm", {}, [7, 9], []),
        ("vllm", {}, [9], ["process 7 (vllm) is outside the new unit"]),
        ("bash", {}, [7, 9], ["process 7 is bash, not vllm"]),
        ("vllm", {"State": "Z (zombie)"}, [7, 9], ["process 7 (vllm) is not alive"]),
        ("vllm", {"State": "X (dead)"}, [7, 9], ["process 7 (vllm) is not alive"]),
        ("vllm", {"State": ""}, [7, 9], ["process 7 (vllm) is not alive"]),
        ("vllm", {"State": "T (stopped)"}, [7, 9], []),
        (None, {}, [7, 9], ["process 7 (vllm) is not alive"]),
    ],
)
def test_what_a_restore_did_not_bring_back_is_named(
    tmp_path: pathlib.Path,
    name: str | None,
    more: dict[str, str],
    members: list[int],
    wrong: list[str],
) -> None:
    if name is not None:
        status(tmp_path, 7, name, **more)
    status(tmp_path, 9, "core")
    assert host.missing_processes(IMAGE, members, str(tmp_path)) == wrong
    shutil.rmtree(tmp_path / "9")
    last = "process 9 (core) is not alive"
    assert host.missing_processes(IMAGE, members, str(tmp_path)) == [*wrong, last]


def test_memory_that_is_just_enough_is_enough() -> None:
    host.check_memory(10, 5, available=lambda: 15)
    with pytest.raises(host.HostNotReady) as raised:
        host.check_memory(10, 5, available=lambda: 14)
    assert str(raised.value) == (
        "the engine needs 10 bytes of memory, 5 must be left, and 14 are available"
    )
    host.check_memory(0)
