"""What a tree must not hold when it is dumped, in a /proc of ours: each thing is named."""

from __future__ import annotations

import os
import pathlib
import socket
import stat
import struct
from types import SimpleNamespace

import pytest

from llmux.drivers.criu import tree, unix_diag
from llmux.drivers.criu.tree import Problem, TreeFacts, inspect

DEVICE = "find out what in the engine uses it and switch that off"


class Proc:
    """Processes in a directory: 7 is the root, what is in ``fields`` of status is as given."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.shm = root / "shm"
        self.shm.mkdir()

    def add(self, pid: int, parent: int = 1, *opened: str, **fields: str) -> None:
        own = self.root / str(pid)
        session = fields.pop("session", "7")
        for name in ("fd", "net", f"task/{pid}"):
            (own / name).mkdir(parents=True)
        for name in ("tcp", "tcp6", "unix"):
            (own / "net" / name).write_text("head\n")
        (own / "maps").write_text("")
        facts = {"Name": f"p{pid}", "State": "S (sleeping)", "PPid": str(parent), "TracerPid": "0"}
        text = "".join(f"{key}:\t{value}\n" for key, value in {**facts, **fields}.items())
        (own / "status").write_bytes(os.fsencode(text))
        (own / "stat").write_text(f"{pid} (p) q) S {parent} {pid} {session} 0\n")
        for number, target in enumerate(opened):
            (own / "fd" / str(number)).symlink_to(target)

    def tcp(self, *rows: tuple[str, str, str, int], name: str = "tcp") -> None:
        text = "".join(
            f"0: {local} {remote} {state} 0:0 0:0 0 0 0 {inode} 1\n"
            for local, remote, state, inode in rows
        )
        (self.root / "7" / "net" / name).write_text(f"head\n{text}")

    def look(self, *pids: int) -> TreeFacts:
        facts = inspect(7, pids or (7,), proc=str(self.root), shm=str(self.shm))
        assert facts is not None
        return facts

    def problems(self, *pids: int) -> list[str]:
        return [problem.text for problem in self.look(*pids).problems]


@pytest.fixture
def proc(tmp_path: pathlib.Path) -> Proc:
    return Proc(tmp_path)


def test_a_tree_is_described(proc: Proc) -> None:
    memory = {"RssAnon": "10 kB", "RssShmem": "200 kB", "VmSwap": "3000 kB", "RssFile": "9 kB"}
    proc.add(9, 8, "socket:[50]", **memory)
    proc.add(8, 7, "socket:[51]", "socket:[52]", RssAnon="1 kB")
    proc.add(7, 1, "pipe:[1]", "/tmp/x", "socket:[50]")
    (proc.root / "8" / "task" / "12").mkdir()
    (proc.root / "8" / "task" / "11").mkdir()
    rows = "".join(
        f"0: 2 0 {flags} 0001 01 {inode} {path}\n"
        for flags, inode, path in (
            ("00010000", 50, "/run/m/api.sock"), ("00000000", 51, "@abstract"),
            ("00000000", 52, "/run/m/a b"), ("00000000", 99, "/run/other"),
        )
    )  # fmt: skip
    (proc.root / "7" / "net" / "unix").write_text(f"head\n{rows}0: 2 0 0 1 1 53\n")
    facts = proc.look(9, 7, 8, 10)
    assert facts.problems == ()
    assert facts.pids == (7, 8, 9)
    assert [(p.comm, p.tids) for p in facts.processes] == [
        ("p7", (7,)), ("p8", (8, 11, 12)), ("p9", (9,)),
    ]  # fmt: skip
    assert facts.resident_bytes == (10 + 200 + 3000 + 1) * 1024
    assert facts.unix_paths == ("/run/m/a b", "/run/m/api.sock")
    assert (facts.root, facts.tcp_ports, facts.shm) == (7, (), frozenset())
    assert tree.read_unix(7, str(proc.root))["50"] == ("/run/m/api.sock", True)
    assert tree.read_unix(7, str(proc.root))["51"] == ("@abstract", False)


@pytest.mark.parametrize(
    ("target", "what", "gpu"),
    [
        ("anon_inode:[io_uring]", "an io_uring, which CRIU", False),
        ("/dev/nvidia0", "a GPU device, which CRIU", True),
        ("anon_inode:[userfaultfd]", "a userfaultfd, which CRIU", False),
        ("/dev/infiniband/uverbs0", "an InfiniBand device, which CRIU", False),
    ],
)
def test_what_criu_cannot_dump_is_named_once_with_its_remedy(
    proc: Proc, target: str, what: str, gpu: bool
) -> None:
    proc.add(7, 1, "/dev/null", target, "anon_inode:[eventfd]")
    (problem,) = proc.look().problems
    assert problem.text == f"process 7 (p7) holds {what} cannot dump: fd 1, {target}"
    remedies = ("llmux", "suspend its CUDA state", "switch that off", "NCCL_IB_DISABLE=1")
    assert any(word in problem.remedy for word in remedies)
    assert problem.gpu_user == (7 if gpu else None)


@pytest.mark.parametrize(
    ("mode", "number", "foreign"),
    [
        (stat.S_IFCHR, (1, 3), False),
        (stat.S_IFCHR, (2, 0), False),
        (stat.S_IFCHR, (3, 0), False),
        (stat.S_IFCHR, (4, 64), False),
        (stat.S_IFCHR, (5, 2), False),
        (stat.S_IFCHR, (127, 0), True),
        (stat.S_IFCHR, (128, 0), False),
        (stat.S_IFCHR, (136, 0), False),
        (stat.S_IFCHR, (143, 0), False),
        (stat.S_IFCHR, (144, 0), True),
        (stat.S_IFCHR, (188, 0), False),
        (stat.S_IFCHR, (10, 0), True),
        (stat.S_IFCHR, (200, 200), True),
        (stat.S_IFCHR, (10, 200), False),
        (stat.S_IFCHR, (10, 235), False),
        (stat.S_IFCHR, (10, 229), True),
        (stat.S_IFCHR, (6, 0), True),
        (stat.S_IFREG, (10, 229), False),
        (stat.S_IFBLK, (259, 0), False),
    ],
)
def test_a_device_is_known_by_its_number(
    proc: Proc, monkeypatch: pytest.MonkeyPatch, mode: int, number: tuple[int, int], foreign: bool
) -> None:
    proc.add(7, 1, "/dev/strange", "/home/strange")
    real = os.stat

    def answer(path: str, *args: object, **options: object) -> object:
        if "/fd/" in str(path):
            return SimpleNamespace(st_mode=mode, st_rdev=os.makedev(*number))
        return real(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", answer)
    text = "process 7 (p7) holds a device that CRIU cannot dump: fd 0, /dev/strange"
    assert proc.look().problems == ((Problem(text, DEVICE),) if foreign else ())


def test_a_gpu_is_named_once(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    proc.add(7, 1, "/dev/nvidia0")
    real = os.stat

    def answer(path: str, *args: object, **options: object) -> object:
        if "/fd/" in str(path):
            return SimpleNamespace(st_mode=stat.S_IFCHR, st_rdev=os.makedev(195, 0))
        return real(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", answer)
    assert [problem.gpu_user for problem in proc.look().problems] == [7]


def test_a_device_that_is_gone_is_none(proc: Proc) -> None:
    proc.add(7, 1, "/dev/no such device")
    assert proc.problems() == []


def test_a_descriptor_that_was_closed_hides_no_other(proc: Proc) -> None:
    opened = ["anon_inode:[io_uring]", "socket:[5]", "/dev/no such device", "/dev/shm/gone"] * 6
    proc.add(7, 1, *opened)
    for number in range(len(opened), 30):
        (proc.root / "7" / "fd" / str(number)).touch()  # no link: it cannot be read as one
    assert len(proc.problems()) == 6


def test_files_of_shm_are_known_open_or_mapped_and_gpus_that_are_mapped_named(proc: Proc) -> None:
    for name in ("open", "other"):
        (proc.shm / name).write_text("")
    proc.add(8, 7, str(proc.shm / "open"), f"{proc.shm}/gone", f"{proc.shm}x", str(proc.root))
    proc.add(7)
    maps = (
        f"7f0-7f1 rw-s 0 00:1a 77 {proc.shm}/sem.a (deleted)\n"
        f"7f0-7f1 rw-s 0 103:02 5 {proc.shm}/b\n"
        "7f0-7f1 rw-p 0 00:00 0\n7f0-7f1 rw-s 0 00:05 9 /dev/nvidia1\n"
        "7f0-7f1 rw-s 0 00:05 8 /dev/nvidia0 (deleted)\n7f0-7f2 rw-s 0 00:05 9 /dev/nvidia1\n"
        "7f0-7f1 r--p 0 08:01 6 /usr/lib/libc.so\n7f0-7f1 r--p 0 08:01 6 /srv/\udcff\n"
    )
    (proc.root / "8" / "maps").write_bytes(os.fsencode(maps))
    facts = proc.look(7, 8)
    status = (proc.shm / "open").stat()
    assert facts.shm == {
        (status.st_dev, status.st_ino), (os.makedev(0, 0x1A), 77), (os.makedev(0x103, 2), 5),
    }  # fmt: skip
    texts = [problem.text for problem in facts.problems]
    assert texts == [
        f"process 8 (p8) maps /dev/{name}" for name in ("nvidia0 (deleted)", "nvidia1")
    ]
    assert {problem.gpu_user for problem in facts.problems} == {8}
    assert all("suspend its CUDA state" in problem.remedy for problem in facts.problems)


HERE, THERE, HUB = "0100007F:1F90", "0500000A:0016", "0500000A:01BB"


@pytest.mark.parametrize("state", ["01", "02", "03", "04", "05", "08", "09", "0B"])
def test_a_connection_that_leaves_the_tree_is_named_in_every_state(proc: Proc, state: str) -> None:
    proc.add(7, 1, "pipe:[1]", "socket:[5]")
    proc.tcp((HERE, THERE, state, 5), (HERE, HUB, state, 6))
    (problem,) = proc.look().problems
    start = "process 7 (p7) has a TCP connection that leaves the engine: fd 1, 127.0.0.1:8080 to "
    assert problem.text == f"{start}10.0.0.5:22"
    assert problem.remedy.startswith("let clients close")
    proc.tcp((HERE, HUB, state, 5))
    (problem,) = proc.look().problems
    assert problem.text == f"{start}10.0.0.5:443, probably the Hugging Face hub"
    assert "HF_HUB_OFFLINE=1" in problem.remedy


def test_connections_within_the_tree_and_closed_ones_are_none_and_ports_are_listed(
    proc: Proc,
) -> None:
    proc.add(7, 1, "socket:[5]", "socket:[6]", "socket:[8]")
    proc.add(8, 7, "socket:[7]", "socket:[9]")
    proc.tcp(
        (HERE, "0100007F:0050", "01", 5), ("0100007F:0050", HERE, "01", 7),
        ("0100007F:0051", THERE, "06", 6), ("00000000:01F4", "00000000:0000", "0A", 8),
        ("00000000:0016", "00000000:0000", "0A", 99),
    )  # fmt: skip
    any6 = "0" * 32
    proc.tcp((f"{any6}:0014", f"{any6}:0000", "0A", 9), name="tcp6")
    facts = proc.look(7, 8)
    assert facts.problems == ()
    assert facts.tcp_ports == (20, 500)
    (proc.root / "7" / "net" / "tcp6").unlink()  # a host without IPv6
    assert proc.look(7, 8).tcp_ports == (500,)


@pytest.mark.parametrize(
    ("fields", "text", "remedy"),
    [
        ({"State": "Z (zombie)", "PPid": "7"},
         "process 8 (p8) is a zombie: its parent 7 has not reaped it", "reaped"),
        ({"State": "T (stopped)"}, "process 8 (p8) is stopped", "`kill -CONT 8`"),
        ({"State": "t (tracing stop)"}, "process 8 (p8) is stopped", "`kill -CONT 8`"),
        ({"TracerPid": "55"}, "process 8 (p8) is traced by process 55", "debugger"),
        ({"State": "D (disk sleep)"}, None, ""),
        ({"State": "R (running)"}, None, ""),
        ({"Name": "\udcff"}, None, ""),
    ],
)  # fmt: skip
def test_a_process_in_a_state_that_cannot_be_dumped_is_named(
    proc: Proc, fields: dict[str, str], text: str | None, remedy: str
) -> None:
    proc.add(7)
    proc.add(8, 7, **fields)
    problems = proc.look(7, 8).problems
    assert [problem.text for problem in problems] == ([text] if text else [])
    assert all(remedy in problem.remedy for problem in problems)


def test_what_is_not_below_the_root_or_leads_no_session_is_named(proc: Proc) -> None:
    proc.add(7, 1, session="3")
    proc.add(8, 7)
    proc.add(9, 8)
    proc.add(10, 1)
    proc.add(11, 10)
    problems = proc.look(7, 8, 9, 10, 11).problems
    detached = "is in the unit but not below its root process 7: its parent is"
    assert [problem.text for problem in problems] == [
        f"process 10 (p10) {detached} 1",
        f"process 11 (p11) {detached} 10",
        "process 7 (p7) is not the leader of its session",
    ]
    assert "detached itself" in problems[0].remedy
    assert "llmux's launcher" in problems[2].remedy


def test_the_root_comes_first_whatever_its_number(proc: Proc) -> None:
    proc.add(7)
    for pid in (9, 3, 8, 5):
        proc.add(pid, 7)
    assert proc.look(9, 3, 7, 8, 5).pids == (7, 3, 5, 8, 9)


def test_who_ends_during_the_look_hides_nobody(proc: Proc) -> None:
    proc.add(7)
    proc.add(8, 7)
    proc.add(9, 7, "anon_inode:[io_uring]")
    for name in ("fd", "task/8", "task"):
        (proc.root / "8" / name).rmdir()
    facts = proc.look(7, 8, 9)
    assert [process.tids for process in facts.processes] == [(7,), (), (9,)]
    assert len(facts.problems) == 1
    (proc.root / "7" / "stat").unlink()
    assert inspect(7, [7], proc=str(proc.root), shm=str(proc.shm)) is None
    assert inspect(8, [7], proc=str(proc.root), shm=str(proc.shm)) is None


# ---- the ends of unix sockets --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_both_ends_of_a_stream_know_each_other(kind: socket.SocketKind) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    with one, other, socket.socket(socket.AF_UNIX, kind) as alone:
        inodes = [str(os.fstat(each.fileno()).st_ino) for each in (one, other, alone)]
        peers = unix_diag.stream_peers()
        stream = kind != socket.SOCK_DGRAM
        assert peers.get(inodes[0]) == (inodes[1] if stream else None)
        assert peers.get(inodes[1]) == (inodes[0] if stream else None)
        assert inodes[2] not in peers
        out = {inodes[0]: inodes[1]} if stream else {}
        assert unix_diag.leaving(dict.fromkeys((inodes[0], inodes[2], "1"))) == out
        assert unix_diag.leaving(dict.fromkeys(inodes)) == {}


def test_who_holds_a_socket_is_said_in_words(proc: Proc) -> None:
    for pid in (7, 8, 9):
        proc.add(pid, 1, "pipe:[1]", f"socket:[{pid}0]")
        (proc.root / str(pid) / "comm").write_text(f"name {pid}\n")
    (proc.root / "5").mkdir()
    assert unix_diag.holder_of("80", str(proc.root)) == "process 8 (name 8)"
    assert unix_diag.holder_of("8", str(proc.root)) == "a process that cannot be seen"


class Kernel:
    """A netlink socket that answers with these datagrams."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)

    def recv(self, size: int) -> bytes:
        assert size >= 1 << 16
        return self.answers.pop(0)


def message(kind: int, body: bytes) -> bytes:
    data = struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body
    return data + bytes(-len(data) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def row(inode: int, kind: int, *attributes: bytes) -> bytes:
    return message(20, struct.pack("=BBBBIII", 1, kind, 1, 0, inode, 0, 0) + b"".join(attributes))


def test_the_kernels_answer_is_read_to_its_end() -> None:
    peer = attribute(2, struct.pack("=I", 6))
    odd = attribute(0, b"/run/x")
    first = row(5, 1, odd, peer) + row(7, 2, peer) + row(8, 5, attribute(2, bytes(4)))
    second = row(9, 5, peer) + row(10, 1) + message(3, bytes(4)) + row(11, 1, peer)
    kernel: socket.socket = Kernel(first, second)  # type: ignore[assignment]
    assert list(unix_diag._answers(kernel)) == [("5", "6"), ("9", "6")]
    failing: socket.socket = Kernel(message(2, struct.pack("=i", -2)))  # type: ignore[assignment]
    with pytest.raises(FileNotFoundError):
        list(unix_diag._answers(failing))


@pytest.mark.parametrize("namespace", ["own", "another", "unseen"])
def test_a_stream_that_leaves_the_engine_is_refused_where_it_can_be_seen(
    proc: Proc, namespace: str
) -> None:
    """Of another network namespace the kernel shows us nothing: CRIU finds out."""
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        ours, theirs = (os.fstat(each.fileno()).st_ino for each in (one, other))
        proc.add(7, 1, f"socket:[{ours}]")
        proc.add(9, 1, f"socket:[{theirs}]")
        (proc.root / "9" / "comm").write_text("client\n")
        if namespace != "unseen":
            (proc.root / "7" / "ns").mkdir()
            own = os.readlink("/proc/self/ns/net")
            (proc.root / "7" / "ns" / "net").symlink_to(own if namespace == "own" else "net:[1]")
        leaves = (
            "process 7 (p7) has a unix stream connection that leaves the engine: fd 0, to"
            " process 9 (client)"
        )
        assert proc.problems() == [leaves] * (namespace == "own")
