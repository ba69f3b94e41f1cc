"""The launcher by itself: what it says on its status pipe and how it ends when something fails."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from llmux.drivers.processes import launcher

NOBODY = 2**22 + 1

# Its descriptors by a shell: what it says comes out, and the gate is the input.
SHELL = 'exec "$0" -I -S -c "$1" "$2" 3>&1 4<&0 5<"$3"'
RUN = "import sys; sys.path.append(sys.argv[1]); import launcher; launcher.main()"

V1 = "import builtins, io; builtins.open = lambda *words: io.StringIO('4:memory:/x\\n')"


def alone(
    place: Path,
    *argv: str,
    before: str = "",
    gate: bytes = b"G",
    options: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int, list[str]]:
    """Exit status and what it said; ``before`` runs in its interpreter first."""
    output = {name: str(place / name) for name in ("stdout", "stderr")}
    spec = launcher.encode_spec(argv, {}, {**output, "cwd": "/", **options})
    (place / "spec").write_bytes(spec)
    directory = os.path.dirname(launcher.__file__)
    words = [sys.executable, f"{before}\n{RUN}", directory, str(place / "spec")]
    # The supervisor's end is open for as long as it lives.
    read, write = os.pipe()
    with os.fdopen(read, "rb") as its, os.fdopen(write, "wb") as ours:
        ours.write(gate)
        ours.flush()
        if not gate:
            ours.close()
        ran = subprocess.run(
            ["/bin/sh", "-c", SHELL, *words], stdin=its, capture_output=True, check=False
        )
    assert ran.stderr == b""
    return ran.returncode, ran.stdout.decode().splitlines()


def refused(request: int, number: int) -> str:
    """prctl(2) with this request fails in the launcher."""
    return f"""if True:
        import ctypes
        class Library:
            real = ctypes.CDLL(None, use_errno=True)
            def __getattr__(self, name):
                return getattr(self.real, name)
            def prctl(self, request, *words):
                if request.value != {request}:
                    return self.real.prctl(request, *words)
                ctypes.set_errno({number})
                return -1
        library = Library()
        ctypes.CDLL = lambda *words, **options: library
    """


def test_it_waits_at_the_gate_and_becomes_the_program(tmp_path: Path) -> None:
    assert alone(tmp_path, "/bin/sh", "-c", "exit 5") == (5, ["R", "X"])
    assert alone(tmp_path, "/bin/sh", "-c", "exit 5", gate=b"") == (0, ["R"])
    assert alone(tmp_path, "/no/such") == (
        127, ["R", "X", "E2 cannot execute /no/such: No such file or directory"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "options", "said"),
    [
        (refused(22, errno.EPERM), {"deny_io_uring": "1"},
         "E1 cannot install the seccomp filter: prctl(22): Operation not permitted"),
        (refused(36, errno.EINVAL), {"guardian": "1"},
         "E22 [Errno 22] prctl(36): Invalid argument"),
        (refused(24, errno.EIO), {"user": "u", "uid": "60901", "gid": "60901", "groups": ""},
         "E5 cannot become user u: prctl(24): Input/output error"),
        (V1, {"cgroup_root": "/no/such"}, "E2 /proc/self/cgroup names no cgroup v2 directory"),
    ],
    ids=["seccomp", "sub-reaper", "capabilities", "cgroup v1"],
)  # fmt: skip
def test_what_fails_is_said_with_its_number(
    tmp_path: Path, before: str, options: dict[str, str], said: str
) -> None:
    assert alone(tmp_path, "/bin/true", before=before, options=options) == (127, ["R", said])


def test_an_engine_whose_guardian_is_gone_does_not_begin(tmp_path: Path) -> None:
    before = "import os; os.getppid = lambda: 1"
    guarded = {"guardian": "1"}
    status, (ready, pid) = alone(tmp_path, "/bin/true", before=before, options=guarded)
    assert (status, ready, pid[0]) == (127, "R", "P")


def test_it_leaves_without_a_word_when_the_supervisor_is_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    argv = ["/bin/sh", "-c", SHELL, sys.executable, RUN, os.path.dirname(launcher.__file__)]
    ran = subprocess.run(
        [*argv, "/dev/null"], input=b"G", stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (127, b"")


def test_a_program_dumps_no_core_where_the_launcher_would(tmp_path: Path) -> None:
    before = """if True:
        import resource
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    """
    assert alone(tmp_path, "/bin/cat", "/proc/self/limits", before=before) == (0, ["R", "X"])
    (limits,) = [
        line.split()[4:6]
        for line in (tmp_path / "stdout").read_text().splitlines()
        if line.startswith("Max core file size")
    ]
    mine = Path("/proc/self/limits").read_text().splitlines()
    (hard,) = [line.split()[5] for line in mine if line.startswith("Max core file size")]
    assert limits == ["0", hard]


@pytest.mark.parametrize("spec", [b"0\x000\x00alone", b"0\x001\x00noname", b"", b"x"])
def test_a_damaged_spec_is_refused(spec: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        launcher.decode_spec(spec)


class Kernel:
    """prctl(2) and capset(2); the last capability that it knows is ``last``."""

    def __init__(self, last: int, refusal: int = errno.EINVAL, empty: int = 0) -> None:
        self.last, self.refusal, self.empty = last, refusal, empty
        self.dropped: list[int] = []
        self.done: list[tuple[Any, ...]] = []

    def prctl(self, request: Any, *words: Any) -> int:
        assert request.value == 24  # PR_CAPBSET_DROP
        self.dropped.append(words[0].value)
        if words[0].value <= self.last:
            return 0
        ctypes.set_errno(self.refusal)
        return -1

    def capset(self, header: Any, data: Any) -> int:
        assert (header._obj.version, header._obj.pid) == (0x20080522, 0)
        self.done.append(("capset", *data))
        ctypes.set_errno(errno.EPERM)
        return self.empty

    def noting(self, name: str) -> Callable[..., None]:
        return lambda *words: self.done.append((name, *words))


@pytest.mark.parametrize(
    ("last", "refusal", "dropped"),
    [
        (40, errno.EINVAL, range(42)),
        (63, errno.EINVAL, range(64)),
        (-1, errno.EPERM, range(64)),  # who may drop none has none
    ],
)
def test_capabilities_go_before_the_user_does(
    monkeypatch: pytest.MonkeyPatch, last: int, refusal: int, dropped: range
) -> None:
    kernel = Kernel(last, refusal)
    library: ctypes.CDLL = kernel  # type: ignore[assignment]
    for name in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, kernel.noting(name))
    launcher._drop_to(library, 70, 71, [5])
    assert kernel.dropped == [*dropped]
    assert kernel.done == [
        ("setgroups", [5]), ("setresgid", 71, 71, 71), ("setresuid", 70, 70, 70),
        ("capset", 0, 0, 0, 0, 0, 0),
    ]  # fmt: skip


def test_a_user_who_keeps_capabilities_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, lambda *_: None)
    keeps: ctypes.CDLL = Kernel(40, empty=-1)  # type: ignore[assignment]
    with pytest.raises(PermissionError, match="capset failed"):
        launcher._drop_to(keeps, 70, 71, [])
    fails: ctypes.CDLL = Kernel(40, errno.EIO)  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"prctl\(24\): Input/output error"):
        launcher._drop_to(fails, 70, 71, [])


def test_one_that_is_gone_saves_no_other_from_being_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often they fork: it looks again after each end, until it has no child any more."""
    killed: list[int] = []
    waited: list[tuple[int, int]] = []
    answers = [(7, 0), (8, 0), (0, 0), (9, 9), (0, 0)]
    real = os.listdir

    def kill(pid: int, number: int) -> None:
        assert number == 9
        killed.append(pid)
        raise ProcessLookupError if len(killed) % 2 else PermissionError

    def waitpid(pid: int, options: int) -> tuple[int, int]:
        waited.append((pid, options))
        if not answers:
            raise ChildProcessError
        return answers.pop(0)

    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], stdin=pipe) as one, subprocess.Popen(["cat"], stdin=pipe) as two:
        children = [one.pid, two.pid]
        with monkeypatch.context() as patched:
            patched.setattr(os, "listdir", lambda path: [str(NOBODY), *real(path)])
            patched.setattr(os, "kill", kill)
            patched.setattr(os, "waitpid", waitpid)
            launcher._kill_all()
        assert sorted(pid for pid in killed if pid in children) == sorted(children * 3)
    blocking, more = (-1, 0), (-1, os.WNOHANG)
    assert waited == [blocking, more, more, blocking, more, blocking]
