"""The playbooks over ssh, from this host against fresh guests: what an operator's first day does.

One of the hosts has the front end as well. Two guests, one of each Debian; with
``LLMUX_FLEET_GUESTS=4`` three of Debian 13 and one of Debian 12. ``LLMUX_FLEET_LOAD=200,50,2``:
that many streams at once, short requests a second, and tokens a second, while a roll goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fleet import Fleet, Played, fingerprints, fleet, repacked
from llmux_guest import LOAD, STANDIN, Guest

COUNT = int(os.environ.get("LLMUX_FLEET_GUESTS", "2"))
SUITES = {f"gpu{number}": "trixie" for number in range(1, COUNT)} | {"old": "bookworm"}
FRONT, FRONT_PORT = "gpu1", 8080
STREAMS, RATE, PACE = map(int, os.environ.get("LLMUX_FLEET_LOAD", "20,5,20").split(","))
FAULTS = "/var/tmp/broken.faults"
MODELS = ("alpha", "beta", "gamma", "delta", "epsilon")

pytestmark = [
    pytest.mark.system,
    pytest.mark.fleet,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start guests with ssh"),
    # The first run makes the environment with Ansible, and images; a play takes minutes on each.
    pytest.mark.timeout(900 + 900 * COUNT),
]


def variables(package: str, **more: Any) -> dict[str, Any]:
    return {
        "llmux_deb": package,
        # what guests without a GPU and with the stand-in engine cannot have
        "llmux_require_gpu": False,
        "llmux_min_memory_mb": 1024,
        "llmux_criu": "ignore",
        "llmux_config": {
            "vllm_command": [STANDIN],
            "metrics_port": 0,
            "policy": {"min_active_secs": 0},
            "gateway": {"listen": ["0.0.0.0:3000"], "allow_public_without_keys": True},
        },
        "llmux_models": {"alpha": model(), "beta": model()},
        "llmux_models__second": {name: model() for name in MODELS[2:]},
        "llmux_frontend_listen": [f"*:{FRONT_PORT}"],
        **more,
    }


def model(**env: str) -> dict[str, Any]:
    """All five fit together. Tokens come at a pace, so that streams last."""
    env = {"STANDIN_TOKENS_PER_SEC": str(PACE), **env}
    return {
        "model_path": "lab/tiny",
        "eviction": "offload+keep_running",
        "gpu_memory": 0.15,
        "env": env,
    }


@dataclasses.dataclass
class Deployed:
    """A fleet on which site.yml ran, and what was seen until then. ``touched`` by a test since."""

    fleet: Fleet
    package: str
    before: Mapping[str, str] | None = None
    after_check: Mapping[str, str] | None = None
    check: Played | None = None
    second: Played | None = None
    touched: bool = False

    def inventory(self, **more: Any) -> pathlib.Path:
        self.touched = True
        return inventory(self.fleet, self.package, **more)

    def restore(self) -> None:
        if self.touched:
            self.fleet.play("site.yml", self.inventory()).assert_ok()
            self.touched = False


def inventory(hosts: Fleet, package: str, **more: Any) -> pathlib.Path:
    groups = {"llmux": list(hosts.guests), "llmux_frontend": [FRONT]}
    return hosts.inventory(groups, variables(package, **more))


@pytest.fixture(scope="module")
def deployed(
    package: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Deployed]:
    packages = {FRONT: ["haproxy"]}
    # A play takes a minute: none is made that no test of this run looks at.
    wanted = {item.name for item in request.session.items}
    with fleet(SUITES, tmp_path_factory.mktemp("fleet"), packages) as hosts:
        file = inventory(hosts, package)
        found = Deployed(hosts, package)
        if test_a_check_of_a_fresh_host_reports_and_changes_nothing.__name__ in wanted:
            found.before = fingerprints(hosts)
            found.check = hosts.play("site.yml", file, "--check", "--diff")
            found.after_check = fingerprints(hosts)
        hosts.play("site.yml", file).assert_ok()
        if test_the_second_run_changes_nothing.__name__ in wanted:
            found.second = hosts.play("site.yml", file, "--diff").assert_ok()
        yield found


def ask(guest: Guest, name: str) -> dict[str, Any]:
    body = {"model": name, "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
    done = guest.run(
        ["curl", "-sS", "-m", "60", "-H", "content-type: application/json", "-d", json.dumps(body),
         "http://127.0.0.1:3000/v1/chat/completions"]
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def version(guest: Guest) -> str:
    return guest.run(["dpkg-query", "-W", "llmux"]).stdout.split()[1]


# ---- site.yml ------------------------------------------------------------------------------------


def test_a_check_of_a_fresh_host_reports_and_changes_nothing(deployed: Deployed) -> None:
    assert deployed.check and deployed.before and deployed.after_check
    deployed.check.assert_ok()
    for name in SUITES:
        assert deployed.check.stats[name]["changed"] >= 5, deployed.check.output
        assert deployed.after_check[name] == deployed.before[name]
    assert "would install llmux_" in deployed.check.output
    assert f"would configure {', '.join(MODELS)}" in deployed.check.output
    assert "allow_public_without_keys: true" in deployed.check.output


def test_every_fresh_host_serves_every_model(deployed: Deployed) -> None:
    for guest in deployed.fleet.guests.values():
        for name in MODELS:
            assert ask(guest, name)["choices"][0]["message"]["content"].startswith(name)
        modes = guest.run(["stat", "-c", "%a %U:%G", "/etc/llmux/config.yaml"]).stdout.strip()
        assert modes == "640 root:llmux"


def test_the_second_run_changes_nothing(deployed: Deployed) -> None:
    assert deployed.second is not None
    assert deployed.second.changed == {name: [] for name in SUITES}
    assert {stats["changed"] for stats in deployed.second.stats.values()} == {0}


def test_a_configuration_with_a_mistake_stops_before_it_is_written(deployed: Deployed) -> None:
    guest = next(iter(deployed.fleet.guests.values()))
    deployed.restore()
    before = guest.read("/etc/llmux/config.yaml")
    config = {**variables("")["llmux_config"], "policy": {"min_active_sec": 0}}
    played = deployed.fleet.play("site.yml", deployed.inventory(llmux_config=config))
    assert played.status != 0
    assert 'did you mean "min_active_secs"?' in played.output
    assert guest.read("/etc/llmux/config.yaml") == before
    assert ask(guest, "alpha")["choices"]
    deployed.touched = False


def test_secrets_have_their_modes_and_are_not_shown(
    deployed: Deployed, tmp_path: pathlib.Path
) -> None:
    key = {"name": "ci", "sha256": ("5ec3e7" * 11)[:64]}
    (tmp_path / "keys").write_text(json.dumps(key) + "\n")
    file = deployed.inventory(llmux_keys_src=str(tmp_path / "keys"))
    only = ("--tags", "llmux_configure,llmux_run", "--limit", "old", "--diff", "-vv")
    played = deployed.fleet.play("site.yml", file, *only).assert_ok()
    assert "5ec3e7" not in played.output
    guest = deployed.fleet.guests["old"]
    shown = guest.run(["stat", "-c", "%a %U:%G", "/etc/llmux/keys"]).stdout.strip()
    assert shown == "640 root:llmux"
    assert "error" in ask(guest, "alpha")  # it has no key: the gateway was restarted
    deployed.restore()
    assert ask(guest, "alpha")["choices"]


# ---- models.yml, status.yml ----------------------------------------------------------------------


def test_a_model_comes_and_goes_and_the_others_notice_nothing(deployed: Deployed) -> None:
    deployed.restore()
    guests = deployed.fleet.guests
    for guest in guests.values():
        ask(guest, "alpha")
    engines = {name: engine(guest, "alpha") for name, guest in guests.items()}
    # another change of the inventory is not what was asked for
    changed = {"new": model(), "alpha": {**model(), "eviction": "retain+stop"}}
    only = ("-e", json.dumps({"llmux_models_only": ["new"]}))
    more = deployed.inventory(llmux_models__third=changed)
    deployed.fleet.play("models.yml", more, *only).assert_ok()
    for name, guest in guests.items():
        assert ask(guest, "new")["choices"]
        assert engine(guest, "alpha") == engines[name]
    again = deployed.fleet.play("models.yml", more, *only).assert_ok()
    assert {stats["changed"] for stats in again.stats.values()} == {0}
    deployed.fleet.play("models.yml", deployed.inventory(), *only).assert_ok()
    for name, guest in guests.items():
        assert sorted(processes(guest)) == sorted(MODELS)
        assert engine(guest, "alpha") == engines[name]
    deployed.touched = False


def processes(guest: Guest) -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = json.loads(guest.run(["llmux", "ps", "--json"]).stdout)
    return models


def engine(guest: Guest, name: str) -> tuple[int, str]:
    """The engine's process and how it is to be parked."""
    shown = processes(guest)[name]
    return shown["pid"], shown["eviction"]


def test_one_table_shows_every_host(deployed: Deployed) -> None:
    deployed.restore()
    for guest in deployed.fleet.guests.values():
        ask(guest, "beta")
    played = deployed.fleet.play("status.yml", deployed.inventory()).assert_ok()
    deployed.touched = False
    print(played.output)
    for name, guest in deployed.fleet.guests.items():
        row = rf"(?m)^ +{name} +{re.escape(version(guest))} +5 .*beta serving"
        assert re.search(row, played.output), played.output


# ---- rolling_upgrade.yml -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def newer(package: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same package under a later version."""
    return repacked(package, tmp_path_factory.mktemp("newer"))


@pytest.fixture(scope="module")
def stricter(package: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A later version that does not know the key ``warmup`` any more."""

    def forget(tree: pathlib.Path) -> None:
        keys = tree / "usr/lib/llmux/llmux/config/keys.py"
        text = keys.read_text()
        assert '"warmup": parse.boolean,' in text
        keys.write_text(text.replace('"warmup": parse.boolean,', ""))

    return repacked(package, tmp_path_factory.mktemp("stricter"), forget)


@contextlib.contextmanager
def load(front: Guest) -> Iterator[dict[str, Any]]:
    """Requests through the front end while it lasts; then what became of them."""
    said: dict[str, Any] = {}
    running = front.popen(
        ["python3", f"{LOAD}/steady.py", f"--port={FRONT_PORT}", f"--streams={STREAMS}",
         f"--rate={RATE}", *MODELS],
        properties=["Nice=-10"],  # else it measures itself on a busy machine
        stdin=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield said
        output, errors = running.process.communicate(timeout=300)  # its input ends
        assert running.process.returncode == 0, errors
        said.update(json.loads(output))
    finally:
        running.stop()
    print(f"load: {said}")


def drained(front: Guest) -> set[str]:
    """The hosts that the front end sends nothing new."""
    script = "echo show servers state llmux | socat - /run/haproxy/admin.sock"
    rows = [line.split() for line in front.run(["sh", "-c", script]).stdout.splitlines()[2:]]
    return {row[3] for row in rows if row and int(row[6]) & 8}


def test_a_roll_brings_every_host_to_the_new_version(deployed: Deployed, newer: str) -> None:
    deployed.restore()
    guests = deployed.fleet.guests
    with load(guests[FRONT]) as report:
        played = deployed.fleet.play("rolling_upgrade.yml", deployed.inventory(llmux_deb=newer))
    played.assert_ok()
    assert {version(guest)[-5:] for guest in guests.values()} == {"+next"}
    assert played.output.count("PLAY [Upgrade one batch]") == len(guests)
    assert drained(guests[FRONT]) == set()
    assert report["failed"] == 0, report
    assert report["stream"] > 0
    assert report["short"] > 0


@pytest.mark.parametrize("fault", ["engine", "configuration"])
def test_a_host_that_does_not_serve_stops_the_roll(
    deployed: Deployed, newer: str, stricter: str, fault: str
) -> None:
    deployed.restore()
    if fault == "engine":
        for guest in deployed.fleet.guests.values():
            guest.write(FAULTS, '{"die_at_start": true}')
        broken = {"broken": model(STANDIN_FAULTS=FAULTS)}
        change = {"llmux_deb": newer, "llmux_gate_model": "broken", "llmux_models__third": broken}
    else:
        config = {**variables("")["llmux_config"], "warmup": False}
        deployed.fleet.play("site.yml", deployed.inventory(llmux_config=config)).assert_ok()
        change = {"llmux_deb": stricter, "llmux_config": config}
    first, *others = deployed.fleet.guests
    front = deployed.fleet.guests[FRONT]
    with load(front) as report:
        played = deployed.fleet.play("rolling_upgrade.yml", deployed.inventory(**change))
    assert played.status != 0
    assert f"{first} does not serve and is left drained" in played.output
    assert played.output.count("PLAY [Upgrade one batch]") == 1
    assert version(deployed.fleet.guests[first]).endswith("+next")
    assert not any(version(deployed.fleet.guests[name]).endswith("+next") for name in others)
    assert drained(front) == {first}
    assert report["failed"] == 0, report
    # what was wrong is put right: the same playbook brings the host back
    deployed.fleet.play("rolling_upgrade.yml", deployed.inventory(), "--limit", first).assert_ok()
    deployed.touched = False
    assert drained(front) == set()
