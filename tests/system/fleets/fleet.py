"""Several guests on one network with ssh, and Ansible that runs on this host against them.

    with fleet({"one": "trixie", "two": "bookworm"}) as hosts:
        hosts.play("site.yml", inventory)

The network is a bridge of this host with an end of a veth pair in each guest. The pairs go with
the guests; the bridge is removed at the end, and one whose owner died by the next fleet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import pathlib
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from llmux_guest import ROOT, Guest, host

ANSIBLE: Final = ROOT / "ansible"
PLAYBOOKS: Final = ANSIBLE / "playbooks"
# One feature release: what ansible-lint accepts changes with each.
TOOLS: Final = ("ansible-core>=2.19,<2.20", "ansible-lint==26.10.1")
BRIDGE: Final = re.compile(r"llab(\d+)")
NETWORKS: Final = ipaddress.IPv4Network("10.213.0.0/16")


@dataclasses.dataclass(frozen=True)
class Played:
    """What a playbook said and, of each host, its counters (ok, changed, failures, …)."""

    status: int
    output: str
    stats: Mapping[str, Mapping[str, int]]
    changed: Mapping[str, Sequence[str]]  # host → the tasks that changed it

    def assert_ok(self) -> Played:
        assert self.status == 0, self.output[-6000:]
        return self


@dataclasses.dataclass(frozen=True)
class Fleet:
    guests: Mapping[str, Guest]
    addresses: Mapping[str, str]
    directory: pathlib.Path
    tools: pathlib.Path

    def inventory(
        self, groups: Mapping[str, Sequence[str]], variables: Mapping[str, Any]
    ) -> pathlib.Path:
        """An inventory file: groups of hosts, and variables of all."""
        path = self.directory / "inventory.json"
        path.write_text(self.hosts(groups, variables))
        return path

    def hosts(self, groups: Mapping[str, Sequence[str]], variables: Mapping[str, Any]) -> str:
        """The text of such a file."""
        ssh = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.directory / "key"),
            "ansible_ssh_common_args": "-o StrictHostKeyChecking=no"
            f" -o UserKnownHostsFile={self.directory}/known_hosts",
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        hosts = {name: {"ansible_host": self.addresses[name]} for name in self.guests}
        children = {group: {"hosts": dict.fromkeys(names)} for group, names in groups.items()}
        document = {"all": {"hosts": hosts, "vars": {**ssh, **variables}, "children": children}}
        return json.dumps(document, indent=1)

    def play(self, playbook: str, inventory: pathlib.Path, *arguments: str) -> Played:
        return self.wait(self.start(playbook, inventory, *arguments))

    def start(
        self, playbook: str, inventory: pathlib.Path, *arguments: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.tools / "bin/ansible-playbook"), "-i", str(inventory), *arguments,
             str(PLAYBOOKS / playbook)],
            cwd=ANSIBLE,
            env=ansible_environment(self.tools, self.directory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    @staticmethod
    def wait(process: subprocess.Popen[str]) -> Played:
        output, _ = process.communicate()
        return read_play(process.returncode, output)


def ansible_environment(tools: pathlib.Path, directory: pathlib.Path) -> dict[str, str]:
    """Nothing of this user's own Ansible; a fixed locale; facts and sockets in the directory."""
    return {
        "PATH": f"{tools}/bin:{host.SEARCH_PATH}",
        "HOME": str(directory),
        "LC_ALL": "C.UTF-8",
        "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
        "ANSIBLE_HOME": str(directory / "ansible"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_DEPRECATION_WARNINGS": "1",
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(directory / "cp"),
        "ANSIBLE_FORKS": "5",
        "ANSIBLE_LOG_PATH": str(directory / "ansible.log"),  # to see what a play that hangs does
    }


# What a host is made of as far as a playbook can change it; /var/lib/apt, logs, what Prometheus
# has scraped, the engines' caches (where the doctor tries to write) and the scopes of ssh sessions
# are not.
FINGERPRINT = """
find /etc /usr /opt /var/lib /var/cache -xdev \\( -path /var/lib/apt -o -path /var/cache/apt \
  -o -path /var/lib/systemd -o -path /var/lib/prometheus -o -path '/var/cache/llmux/*' \
  -o -path '*/__pycache__' \\) -prune -o -printf '%p %m %U:%G %y %s %T@\\n' \
  | grep -v '^/var/cache/ldconfig' | sed -E 's|^(/var/cache/llmux .*) [0-9.]+$|\\1|' | sort
dpkg-query -W
systemctl list-unit-files --no-legend | awk '$2 != "transient"'
"""


def fingerprints(hosts: Fleet) -> dict[str, str]:
    return {
        name: guest.run(["bash", "-c", FINGERPRINT]).stdout for name, guest in hosts.guests.items()
    }


def repacked(
    package: str,
    directory: pathlib.Path,
    change: Callable[[pathlib.Path], None] = lambda tree: None,
    suffix: str = "+next",
) -> str:
    """The same package under a later version, its files changed by ``change``."""
    directory.mkdir(exist_ok=True)
    tree, target = directory / "tree", directory / f"llmux_{suffix[1:]}_all.deb"
    subprocess.run(["dpkg-deb", "-R", package, str(tree)], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^(Version: .*)$", rf"\1{suffix}", control.read_text()))
    change(tree)
    pack = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-b", str(tree), str(target)]
    subprocess.run(pack, check=True, stdout=subprocess.DEVNULL)
    return str(target)


_RECAP = re.compile(r"^(\S+) +: (ok=\d+ .*)$", re.MULTILINE)
_TASK = re.compile(r"^(?:TASK|RUNNING HANDLER) \[(.*)\] \**$")


def read_play(status: int, output: str) -> Played:
    stats = {
        name: {key: int(value) for key, value in (pair.split("=") for pair in counters.split())}
        for name, counters in _RECAP.findall(output)
    }
    changed: dict[str, list[str]] = {name: [] for name in stats}
    task = ""
    for line in output.splitlines():
        if matched := _TASK.match(line):
            task = matched[1]
        elif matched := re.match(r"changed: \[([^\]]+?)(?: -> [^\]]+)?\]", line):
            changed.setdefault(matched[1], []).append(task)
    return Played(status, output, stats, changed)


def ansible_tools() -> pathlib.Path:
    return host.environment("ansible", TOOLS)


@contextlib.contextmanager
def fleet(
    suites: Mapping[str, str],
    directory: pathlib.Path,
    packages: Mapping[str, Sequence[str]],
    debs: Sequence[str] = (),
    downloads: Sequence[str] = (),
) -> Iterator[Fleet]:
    """Guests by name and suite, up and reachable over ssh as root with ``directory/key``.

    ``packages`` are Debian's that a guest has besides, since it cannot fetch any itself; ``debs``
    are files that all have; ``downloads`` are packages that lie, with what they need, in the
    guests' /var/cache/apt/archives, for a playbook to install.
    """
    tools = ansible_tools()
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / "key")], check=True
    )
    public = (directory / "key.pub").read_text()
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(_bridge())
        places = network.hosts()
        next(places)  # the bridge's own
        guests, addresses = {}, {}
        for name, suite in suites.items():
            guests[name] = stack.enter_context(
                Guest.up(f"{name}-{os.getpid()}", suite=suite, debs=debs)
            )
            addresses[name] = str(next(places))
            _connect(guests[name], f"{addresses[name]}/{network.prefixlen}")
        with ThreadPoolExecutor() as pool:
            furnish = (
                pool.submit(_serve_ssh, guest, public, packages.get(name, ()), downloads)
                for name, guest in guests.items()
            )
            for one in list(furnish):
                one.result()
        (directory / "cp").mkdir()
        yield Fleet(guests, addresses, directory, tools)


@contextlib.contextmanager
def _bridge() -> Iterator[ipaddress.IPv4Network]:
    present = json.loads(_ip("-json", "address", "show").stdout)
    for link in present:
        owner = BRIDGE.fullmatch(link["ifname"])
        if owner and not pathlib.Path(f"/proc/{owner[1]}").exists():
            _ip("link", "delete", link["ifname"])
    taken = [
        ipaddress.ip_interface(f"{one['local']}/{one['prefixlen']}").network
        for link in json.loads(_ip("-json", "-4", "address", "show").stdout)
        for one in link.get("addr_info", ())
    ]
    free = NETWORKS.subnets(new_prefix=24)
    network = next(one for one in free if not any(one.overlaps(other) for other in taken))
    name = f"llab{os.getpid()}"
    _ip("link", "add", name, "type", "bridge")
    try:
        _ip("address", "add", f"{next(network.hosts())}/{network.prefixlen}", "dev", name)
        _ip("link", "set", name, "up")
        yield network
    finally:
        _ip("link", "delete", name)


def _connect(guest: Guest, address: str) -> None:
    """The guest's network interface: one end here at the bridge, the other in its namespace."""
    end = f"lv{guest.pid1}"
    pair = ("link", "add", end, "type", "veth", "peer", "name", "lan0", "netns", str(guest.pid1))
    _ip(*pair)
    _ip("link", "set", end, "master", f"llab{os.getpid()}", "up")
    inside = ["nsenter", "-t", str(guest.pid1), "-n", "--", "ip"]
    subprocess.run([*inside, "address", "add", address, "dev", "lan0"], check=True)
    subprocess.run([*inside, "link", "set", "lan0", "up"], check=True)


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=True, text=True, stdout=subprocess.PIPE)


def _serve_ssh(
    guest: Guest, public_key: str, more: Sequence[str], downloads: Sequence[str]
) -> None:
    """Debian's own sshd; apt runs in the guest's mounts with the network of this host. Its lists
    stay: they are new enough, so that nothing fetches others."""
    guest.write("/root/.ssh/authorized_keys", public_key, mode=0o600)
    (guest.root / "root/.ssh").chmod(0o700)
    guest.write("/etc/resolv.conf", pathlib.Path("/etc/resolv.conf").read_bytes())
    enter = ["nsenter", "-t", str(guest.pid1), "-m", "-u", "-i", "-p", "-r", "-w", "--"]
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y",
           "-o", "Acquire::Check-Valid-Until=false"]  # fmt: skip
    # python3-apt: Ansible would fetch it itself, but not from where a guest is
    packages = ["openssh-server", "python3-apt", *more]
    install = ["--no-install-recommends", "install"]
    orders = [["update"], [*install, *packages]]
    orders += [[*install, "--download-only", *downloads]] if downloads else []
    for words in orders:
        host.run_logged(
            [*enter, *apt, *words],
            what=f"installing sshd in {guest.name}",
            environment={**host.clean_environment(), **_proxies()},
        )
    guest.run(["systemctl", "restart", "ssh"])  # Type=notify: it listens when this returns


def _proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
