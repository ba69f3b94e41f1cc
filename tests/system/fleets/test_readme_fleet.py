"""README's "A fleet in ten minutes": each of its commands, as it is written there, from a clean
checkout against two fresh guests. What an operator writes with an editor is written by the test."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import yaml
from fleet import Fleet, ansible_environment, fleet
from llmux_guest import GPU, LEDGER, ROOT, STANDIN, SUPERVISOR, Guest, host

README = (ROOT / "README.md").read_text()
SECTION = README.partition("## A fleet in ten minutes\n")[2].partition("\n## ")[0]
BLOCKS = [
    [line.strip() for line in block.splitlines()]
    for block in re.findall(r"(?:^    \S.*\n)+", SECTION, re.MULTILINE)
]
SETUP, LATER, IMAGES, PROXY = BLOCKS
# What the shell of the first block still has when the next ones are typed.
SHELL = [line for line in SETUP if re.match(r"export |\. |cd ", line)]
MODEL = "qwen3-4b"

pytestmark = [
    pytest.mark.system,
    pytest.mark.fleet,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start guests with ssh"),
    pytest.mark.timeout(1800),  # the first run makes the environment with Ansible, and images
]

# What guests without a GPU and with the stand-in engine need besides.
LAB = {
    "llmux_vllm_version": "",
    "llmux_require_gpu": False,
    "llmux_min_memory_mb": 1024,
    "llmux_criu": "ignore",
    "llmux_doctor_accept": ["NVIDIA driver", "libcuda", "GPUs"],
    "llmux_unit_drop_ins": {
        SUPERVISOR: f"[Service]\nEnvironment=LLMUX_GPU_LEDGER={LEDGER} STANDIN_LEDGER={LEDGER}\n"
    },
    "llmux_frontend_listen": ["*:8080"],
    "llmux_frontend_key_src": "{{ inventory_dir }}/probe-key",
}
LAB_CONFIG = {
    "vllm_command": [STANDIN],
    "engine_user": "root",  # in a container CRIU cannot dump the processes of another user
    "metrics_port": 0,
    "policy": {"min_active_secs": 0},
}


@dataclass
class Day:
    """An operator's: a clean checkout, a fleet, and a shell in the checkout."""

    fleet: Fleet
    checkout: pathlib.Path
    said: str = ""  # while the first block was typed

    def type(self, *lines: str) -> str:
        """What those lines say, typed one after the other into a new shell; each must succeed."""
        environment = ansible_environment(self.fleet.tools, self.fleet.directory)
        del environment["ANSIBLE_CONFIG"]  # the checkout has its own
        environment["PATH"] = f"{self.fleet.directory}/bin:{environment['PATH']}"
        environment["LLMUX_CACHE"] = str(host.cache_dir())
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", "\n".join(map(shown, lines))],
            cwd=self.checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout[-20000:])
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    @property
    def key(self) -> str:
        return (self.checkout / "ansible/inventory/probe-key").read_text().strip()


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    directory = tmp_path_factory.mktemp("day")
    checkout = directory / "llmux"
    check_out(checkout)
    # alike, since images go from one to the other
    haproxy = {"gpu1": ["haproxy"], "gpu2": ["haproxy"]}
    with fleet({"gpu1": "trixie", "gpu2": "trixie"}, directory, haproxy) as hosts:
        introduce(hosts)
        write_editor(hosts, checkout)
        day = Day(hosts, checkout)
        day.said = day.type(*SETUP)
        yield day


def shown(line: str) -> str:
    return f"echo {shlex.quote('$ ' + line)}\n{line}"


def check_out(directory: pathlib.Path) -> None:
    """The tree as it is, without what git ignores."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    done = subprocess.run(
        [*listed, "--exclude-standard"], stdout=subprocess.PIPE, text=True, check=True
    )
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name, follow_symlinks=False)


def introduce(hosts: Fleet) -> None:
    """The first host may order llmux on the second one over ssh, and knows it by its name."""
    for guest in hosts.guests.values():
        guest.run(["install", "-d", "-m", "0777", GPU])
    one = hosts.guests["gpu1"]
    one.write("/root/.ssh/id_ed25519", (hosts.directory / "key").read_bytes(), mode=0o600)
    one.write("/root/.ssh/config", "StrictHostKeyChecking accept-new\n", mode=0o600)
    one.run(["sh", "-c", f"echo {hosts.addresses['gpu2']} gpu2 >> /etc/hosts"])
    one.run(["install", "-d", "-m", "0700", "/srv/images"])


def write_editor(hosts: Fleet, checkout: pathlib.Path) -> None:
    """The command ``editor``: it writes what the operator of these guests has to write."""
    example = checkout / "ansible/inventory.example"
    edited = hosts.directory / "edited"
    edited.mkdir()
    groups = {"llmux": ["gpu1", "gpu2"], "h100": ["gpu2"], "llmux_frontend": ["gpu1"]}
    (edited / "hosts.yml").write_text(hosts.hosts(groups, {}))
    for file in (example / "group_vars").glob("*.yml"):
        values = yaml.safe_load(file.read_text())
        for models in (values[name] for name in values if name.startswith("llmux_models")):
            for model in models.values():
                model["model_path"] = "lab/tiny"
        if file.name == "llmux.yml":
            values |= LAB
            values["llmux_config"] |= LAB_CONFIG
            values["llmux_models"][MODEL]["eviction"] = "discard+checkpoint"
        (edited / file.name).write_text(json.dumps(values, indent=1))
    program = hosts.directory / "bin/editor"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nfor file; do cp {edited}/"${{file##*/}}" "$file"; done\n')
    program.chmod(0o755)


def changes(said: str) -> dict[str, int]:
    """host → how much the last play of those lines changed there."""
    return {name: int(n) for name, n in re.findall(r"(?m)^(\S+) +: ok=\d+ +changed=(\d+)", said)}


def ask(guest: Guest, port: int, key: str) -> str:
    body = json.dumps({"model": MODEL, "prompt": "hello", "max_tokens": 4})
    done = guest.run(
        ["curl", "-sS", "-m", "60", "-H", f"authorization: Bearer {key}",
         "-H", "content-type: application/json", "-d", body,
         f"http://127.0.0.1:{port}/v1/completions"]
    )  # fmt: skip
    text: str = json.loads(done.stdout)["choices"][0]["text"]
    return text


def states(guest: Guest) -> list[str]:
    done = guest.run(["llmux", "checkpoint", "--list", "--json"])
    return [row["state"] for row in json.loads(done.stdout) if row["model"] == MODEL]


def test_bare_hosts_serve_in_ten_minutes(day: Day) -> None:
    table = day.said.rpartition("TASK [Print it]")[2]
    for name, guest in day.fleet.guests.items():
        assert re.search(rf"(?m)^ +{name} +\d", table), table
        assert ask(guest, 3000, day.key)
    assert ask(day.fleet.guests["gpu1"], 8080, day.key), "through the proxy"
    again = changes(day.type(*SHELL, "ansible-playbook playbooks/site.yml"))
    assert again == {"gpu1": 0, "gpu2": 0}


def test_models_images_and_a_roll(day: Day) -> None:
    for line in LATER:
        said = day.type(*SHELL, line)
        assert set(changes(said)) == {"gpu1", "gpu2"}, line
    for guest in day.fleet.guests.values():
        assert ask(guest, 3000, day.key)


def test_an_image_is_copied_each_way(day: Day) -> None:
    day.type(*SHELL, *(line for line in LATER if "checkpoint.yml" in line))
    one, two = day.fleet.guests["gpu1"], day.fleet.guests["gpu2"]
    assert states(one) == ["valid"]
    for line in IMAGES:
        two.run(["llmux", "images", "rm", MODEL])
        assert states(two) == []
        command = re.sub(r"\bM\b", MODEL, line)
        if "/srv/images;" in command:  # a directory that both hosts have
            export, load = command.split("; ")
            one.run(["bash", "-e", "-c", export])
            one.run(["bash", "-e", "-c", f"scp -q -r /srv/images gpu2:/srv/; ssh gpu2 {load}"])
        else:
            done = one.run(["bash", "-e", "-o", "pipefail", "-c", command], check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        assert states(two) == ["valid"], line


def test_the_proxy_is_asked_and_ordered(day: Day) -> None:
    front = day.fleet.guests["gpu1"]
    show, drain = (line.replace("HOST", "gpu2") for line in PROXY)
    assert re.search(rf"(?m)^{MODEL}\t.*gpu2=", front.run(["bash", "-c", show]).stdout)
    ready = drain.replace("state drain", "state ready")
    state = "echo show servers state llmux | socat - /run/haproxy/admin.sock"
    try:
        assert front.run(["bash", "-c", drain]).stdout.strip() == ""
        assert drained(front.run(["bash", "-c", state]).stdout) == {"gpu2"}
    finally:
        assert front.run(["bash", "-c", ready]).stdout.strip() == ""
    assert drained(front.run(["bash", "-c", state]).stdout) == set()


def drained(table: str) -> set[str]:
    """Of HAProxy's table of servers, those that get nothing new."""
    rows = [line.split() for line in table.splitlines()[2:]]
    return {row[3] for row in rows if row and int(row[6]) & 8}
