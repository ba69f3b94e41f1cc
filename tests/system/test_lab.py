"""The lab itself: what system tests stand on must not leak, mix up guests or lose a status."""

from __future__ import annotations

import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from leftovers import leftovers, processes_of

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from _lab import host, state  # noqa: E402 (the path first)
from _lab.forward import forwarded  # noqa: E402
from _lab.guest import Guest, GuestCommandError, sweep  # noqa: E402

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start a guest with its own PID 1"),
    pytest.mark.timeout(600),  # the first run builds the image
]

LAB = str(SCRIPTS / "lab")


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Guest.up() as started:
        yield started


def wait_for_end(pids: list[int], seconds: float = 30) -> bool:
    """Until the processes are gone; a pidfd is readable when its process has ended."""
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([fd], [], [], seconds)[0]:
                return False
        finally:
            os.close(fd)
    return True


def test_guest_has_booted_without_failed_units(guest: Guest) -> None:
    assert guest.run(["systemctl", "is-system-running", "--wait"]).stdout == "running\n"


def test_exit_status_and_both_streams_are_passed(guest: Guest) -> None:
    done = guest.run(["sh", "-c", "echo out; echo err >&2; exit 7"], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_failing_command_raises_with_what_it_printed(guest: Guest) -> None:
    with pytest.raises(GuestCommandError, match="no such luck"):
        guest.run(["sh", "-c", "echo no such luck >&2; exit 1"])


def test_stdin_environment_user_and_directory_are_passed(guest: Guest) -> None:
    script = 'cat; echo "$GREETING"; id -un; pwd'
    done = guest.run(
        ["sh", "-c", script], input="in\n", env={"GREETING": "hi"}, user="nobody", cwd="/tmp"
    )
    assert done.stdout == "in\nhi\nnobody\n/tmp\n"


def test_timeout_stops_the_command_in_the_guest_too(guest: Guest) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        guest.run(["sleep", "4711"], timeout=0.5)
    assert guest.run(["pgrep", "-x", "sleep"], check=False).stdout == ""


def test_network_is_a_loopback_of_its_own(guest: Guest) -> None:
    links = guest.run(["ip", "-brief", "address"]).stdout.splitlines()
    assert [line.split()[0] for line in links] == ["lo"]
    assert "127.0.0.1/8" in links[0]


ECHO = """
import socket
with socket.create_server(("127.0.0.1", 4711)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    while data := connection.recv(100):
        connection.sendall(data.upper())
    print("gone", flush=True)
"""


def test_a_port_in_the_guest_is_reached_through_one_of_ours(guest: Guest) -> None:
    echo = guest.popen(["python3", "-c", ECHO])
    try:
        assert echo.process.stdout is not None
        assert echo.process.stdout.readline() == "ready\n"
        with forwarded(guest.pid1, 4711) as port:
            with socket.create_connection(("127.0.0.1", port), 20) as client:
                client.sendall(b"hello")
                assert client.recv(100) == b"HELLO"
            assert echo.process.stdout.readline() == "gone\n"
    finally:
        echo.stop()


def test_project_is_there_and_read_only(guest: Guest) -> None:
    assert guest.run(["test", "-e", "/srv/llmux/pyproject.toml"]).returncode == 0
    denied = guest.run(["touch", "/srv/llmux/new"], check=False)
    assert "Read-only file system" in denied.stderr


def test_files_go_in_and_out(guest: Guest) -> None:
    guest.write("/etc/made/by-test", "content\n", mode=0o600)
    assert guest.run(["cat", "/etc/made/by-test"]).stdout == "content\n"
    guest.run(["sh", "-c", "echo back >/var/lib/answer"])
    assert guest.read("/var/lib/answer") == b"back\n"


def test_scopes_and_the_freezer_work(guest: Guest) -> None:
    """What llmux builds on: a delegated cgroup whose freezer we may write."""
    script = """
        mkdir /sys/fs/cgroup/llmux-try && sleep 60 & child=$!
        sleep 0.1; echo $child >/sys/fs/cgroup/llmux-try/cgroup.procs
        echo 1 >/sys/fs/cgroup/llmux-try/cgroup.freeze
        until grep -q "frozen 1" /sys/fs/cgroup/llmux-try/cgroup.events; do sleep 0.01; done
        echo 1 >/sys/fs/cgroup/llmux-try/cgroup.kill
    """
    guest.run(["sh", "-c", script], timeout=10)


def test_two_guests_do_not_see_each_other() -> None:
    with Guest.up() as one, Guest.up() as other:
        marker = one.popen(["sleep", "815"])
        try:
            one.write("/var/lib/marker", "one")
            assert other.run(["pgrep", "-x", "sleep"], check=False).stdout == ""
            assert other.run(["test", "-e", "/var/lib/marker"], check=False).returncode == 1
            assert other.run(["hostname"]).stdout.strip() == other.name
            listed = other.run(["systemctl", "list-units", "lab-*", "--plain", "--no-legend"])
            assert marker.unit not in listed.stdout
        finally:
            marker.stop()


def test_same_name_twice_is_refused(guest: Guest) -> None:
    with pytest.raises(host.LabError, match=f"guest {guest.name}: already up"):
        Guest.up(guest.name)


def test_down_leaves_nothing() -> None:
    started = Guest.up()
    started.write("/var/lib/data", b"x" * 1_000_000)
    started.down()
    assert leftovers(started.name) == []
    started.down()  # idempotent


def test_poweroff_inside_leaves_nothing() -> None:
    started = Guest.up()
    started.run(["systemctl", "poweroff", "--no-block"], check=False)
    assert wait_for_end(started.facts["guardian"])
    assert leftovers(started.name) == []
    started.down()


def test_killed_owner_leaves_nothing() -> None:
    script = (
        f"import sys, time; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "from _lab.guest import Guest\n"
        "guest = Guest.up(); print(guest.name, *guest.facts['guardian'], flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner, owner.stdout:
        name, *guardian = owner.stdout.readline().split()
        owner.send_signal(signal.SIGKILL)
    assert wait_for_end([int(pid) for pid in guardian])
    assert leftovers(name) == []


def test_starter_killed_during_the_boot_leaves_nothing() -> None:
    name = f"half-{os.getpid()}"
    directory = state.directory_of(name)
    with subprocess.Popen([LAB, "up", name], stdout=subprocess.DEVNULL) as starter:
        while not (directory / "spec.json").exists() and starter.poll() is None:
            time.sleep(0.001)
        starter.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while state.is_alive(directory) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wait_for_end(processes_of(name))  # the guardian's parent ends after it
    sweep()
    assert leftovers(name) == []


@pytest.mark.parametrize("victim", ["guardian", "its parent"])
def test_kill_9_of_the_guardian_ends_the_guest_and_its_mounts(victim: str) -> None:
    started = Guest.up()
    pids = started.facts["guardian"]
    os.kill(pids[0] if victim == "guardian" else pids[1], signal.SIGKILL)
    assert wait_for_end([*pids, started.pid1])
    left = leftovers(started.name)
    assert not [item for item in left if item.startswith(("process", "mount"))]
    sweep()
    assert leftovers(started.name) == []
    started.down()


def test_command_line_up_run_list_down() -> None:
    name = subprocess.run(
        [LAB, "up", "--owner-pid", str(os.getpid())], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    try:
        done = subprocess.run([LAB, "run", name, "sh", "-c", "cat; exit 3"], input=b"", check=False)
        assert done.returncode == 3
        listed = subprocess.run([LAB, "list"], stdout=subprocess.PIPE, text=True, check=True)
        assert name in listed.stdout
    finally:
        subprocess.run([LAB, "down", name], check=True)
    assert leftovers(name) == []


def test_boot_failure_shows_the_console(tmp_path: pathlib.Path) -> None:
    broken = tmp_path / "init"
    broken.write_text("#!/bin/sh\necho this init is broken; exit 1\n")
    broken.chmod(0o755)
    with pytest.raises(host.LabError, match="this init is broken"):
        Guest.up(bind_ro=[f"{broken}:/usr/lib/systemd/systemd"])


def test_bookworm_has_the_libraries_too() -> None:
    with Guest.up(suite="bookworm") as started:
        started.run(["python3", "-c", "import pystemd, sdnotify, yaml, httptools, uvloop, psutil"])


DEB822 = "Types: deb\n{}URIs: http://m.example/debian\nSuites: a a-updates\nComponents: main\n"


@pytest.mark.parametrize(
    ("suffix", "text", "mirror"),
    [
        (".list", "deb http://m.example/debian bookworm main\n", "http://m.example/debian"),
        (".list", "deb [arch=amd64] http://m.example/debian/ a main", "http://m.example/debian"),
        (".list", "deb http://m.example/debian-security trixie-security main", None),
        (".list", "# deb http://m.example/debian trixie main", None),
        (".sources", DEB822.format(""), "http://m.example/debian"),
        (".sources", DEB822.format("Enabled: no\n"), None),
    ],
)
def test_mirror_is_found_in_apt_sources(suffix: str, text: str, mirror: str | None) -> None:
    assert host.mirror_in_sources([(suffix, text)]) == mirror
