"""Try, as each party of SECURITY.md, what it must never do; print what became of each attempt.

attacks.py [MODEL OTHER]: two models that run; OTHER is the one that is attacked. Prints party →
attempt → "refused: …", or "DONE: …" for one that succeeded.
"""

from __future__ import annotations

import ctypes
import grp
import http.client
import json
import os
import pathlib
import pwd
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import witness

ENGINES = pathlib.Path("/run/llmux/engines")
CACHE = pathlib.Path("/var/cache/llmux")
IMAGES = pathlib.Path("/var/lib/llmux/checkpoints")
LOGS = pathlib.Path("/var/log/llmux")
SOCKET = "/run/llmux/supervisor.sock"
PTRACE_SEIZE = 0x4206
PR_SET_NO_NEW_PRIVS = 38
SECONDS = 10.0


class Refused(Exception):
    """What was tried was not done."""


@dataclass(frozen=True)
class Party:
    uid: int
    gid: int
    groups: Sequence[int] = ()


@dataclass(frozen=True)
class Target:
    """The engine that is attacked, and the processes around it."""

    model: str
    pid: int
    supervisor: int
    gateway: int


Attempt = Callable[[Target], object]


# ---- engines -------------------------------------------------------------------------------------


def connect(target: Target) -> object:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(ENGINES / target.model / "api.sock"))
    return "connected with its API"


def take_its_socket(target: Target) -> object:
    place = ENGINES / target.model
    os.rename(place / "api.sock", place / "former.sock")
    return "its socket has another name"


def block_its_socket(target: Target) -> object:
    (ENGINES / target.model / "api.sock.d").mkdir()
    return "made a directory beside its socket"


def move_its_directory(target: Target) -> object:
    os.rename(ENGINES / target.model, ENGINES / f"{target.model}.away")
    return "its directory has another name"


def make_a_directory(target: Target) -> object:
    (ENGINES / "next-model").mkdir()
    return "took the directory of a model to come"


def read_memory(target: Target) -> object:
    with open(f"/proc/{target.pid}/mem", "rb") as file:
        return file.name


def read_environment(target: Target) -> object:
    return pathlib.Path(f"/proc/{target.pid}/environ").read_bytes()[:20]


def trace(target: Target) -> object:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_ulong(PTRACE_SEIZE), ctypes.c_ulong(target.pid), None, None)
    if libc.ptrace(*arguments) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    return "traces it"


def end_it(target: Target) -> object:
    os.kill(target.pid, signal.SIGCONT)
    return "may send it signals"


def read_its_home(target: Target) -> object:
    return os.listdir(CACHE / target.model)


def plant_code(target: Target) -> object:
    (CACHE / target.model / "x.pth").write_text("import os")
    return "wrote into its home"


def take_a_home(target: Target) -> object:
    (CACHE / "next-model").mkdir()
    return "took the home of a model to come"


def move_its_home(target: Target) -> object:
    os.rename(CACHE / target.model, CACHE / f"{target.model}.away")
    return "its home has another name"


def enter_its_cgroup(target: Target) -> object:
    scope = pathlib.Path(f"/sys/fs/cgroup/llmux.slice/llmux-{target.model}.scope")
    (scope / "cgroup.procs").write_text(str(os.getpid()))
    return "is in its cgroup"


def freeze_it(target: Target) -> object:
    scope = pathlib.Path(f"/sys/fs/cgroup/llmux.slice/llmux-{target.model}.scope")
    (scope / "engine" / "cgroup.freeze").write_text("0")
    return "may freeze it"


# ---- logs and images -----------------------------------------------------------------------------


def read_its_log(target: Target) -> object:
    return (LOGS / target.model / "stdout.log").read_bytes()[:20]


def replace_its_log(target: Target) -> object:
    log = LOGS / target.model / "stdout.log"
    os.rename(log, f"{log}.away")
    return "its log has another name"


def look_at_images(target: Target) -> object:
    return os.listdir(IMAGES)


def make_an_image(target: Target) -> object:
    (IMAGES / target.model / "images").mkdir(parents=True)
    return "made an image of its own"


# ---- the services --------------------------------------------------------------------------------


def speak(lines: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Messages to the supervisor; what it answers until it ends the connection or says nothing."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS)
        sock.connect(SOCKET)
        for line in lines:
            sock.sendall(json.dumps(line).encode() + b"\n")
        heard: list[dict[str, object]] = []
        with sock.makefile("rb") as file:
            for answer in file:
                heard.append(json.loads(answer))
                if heard[-1].get("type") == "answer":
                    break
    return heard


def order(verb: str, **arguments: object) -> object:
    hello = {"type": "hello", "role": "cli"}
    ask = {"type": "ask", "id": 1, "verb": verb, "args": arguments}
    answers = [one for one in speak([hello, ask]) if one.get("type") == "answer"]
    if not answers or not answers[0]["ok"]:
        raise Refused(f"answer: {answers}")
    return answers[0]


def ask_for_status(target: Target) -> object:
    return order("status")


def unload_it(target: Target) -> object:
    return order("unload", model=target.model)


def reload(target: Target) -> object:
    return order("reload")


def checkpoint_it(target: Target) -> object:
    return order("checkpoint", model=target.model)


def end_the_supervisor(target: Target) -> object:
    """A message of a wrong type must end that connection and nothing else."""
    hello = {"type": "hello", "role": "gateway", "worker": "evil", "holds": {}}
    demand = {"type": "demand", "model": target.model, "waiting": 1, "oldest_age": "x"}
    speak([hello, demand])
    os.stat(f"/proc/{target.supervisor}")
    raise Refused("it lives")


def signal_the_supervisor(target: Target) -> object:
    os.kill(target.supervisor, signal.SIGCONT)
    return "may send it signals"


def signal_the_gateway(target: Target) -> object:
    os.kill(target.gateway, signal.SIGCONT)
    return "may send it signals"


def read_the_configuration(target: Target) -> object:
    return pathlib.Path("/etc/llmux/config.yaml").read_bytes()[:20]


def write_the_configuration(target: Target) -> object:
    with open("/etc/llmux/config.yaml", "ab") as file:
        return file.name


def add_to_the_configuration(target: Target) -> object:
    path = pathlib.Path("/etc/llmux/conf.d/evil.yaml")
    path.write_text("models: {}\n")
    return str(path)


def read_the_notes(target: Target) -> object:
    return pathlib.Path("/run/llmux/state.json").read_bytes()[:20]


def replace_the_control_socket(target: Target) -> object:
    os.rename(SOCKET, f"{SOCKET}.away")
    return "the control socket has another name"


def give_out_uids(target: Target) -> object:
    return pathlib.Path("/var/lib/llmux/engine-users.json").read_bytes()[:20]


def stop_the_slice(target: Target) -> object:
    code = os.system("systemctl --no-ask-password stop llmux-alpha.scope >/dev/null 2>&1")
    if code != 0:
        raise Refused(f"systemctl: {code}")
    return "stopped a scope"


# ---- HTTP ----------------------------------------------------------------------------------------


def request(method: str, path: str, body: str = "") -> object:
    connection = http.client.HTTPConnection("127.0.0.1", 3000, timeout=SECONDS)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        said = reply.read(200)
    finally:
        connection.close()
    if reply.status >= 400:
        raise Refused(f"HTTP {reply.status}")
    return f"HTTP {reply.status} {said!r}"


def unload_over_http(target: Target) -> object:
    return request("POST", "/unload", json.dumps({"model": target.model}))


def unload_over_http_by_get(target: Target) -> object:
    return request("GET", f"/unload?model={target.model}")


def sleep_over_http(target: Target) -> object:
    return request("POST", "/control/sleep", json.dumps({"model": target.model}))


def logs_over_http(target: Target) -> object:
    return request("GET", f"/logs/{target.model}")


def development_endpoint(target: Target) -> object:
    return request("POST", f"/upstream/{target.model}/collective_rpc", '{"method": "x"}')


# ---- who tries what ------------------------------------------------------------------------------

ENGINE: list[Attempt] = [
    *(read_memory, read_environment, trace, end_it),
    *(read_its_home, plant_code, take_a_home, move_its_home),
    *(take_its_socket, block_its_socket, move_its_directory, make_a_directory),
    *(enter_its_cgroup, freeze_it),
    *(read_its_log, replace_its_log, look_at_images, make_an_image),
    *(reload, checkpoint_it, signal_the_supervisor, write_the_configuration),
    *(add_to_the_configuration, read_the_notes, replace_the_control_socket, give_out_uids),
    stop_the_slice,
]
OVER_HTTP: list[Attempt] = [
    *(unload_over_http, unload_over_http_by_get, sleep_over_http),
    *(logs_over_http, development_endpoint),
]
OUTSIDE: list[Attempt] = [
    *ENGINE,
    *OVER_HTTP,
    *(ask_for_status, unload_it, end_the_supervisor, signal_the_gateway),
]


def parties(model: str) -> dict[str, tuple[Party, list[Attempt]]]:
    nobody, gateway = pwd.getpwnam("nobody"), pwd.getpwnam("llmux")
    own = os.stat(CACHE / model)
    engines = pwd.getpwnam("llmux-engine")
    shared = os.getgrouplist("llmux-engine", engines.pw_gid)
    group = grp.getgrnam("llmux").gr_gid
    stranger = [*OUTSIDE, connect, read_the_configuration]
    return {
        "nobody": (Party(nobody.pw_uid, nobody.pw_gid), stranger),
        "another engine": (Party(own.st_uid, own.st_gid, shared), stranger),
        "a member of group llmux-engine": (Party(nobody.pw_uid, engines.pw_gid, shared), stranger),
        # the group of the gateway: it reads the configuration, and reaches engines' sockets
        "a member of group llmux": (Party(nobody.pw_uid, group), OUTSIDE),
        "the gateway": (Party(gateway.pw_uid, gateway.pw_gid), [*ENGINE, end_the_supervisor]),
    }


def become(party: Party) -> None:
    """As the launcher does it for an engine."""
    libc = ctypes.CDLL(None)
    os.setgroups(list(party.groups))
    os.setresgid(party.gid, party.gid, party.gid)
    os.setresuid(party.uid, party.uid, party.uid)
    libc.prctl(PR_SET_NO_NEW_PRIVS, *(ctypes.c_ulong(value) for value in (1, 0, 0, 0)))


def attempt(what: Attempt, target: Target) -> str:
    try:
        return f"DONE: {what(target)}"
    except (OSError, Refused) as error:
        return f"refused: {error}"


def as_party(party: Party, attempts: Sequence[Attempt], target: Target) -> dict[str, str]:
    """Each in a process of its own, which the kernel gives the party's rights."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become(party)
            found = {what.__name__: attempt(what, target) for what in attempts}
            with open(write, "w") as file:
                json.dump(found, file)
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        said = file.read()
    os.waitpid(child, 0)
    result: dict[str, str] = json.loads(said)
    return result


def main(model: str, other: str) -> None:
    def pid_of(unit: str) -> int:
        procs = pathlib.Path(f"/sys/fs/cgroup/llmux.slice/{unit}/cgroup.procs").read_text()
        return int(procs.split()[0])

    target = Target(
        other,
        min(witness.scopes()[other]),
        pid_of("llmux.service"),
        pid_of("llmux-gateway.service"),
    )
    report = {
        name: as_party(party, attempts, target)
        for name, (party, attempts) in parties(model).items()
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
