"""The child at the gate: waits until its unit exists, arranges itself, becomes the engine.

Runs in an interpreter of its own (``python3 -I -S``, see spawn.py); the supervisor uses
``encode_spec`` and nothing else. Few modules, standard library only: the start-up time is part
of every cold start. On 2 cores json costs 8 ms more (hence the plain spec format), signal another 8
(it needs enum, hence ``libc.signal``), of a total of about 15. Its file descriptors are fixed:

* 3: status pipe, close-on-exec. Lines: ``R`` (at the gate), ``P<pid>`` (guardian mode: the engine's
  pid), ``X`` (about to exec), ``E<errno> <text>`` (failed). ``X``, then end of file: success.
* 4: the gate. One byte opens it; end of file means that the supervisor is gone: exit.
* 5: a memfd, which holds the spec once the gate is open.

In *guardian* mode (no systemd) it stays as the engine's parent and as the sub-reaper of everything
that the engine forks. End of file on the gate, even by SIGKILL of the supervisor, kills the tree.
"""

from __future__ import annotations

import ctypes
import errno
import os

TYPE_CHECKING = False  # typing.TYPE_CHECKING without the 5 ms that importing typing costs
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

STATUS_FD = 3
GATE_FD = 4
SPEC_FD = 5

# <linux/prctl.h>, <linux/seccomp.h>, <linux/filter.h>
PR_SET_PDEATHSIG = 1
PR_CAPBSET_DROP = 24
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
BPF_LD_W_ABS = 0x20
BPF_JMP_JEQ_K = 0x15
BPF_RET_K = 0x06
# The same number on every architecture but alpha: the table was unified at 403.
NR_IO_URING_SETUP = 425
X32_SYSCALL_BIT = 0x40000000
SIGKILL, SIGPIPE, SIGXFSZ = 9, 13, 25
LINUX_CAPABILITY_VERSION_3 = 0x20080522
ENGINE_CGROUP = "engine"


def encode_spec(argv: Sequence[str], env: Mapping[str, str], options: Mapping[str, str]) -> bytes:
    """The spec as NUL-separated strings: neither argv nor the environment can hold a NUL.

    Raises ValueError when one does.
    """
    fields = [str(len(argv)), *argv, str(len(env)), *(f"{k}={v}" for k, v in env.items())]
    for key, value in options.items():
        fields += [key, value]
    data = [os.fsencode(field) for field in fields]
    if any(b"\0" in field for field in data):
        raise ValueError("a NUL character in the command line or in the environment")
    return b"\0".join(data)


def decode_spec(data: bytes) -> tuple[list[bytes], dict[bytes, bytes], dict[str, str]]:
    """The inverse of ``encode_spec``; argv and environment stay bytes, as execve takes them."""
    fields = data.split(b"\0")
    count = int(fields[0])
    argv = fields[1 : 1 + count]
    rest = fields[1 + count :]
    count = int(rest[0])
    env = dict(field.split(b"=", 1) for field in rest[1 : 1 + count])
    pairs = [os.fsdecode(field) for field in rest[1 + count :]]
    return argv, env, dict(zip(pairs[::2], pairs[1::2], strict=True))


class _Failed(Exception):
    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def _prctl(libc: ctypes.CDLL, *args: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*args, 0, 0, 0, 0)[1:5]]
    if libc.prctl(ctypes.c_int(args[0]), *padded) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({args[0]}): {os.strerror(number)}")


class _SockFilter(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    ]


class _SockFprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_SockFilter))]


def deny_io_uring(libc: ctypes.CDLL) -> None:
    """io_uring_setup answers ENOSYS from here on, in us and in all our descendants.

    uvloop's libuv opens a ring although UV_USE_IO_URING=0, and CRIU cannot dump one (tried).
    """
    program = (_SockFilter * 5)(
        _SockFilter(BPF_LD_W_ABS, 0, 0, 0),  # seccomp_data.nr
        _SockFilter(BPF_JMP_JEQ_K, 1, 0, NR_IO_URING_SETUP),
        _SockFilter(BPF_JMP_JEQ_K, 0, 1, NR_IO_URING_SETUP | X32_SYSCALL_BIT),
        _SockFilter(BPF_RET_K, 0, 0, SECCOMP_RET_ERRNO | errno.ENOSYS),
        _SockFilter(BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW),
    )
    fprog = _SockFprog(len(program), program)
    _prctl(libc, PR_SET_NO_NEW_PRIVS, 1)
    _prctl(libc, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog))


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


def _drop_to(libc: ctypes.CDLL, uid: int, gid: int, groups: Sequence[int]) -> None:
    if os.getresuid() == (uid, uid, uid):
        return
    # Bounding set first, while CAP_SETPCAP is still there: no set-uid file brings one back.
    for capability in range(64):
        try:
            _prctl(libc, PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:
                break  # beyond the last capability of this kernel
            if error.errno != errno.EPERM:
                raise
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    # setresuid cleared the effective and permitted sets; the ambient one goes with the inheritable.
    empty = (ctypes.c_uint32 * 6)()
    header = _CapHeader(LINUX_CAPABILITY_VERSION_3, 0)
    if libc.capset(ctypes.byref(header), empty) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")


def _enter_engine_cgroup(root: str) -> None:
    """Make ``engine/`` in our delegated scope and move there: that subtree is ours to freeze."""
    with open("/proc/self/cgroup") as file:
        path = next((line[3:].strip() for line in file if line.startswith("0::")), None)
    if path is None:
        raise _Failed("/proc/self/cgroup names no cgroup v2 directory", errno.ENOENT)
    directory = f"{root}{path}/{ENGINE_CGROUP}"
    os.makedirs(directory, exist_ok=True)
    with open(f"{directory}/cgroup.procs", "w") as file:
        file.write("0")


def _say(line: str) -> None:
    try:
        os.write(STATUS_FD, line.encode("utf-8", "replace").replace(b"\n", b" ") + b"\n")
    except BrokenPipeError:
        os._exit(127)  # the supervisor is gone


def _redirect(path: str, fd: int) -> None:
    # O_APPEND: CRIU accepts a file that has changed in size only with it, and truncating in place
    # works. O_NOFOLLOW and the owner: we are root here, and others may have put something there.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        opened = os.open(path, flags, 0o640)
    except OSError as error:
        raise _step(f"cannot open {path}", error) from error
    owner = os.fstat(opened).st_uid
    if owner not in (0, os.geteuid()):
        raise _Failed(f"cannot open {path}: it belongs to user {owner}", errno.EPERM)
    os.dup2(opened, fd)


def _make_directory(path: str) -> None:
    """As the engine's user already: what it may have put there is its own fault."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except OSError as error:
        raise _step(f"cannot make {path}", error) from error


def _step(what: str, error: OSError) -> _Failed:
    return _Failed(f"{what}: {error.strerror or error}", error.errno or 0)


def _become(
    libc: ctypes.CDLL, argv: list[bytes], env: dict[bytes, bytes], options: dict[str, str]
) -> NoReturn:
    """Everything between the gate and execve. Raises _Failed."""
    # Opened by us, not inherited: an inherited descriptor may lie on a mount that CRIU cannot see.
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    _redirect(options["stdout"], 1)
    _redirect(options["stderr"], 2)
    # Those that were opened just now as well.
    os.closerange(GATE_FD, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") > 0 else 65536)
    os.set_inheritable(STATUS_FD, False)
    if options.get("deny_io_uring") == "1":
        try:
            deny_io_uring(libc)
        except OSError as error:
            raise _step("cannot install the seccomp filter", error) from error
    os.umask(0o007)
    # A crash of an engine would write tens of GB where a core dump handler is installed.
    import resource  # 0.3 ms

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if "user" in options:
        groups = [int(group) for group in options["groups"].split(",") if group]
        try:
            _drop_to(libc, int(options["uid"]), int(options["gid"]), groups)
        except OSError as error:
            raise _step(f"cannot become user {options['user']}", error) from error
        if "temporary" in options:
            _make_directory(options["temporary"])
    if options.get("guardian") == "1":
        # After the change of user, which would clear it. Only a second line: see _guard.
        _prctl(libc, PR_SET_PDEATHSIG, SIGKILL)
        if os.getppid() != int(options["guardian_pid"]):
            os._exit(127)
    try:
        os.chdir(options["cwd"])
    except OSError as error:
        raise _step(f"cannot change to directory {options['cwd']}", error) from error
    # Python ignores these two; the engine expects the defaults.
    for number in (SIGPIPE, SIGXFSZ):
        libc.signal(ctypes.c_int(number), ctypes.c_void_p(0))
    _say("X")
    program = os.fsdecode(argv[0])
    try:
        os.execve(argv[0], argv, env)  # noqa: S606  # what this program is for
    except OSError as error:
        raise _step(f"cannot execute {program}", error) from error


def _descendants(root: int) -> list[int]:
    """All processes below ``root``, by parent pid. Without psutil: it takes longer to import than
    the whole launcher to start."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    stat = file.read()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(b")")[2].split()[1]), []).append(int(name))
    found: list[int] = []
    todo = [root]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _kill_all() -> None:
    """Kill every descendant and see them all gone. As their sub-reaper we inherit each orphan, so
    the loop ends exactly when nothing is left, however often and in whatever session they had
    forked."""
    while True:
        for pid in _descendants(os.getpid()):
            try:
                os.kill(pid, SIGKILL)
            except OSError:  # gone, or not ours to kill
                continue
        try:
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def _guard(engine: int) -> NoReturn:
    """Live as long as the engine or the supervisor, whichever ends first; then leave nothing."""
    import select
    import signal

    wakeup, on_child = os.pipe()
    os.set_blocking(on_child, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(on_child, warn_on_full_buffer=False)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # only the gate decides
    poller = select.poll()
    poller.register(GATE_FD, select.POLLIN | select.POLLHUP)
    poller.register(wakeup, select.POLLIN)
    status: int | None = None
    while status is None:
        pid, ended = os.waitpid(-1, os.WNOHANG)
        if pid == engine:
            status = ended
        elif pid == 0:
            ready = {fd for fd, _ in poller.poll()}
            if wakeup in ready:
                os.read(wakeup, 4096)
            if GATE_FD in ready:
                break  # a second byte or end of file: kill
    _kill_all()
    if status is None:
        status = SIGKILL  # as it was ended just now
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != SIGKILL:  # whose action none can set
            signal.signal(number, signal.SIG_DFL)
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core, if any, is the engine's
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def main() -> NoReturn:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _say("R")
        if os.read(GATE_FD, 1) == b"":
            os._exit(0)
        size = os.fstat(SPEC_FD).st_size
        argv, env, options = decode_spec(os.pread(SPEC_FD, size, 0))
        if "cgroup_root" in options:
            try:
                _enter_engine_cgroup(options["cgroup_root"])
            except OSError as error:
                raise _step("cannot make the engine's cgroup", error) from error
        if options.get("guardian") == "1":
            _prctl(libc, PR_SET_CHILD_SUBREAPER, 1)
            options["guardian_pid"] = str(os.getpid())
            engine = os.fork()
            if engine:
                _say(f"P{engine}")
                os.close(STATUS_FD)
                _guard(engine)
            os.setsid()
        _become(libc, argv, env, options)
    except _Failed as error:
        _say(f"E{error.number} {error}")
    except OSError as error:
        _say(f"E{error.errno or 0} {error}")
    except BaseException as error:  # noqa: BLE001  # the status pipe is the only way out
        _say(f"E0 internal error in the launcher: {error!r}")
    os._exit(127)
