"""A guest: up, run, down. The API for pytest fixtures and what the command line uses.

    with Guest.up(bind=["/tmp/ledger"]) as guest:
        guest.run(["systemctl", "is-system-running", "--wait"])

A guest lives in the namespaces of its guardian (guardian.py), so it ends, with all its mounts, when
its owner dies, on down(), or when anything of it is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self

from . import host, launch, nspawn, state, vllm, vm


@dataclasses.dataclass
class RunningCommand:
    """A command in a guest that has not been waited for."""

    process: subprocess.Popen[str]
    unit: str
    guest: Guest

    def stop(self) -> None:
        """Stop the command in the guest (its whole unit), then reap the local end."""
        self.guest.stop_unit(self.unit)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


class Guest:
    """One running guest. Construct with up() or attach(), never directly."""

    def __init__(
        self, record: state.Record, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.directory = record.directory
        self.facts = record.facts
        self._process = process

    # --- life ---------------------------------------------------------------------------------

    @classmethod
    def up(
        cls,
        name: str | None = None,
        *,
        suite: str = "trixie",
        machine: bool = False,
        bind_ro: Sequence[str] = (),
        bind: Sequence[str] = (),
        debs: Sequence[str | os.PathLike[str]] = (),
        with_vllm: bool = False,
        memory_mib: int = 2048,
        reboots: bool = False,
    ) -> Self:
        """Start a guest that lives no longer than this process; returns when it has booted."""
        options = launch.Options(
            suite=suite,
            machine=machine,
            bind_ro=tuple(bind_ro),
            bind=tuple(bind),
            debs=tuple(os.fspath(deb) for deb in debs),
            with_vllm=with_vllm,
            owner_pid=os.getpid(),
            memory_mib=memory_mib,
            reboots=reboots,
        )
        return cls.start(name, options)

    @classmethod
    def start(cls, name: str | None, options: launch.Options) -> Self:
        """As up(), with all options; without an owner the guest lives until down()."""
        name = name or f"g-{secrets.token_hex(3)}"
        directory = state.directory_of(name)
        plan = launch.plan(name, directory, options)
        with contextlib.ExitStack() as stack:
            with state.registry():
                state.sweep()
                if directory.exists():
                    raise host.LabError(
                        f"guest {name}: already up\n"
                        f"  next step: choose another name, or 'scripts/lab down {name}'"
                    )
                directory.mkdir(mode=0o755)
                lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
            console = stack.enter_context(open(directory / "console.log", "a+b"))
            if options.machine:
                launch.pack_shares(directory, plan.shares)
            process, status = launch.spawn_guardian(directory, plan, options.owner_pid, lock)
            stack.callback(os.close, status)
            try:
                facts = launch.wait_until_booted(plan, directory, process, status, console)
                state.save(directory, facts)
                guest = cls(state.Record(directory, facts), process)
                guest._furnish(plan, options)
            except BaseException:
                _end(process)
                state.remove(directory)
                raise
        return guest

    @classmethod
    def attach(cls, name: str) -> Self:
        """A guest that another process started."""
        directory = state.directory_of(name)
        record = state.load(directory) if state.is_alive(directory) else None
        if record is None:
            running = ", ".join(found.name for found in state.living()) or "none"
            raise host.LabError(
                f"guest {name}: not running (running: {running})\n"
                f"  next step: 'scripts/lab up {name}'"
            )
        return cls(record)

    def reboot(self) -> None:
        """Of a machine that was started here with ``reboots``; returns when it has booted again."""
        assert self.is_machine and self._process is not None
        console, port = self.directory / "console.log", int(self.facts["port"])
        boots = vm.boots_of(console)
        self.run(["systemctl", "reboot", "--no-block"], check=False)
        if not vm.wait_for_reboot(self._ssh(tty=False), port, self._process, console, boots):
            raise host.LabError(f"guest {self.name}: it did not boot again\n{self.console[-4000:]}")
        self._mount_shares()

    def down(self) -> None:
        """End the guest at once, as a power cut does; nothing of it is left. Idempotent."""
        if state.is_alive(self.directory) and not state.kill_and_wait(self.facts["guardian"], 30):
            raise host.LabError(
                f"guest {self.name}: its processes did not end within 30 s of SIGKILL\n"
                f"  next step: look for processes in state D below pid {self.facts['guardian']}"
            )
        if self._process is not None:
            self._process.wait()
        with state.registry():
            if not state.is_alive(self.directory):
                state.remove(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # --- facts --------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def is_machine(self) -> bool:
        return bool(self.facts["kind"] == "machine")

    @property
    def pid1(self) -> int:
        """The guest's init as the host numbers it."""
        if self.is_machine:
            raise host.LabError(f"guest {self.name}: a virtual machine has no pid on the host")
        return int(self.facts["pid1"])

    @property
    def root(self) -> pathlib.Path:
        """The guest's root directory, for reading and writing its files from the host."""
        return pathlib.Path(f"/proc/{self.pid1}/root")

    @property
    def console(self) -> str:
        try:
            return (self.directory / "console.log").read_text(errors="replace")
        except OSError:
            return ""

    # --- commands -----------------------------------------------------------------------------

    def argv_for(
        self,
        argv: Sequence[str],
        *,
        unit: str,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        properties: Sequence[str] = (),
        tty: bool = False,
    ) -> list[str]:
        """The command line on the host that runs `argv` as a unit of the guest's systemd.

        A unit and not a bare nsenter: it has the guest's own cgroup and working directory, without
        which CRIU meets the host's.
        """
        settings = {"LANG": "C.UTF-8", **({} if user else {"HOME": "/root"}), **(env or {})}
        inside = [
            "systemd-run",
            "--quiet",
            "--pty" if tty else "--pipe",
            "--wait",
            "--collect",
            f"--unit={unit}",
            *(f"--setenv={key}={value}" for key, value in settings.items()),
            *([f"--uid={user}"] if user else []),
            *([f"--working-directory={cwd}"] if cwd else []),
            *(f"--property={setting}" for setting in properties),
            "--",
            *argv,
        ]
        if self.is_machine:
            return [*self._ssh(tty=tty), *vm.remote_command(inside)]
        return [*nspawn.enter_argv(self.pid1), *inside]

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        properties: Sequence[str] = (),
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
    ) -> RunningCommand:
        """Start a command in the guest; the caller stops it or waits for it."""
        unit = f"lab-{secrets.token_hex(4)}"
        process = subprocess.Popen(
            self.argv_for(argv, unit=unit, env=env, user=user, cwd=cwd, properties=properties),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=host.clean_environment(),
            text=True,
        )
        return RunningCommand(process, unit, self)

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float | None = 60,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        properties: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the guest and collect its output, as subprocess.run does.

        What it leaves running ends with it. On a timeout its unit is stopped in the guest too.
        """
        command = self.popen(
            argv,
            env=env,
            user=user,
            cwd=cwd,
            properties=properties,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        )
        try:
            stdout, stderr = command.process.communicate(input, timeout=timeout)
        except BaseException:
            command.stop()
            raise
        done = subprocess.CompletedProcess(list(argv), command.process.returncode, stdout, stderr)
        # 255: ssh lost the machine, or a signal ended the command.
        if self.is_machine and done.returncode == 255:
            self._check_kernel(done)
        if check and done.returncode != 0:
            raise GuestCommandError(self.name, done)
        return done

    def _check_kernel(self, done: subprocess.CompletedProcess[str]) -> None:
        if (words := vm.last_words(self.directory / "console.log")) is not None:
            raise host.LabError(
                f"guest {self.name}: its kernel died during {' '.join(done.args)}\n"
                f"{host.indented(words)}"
            )

    def stop_unit(self, unit: str) -> None:
        stop = ["systemctl", "stop", f"{unit}.service"]
        prefix = self._ssh(tty=False) if self.is_machine else nspawn.enter_argv(self.pid1)
        subprocess.run(
            [*prefix, *(vm.remote_command(stop) if self.is_machine else stop)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=host.clean_environment(),
            timeout=120,
            check=False,
        )

    def read(self, path: str) -> bytes:
        """The content of a file in the guest."""
        if not self.is_machine:
            return self._inside(path).read_bytes()
        return subprocess.run(
            [*self._ssh(tty=False), *vm.remote_command(["cat", path])],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        ).stdout

    def write(self, path: str, content: bytes | str, *, mode: int = 0o644) -> None:
        """Create or replace a file in the guest, with its parent directories."""
        data = content.encode() if isinstance(content, str) else content
        if not self.is_machine:
            target = self._inside(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            target.chmod(mode)
            return
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        inside = ["sh", "-c", script, "sh", path, f"{mode:o}"]
        subprocess.run(
            [*self._ssh(tty=False), *vm.remote_command(inside)],
            input=data,
            capture_output=True,
            check=True,
        )

    def install(self, deb: str | os.PathLike[str]) -> None:
        """Install a .deb in the guest; its dependencies are in the image, no network is used."""
        source = pathlib.Path(deb)
        self.write(f"/var/cache/lab/{source.name}", source.read_bytes())
        done = self.run(
            ["apt-get", "-q", "-y", "--no-install-recommends", "install",
             f"/var/cache/lab/{source.name}"],
            env={"DEBIAN_FRONTEND": "noninteractive"},
            timeout=600,
            check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise host.LabError(
                f"guest {self.name}: installing {source.name} failed with status "
                f"{done.returncode}\n{host.indented(done.stdout + done.stderr)}\n"
                "  next step: a missing dependency belongs in LLMUX_DEPENDENCIES in "
                "scripts/_lab/image.py"
            )

    # --- inside -------------------------------------------------------------------------------

    def _inside(self, path: str) -> pathlib.Path:
        return self.root / path.lstrip("/")

    def _ssh(self, *, tty: bool) -> list[str]:
        key, port = pathlib.Path(self.facts["ssh_key"]), int(self.facts["port"])
        return vm.ssh_argv(self.directory, key, port, tty=tty)

    def _mount_shares(self) -> None:
        """In a machine; a container has them from the start."""
        for index, target in enumerate(self.facts["shares"]):
            self.run(["mkdir", "-p", target])
            self.run(["mount", "-o", "ro", vm.share_device(index), target])

    def _furnish(self, plan: launch.Plan, options: launch.Options) -> None:
        self.facts["shares"] = [share.target for share in plan.shares if options.machine]
        self._mount_shares()
        for share in plan.shares if not options.machine else ():
            # The mount point's parents may be closed to others (/root is): engines of another user
            # must get through. These directories are the guest's own layer, not the host's.
            for parent in list(pathlib.PurePosixPath(share.target).parents)[:-1]:
                inside = self._inside(str(parent))
                if not launch.is_shared(str(parent), plan.shares):
                    inside.chmod(inside.stat().st_mode | 0o111)
        if plan.vllm is not None:
            self.write("/usr/local/bin/vllm", vllm.wrapper(plan.vllm), mode=0o755)
        for deb in options.debs:
            self.install(deb)


class GuestCommandError(host.LabError):
    """A command in a guest failed; carries what it printed."""

    def __init__(self, name: str, done: subprocess.CompletedProcess[str]) -> None:
        self.done = done
        super().__init__(
            f"guest {name}: {' '.join(done.args)}: status {done.returncode}\n"
            f"{host.indented(done.stdout + done.stderr)}"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    state.kill_and_wait([*nspawn.children(process.pid), process.pid], 30)
    process.wait()


def sweep() -> list[str]:
    """Remove what killed guests left."""
    if os.geteuid() != 0 or not host.state_dir().is_dir():
        return []
    with state.registry():
        return state.sweep()
