"""What the roles do with one host: refuse it, install a pinned version from an apt repository, make
vLLM's environment from a directory of wheels, and watch what runs.

One guest, and Ansible over ssh as an operator runs it. apt there has no index at first, as on a
cloud's image; its sources are the site's mirror of Debian and a signed repository with three
versions of llmux, both on this host. ``LLMUX_ROLES_SUITE=noble`` takes a guest with Ubuntu.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import lacking
import pytest
from fleet import ANSIBLE, Fleet, Played, fingerprints, fleet, repacked
from llmux_guest import Guest
from supply import publish, scan, served, version_of, wheel

SUITE = os.environ.get("LLMUX_ROLES_SUITE", "trixie")
HOST = "gpu1"
WHEELS = "/srv/wheels"
METRICS = 9400  # not 9090, which is Prometheus's own
MODELS = ("alpha", "beta")
PROVISIONING = "/etc/grafana/provisioning"
NEW = ("0.1", "0.2")  # versions of vLLM's stand-in
RULES = 14

pytestmark = [
    pytest.mark.system,
    pytest.mark.fleet,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start a guest with ssh"),
    # The first run makes the environment with Ansible, and the guest's image.
    pytest.mark.timeout(2400),
]

# Grafana is not Debian's: what the role needs of it is a directory and a unit.
GRAFANA = "[Service]\nExecStart=/usr/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"


# What the engine of alpha, if it has one, was told by the vLLM that it was started by.
PID = (
    'llmux ps --json | python3 -c \'import json, sys; print(json.load(sys.stdin)["alpha"]["pid"])\''
)
ENGINE = f"tr '\\0' '\\n' < /proc/$({PID})/environ | grep ^LAB_VLLM || true"


@dataclass
class Story:
    """What was played, in this order, and what the host was like after each."""

    hosts: Fleet
    versions: tuple[str, str, str]  # the one wanted at first, a newer one, the one wanted later
    played: dict[str, Played] = field(default_factory=dict)
    before: dict[str, Mapping[str, str]] = field(default_factory=dict)
    after: dict[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def guest(self) -> Guest:
        return self.hosts.guests[HOST]

    def play(
        self, what: str, inventory: pathlib.Path, *arguments: str, playbook: str = "site.yml"
    ) -> Played:
        self.before[what] = self.look()
        began = time.monotonic()
        played = self.hosts.play(playbook, inventory, *arguments)
        print(f"{what}: {time.monotonic() - began:.0f} s\n{played.output}")
        self.played[what], self.after[what] = played, self.look()
        return played

    def differences(self, what: str) -> list[str]:
        """The lines that the play has changed of what the host was like."""
        before, after = self.before[what], self.after[what]
        return [
            f"{sign} {key}: {line}"
            for key in before
            for sign, one, other in (("-", before, after), ("+", after, before))
            for line in one[key].splitlines()
            if line not in other[key].splitlines()
        ]

    def look(self) -> Mapping[str, str]:
        return {
            "files": fingerprints(self.hosts)[HOST],
            "llmux": self.ask("dpkg-query -W llmux | cut -f2"),
            "vllm": self.ask("/opt/vllm/current/bin/vllm --version || true"),
            "models": self.ask("llmux ps --json | grep -o '\"pid\": [0-9]*' || true"),
            "engine": self.ask(ENGINE),
        }

    def ask(self, script: str) -> str:
        return self.guest.run(["bash", "-c", f"{{ {script}; }} 2>/dev/null"]).stdout.strip()


# ---- the host and its repository -----------------------------------------------------------------


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    directory = tmp_path_factory.mktemp("roles")
    downloads = ["prometheus", "python3-venv"]
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(fleet({HOST: SUITE}, directory, {}, downloads=downloads))
        guest = hosts.guests[HOST]
        lacking.prepare(guest)
        site, repository = directory / "served/debian", directory / "served/llmux"
        for part in (site, repository / "pool"):
            part.mkdir(parents=True)
        for archive in (guest.root / "var/cache/apt/archives").glob("*.deb"):
            shutil.move(archive, site)
        scan(site)
        first = publish(repository)
        newer = repacked(first, directory / "newer", suffix="+newer")
        shutil.copy(newer, repository / "pool")
        publish(repository)
        url = stack.enter_context(served(directory / "served", bridge(hosts)))
        guest.run(["sh", "-c", "rm -r /etc/apt/sources.list* /var/lib/apt/lists/*"])
        source = f"Types: deb\nURIs: {url}debian/\nSuites: ./\nTrusted: yes\n"
        guest.write("/etc/apt/sources.list.d/site.sources", source)
        for version in NEW:
            guest.write(f"{WHEELS}/vllm-{version}-py3-none-any.whl", wheel(version))
        guest.run(["install", "-d", f"{PROVISIONING}/dashboards"])
        guest.write("/etc/systemd/system/grafana-server.service", GRAFANA)
        guest.run(["systemctl", "daemon-reload"])
        wanted = version_of(first)
        story = Story(hosts, (wanted, version_of(newer), f"{wanted}+other"))
        tell(story, functools.partial(variables, f"{url}llmux/", repository), first, repository)
        yield story


def tell(
    story: Story, values: Callable[..., dict[str, Any]], first: str, repository: pathlib.Path
) -> None:
    hosts, (wanted, _, later) = story.hosts, story.versions
    groups = {"llmux": [HOST], "llmux_monitoring": [HOST]}
    story.play("refused", named(hosts, FAULTY, values(wanted)), "--tags", "llmux_preflight")
    releases: dict[str, dict[str, Any]] = {"noble": {}, "resolute": {}}
    story.play("checked", named(hosts, releases, values(wanted)), "--check", "--diff")
    inventory = hosts.inventory(groups, values(wanted))
    story.play("installed", inventory)
    story.play("again", inventory, "--diff")
    # Of this one the host's apt has not heard when it is asked what would change.
    other = repacked(first, hosts.directory / "other", suffix="+other")
    shutil.copy(other, repository / "pool")
    publish(repository)
    inventory = hosts.inventory(groups, values(later, llmux_vllm_version=NEW[1]))
    complete(story)  # an engine of the former vLLM, which outlives the upgrade of llmux
    story.play("checked again", inventory, "--check", "--diff")
    story.play("upgraded", inventory, "--diff", playbook="rolling_upgrade.yml")


def variables(url: str, repository: pathlib.Path, version: str, **more: Any) -> dict[str, Any]:
    return {
        "llmux_apt_uris": [url],
        "llmux_apt_suites": ["./"],
        "llmux_apt_key": str(repository / "llmux.asc"),
        "llmux_version": version,
        # what guests without a GPU and with the stand-in engine cannot have
        "llmux_require_gpu": False,
        "llmux_min_memory_mb": 1024,
        "llmux_min_disk_mb": 100,
        "llmux_vllm_version": NEW[0],
        "llmux_vllm_wheels": WHEELS,
        "llmux_config": {
            "vllm_command": "/opt/vllm/current/bin/vllm",
            "gateway": {
                "listen": ["0.0.0.0:3000"],
                "allow_public_without_keys": True,
                "metrics_listen": f"0.0.0.0:{METRICS}",
            },
        },
        "llmux_models": {name: {"model_path": "lab/tiny", "gpu_memory": 0.3} for name in MODELS},
        "llmux_monitoring_port": METRICS,
        "llmux_monitoring_node_port": 0,
        "llmux_monitoring_scrape_interval": "1s",
        "llmux_monitoring_alertmanagers": ["127.0.0.1:9093"],
        "llmux_monitoring_grafana_provisioning": PROVISIONING,
        **more,
    }


def named(
    hosts: Fleet, names: Mapping[str, Mapping[str, Any]], values: dict[str, Any]
) -> pathlib.Path:
    """An inventory in which the guest has these names besides, each with its fault."""
    groups = {"llmux": [HOST, *names], "llmux_monitoring": [HOST, *names]}
    document = json.loads(hosts.hosts(groups, values))
    for name, own in names.items():
        document["all"]["hosts"][name] = {
            "ansible_host": hosts.addresses[HOST],
            "ansible_python_interpreter": lacking.interpreter(name),
            **own,
        }
    path = hosts.directory / "named.json"
    path.write_text(json.dumps(document, indent=1))
    return path


def bridge(hosts: Fleet) -> str:
    """The address of this host on the fleet's network."""
    return hosts.addresses[HOST].rpartition(".")[0] + ".1"


# ---- what is refused -----------------------------------------------------------------------------

CHECKPOINT = {
    "llmux_models": {"alpha": {"model_path": "lab/tiny", "eviction": "retain+checkpoint"}}
}
# name → its variables; what it is refused for, and the remedy
FAULTY: Mapping[str, Mapping[str, Any]] = {
    "old-systemd": {},
    "no-cgroup": {},
    "no-memory": {"llmux_min_memory_mb": 16384},
    "no-disk": {"llmux_min_disk_mb": 20480},
    "no-driver": {"llmux_require_gpu": True},
    "old-driver": {"llmux_require_gpu": True},
    "no-criu": {"llmux_criu": "ignore", **CHECKPOINT},
}
REFUSALS = {
    "old-systemd": ("systemd 247", "use a release with systemd 252 or later"),
    "no-cgroup": ("no unified cgroup hierarchy", "systemd.unified_cgroup_hierarchy=1"),
    "no-memory": ("2048 MiB of memory, 16384 are wanted", "lower llmux_min_memory_mb"),
    "no-disk": ("8 MiB free where images are kept, 20480 are wanted", "images_dir"),
    "no-driver": ("NVIDIA driver not loaded", "install a driver >= 570"),
    "old-driver": ("NVIDIA driver 535", "install a driver >= 570"),
    "no-criu": ("alpha would be parked with checkpoint, and CRIU is not there", "install CRIU"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_what_a_host_lacks_is_named_with_the_remedy(story: Story, name: str) -> None:
    played = story.played["refused"]
    assert played.stats[name]["failed"] == 1, played.output
    said = played.output.partition(f"fatal: [{name}]: FAILED!")[2].partition("\n\n")[0]
    for words in ("cannot install llmux", "next step:", *REFUSALS[name]):
        assert words in " ".join(said.split()), said


def test_a_host_that_lacks_nothing_is_not_refused(story: Story) -> None:
    assert story.played["refused"].stats[HOST]["failed"] == 0


# ---- a fresh host --------------------------------------------------------------------------------


def test_a_check_of_a_fresh_host_says_what_would_be_done_and_does_nothing(story: Story) -> None:
    played = story.played["checked"].assert_ok()
    assert story.differences("checked") == []
    for words in (
        f"would install llmux {story.versions[0]} from http://",
        "would configure alpha, beta",
        "would enable and start llmux",
        "would install python3-venv",
        "would install prometheus",
    ):
        assert words in played.output
    wanted = {
        "Make the virtual environment",
        "Make this version the current one",
        "Write the alerts",
        "Write the dashboard",
    }
    assert wanted <= {task.partition(" : ")[2] for task in played.changed[HOST]}


@pytest.mark.parametrize("release", ["noble", "resolute"])
def test_ubuntu_is_treated_as_debian_is(story: Story, release: str) -> None:
    """By the facts of a host: its release is only the name of a suite, where none is given."""
    played = story.played["checked"].assert_ok()
    assert played.changed[release] == played.changed[HOST]
    assert played.stats[release] == played.stats[HOST]


# ---- llmux from a repository ---------------------------------------------------------------------


def test_the_pinned_version_is_installed_though_a_newer_one_is_there(story: Story) -> None:
    story.played["installed"].assert_ok()
    wanted, newer, _ = story.versions
    assert story.after["installed"]["llmux"] == wanted
    assert newer in story.ask("apt-cache madison llmux")
    assert set(json.loads(story.ask("llmux ps --json"))) == set(MODELS)


def test_a_second_run_changes_nothing(story: Story) -> None:
    again = story.played["again"].assert_ok()
    assert again.changed == {HOST: []}, again.output
    assert story.differences("again") == []


def test_a_check_of_an_upgrade_says_it_and_does_nothing(story: Story) -> None:
    played = story.played["checked again"].assert_ok()
    assert story.differences("checked again") == []
    assert f"would install llmux {story.versions[2]}" in played.output
    assert {task.partition(" : ")[2] for task in played.changed[HOST]} >= {
        "Make the virtual environment",
        "Make this version the current one",
        "Pin the version",
    }


def test_a_later_pin_upgrades(story: Story) -> None:
    played = story.played["upgraded"].assert_ok()
    assert story.after["upgraded"]["llmux"] == story.versions[2]
    assert played.stats[HOST]["failed"] == 0


# ---- vLLM from wheels ----------------------------------------------------------------------------


def test_vllm_is_of_the_pinned_version_and_serves(story: Story) -> None:
    assert [story.after[what]["vllm"] for what in ("installed", "upgraded")] == list(NEW)
    # The one of before is kept, for engines that may run from it.
    assert story.ask("ls /opt/vllm").split() == [*NEW, "current"]
    assert story.after["upgraded"]["engine"] == f"LAB_VLLM={NEW[1]}"
    assert complete(story)["choices"]


def complete(story: Story) -> dict[str, Any]:
    body = json.dumps({"model": "alpha", "prompt": "hello", "max_tokens": 4})
    asked = f"curl -sS -m 120 -d '{body}' -H 'content-type: application/json'"
    answer: dict[str, Any] = json.loads(story.ask(f"{asked} http://127.0.0.1:3000/v1/completions"))
    return answer


# ---- monitoring ----------------------------------------------------------------------------------


def test_prometheus_takes_the_configuration_and_scrapes_llmux(story: Story) -> None:
    said = story.ask("promtool check config /etc/prometheus/prometheus.yml 2>&1")
    assert f"{RULES} rules found" in said, said
    for query in ('up{job="llmux"} == 1', "llmux_build_info", 'llmux_model_state{model="beta"}'):
        rows = until(functools.partial(rows_of, story, query), query)
        assert {row["metric"]["host"] for row in rows} == {HOST}
        assert {row["metric"]["instance"] for row in rows} == {
            f"{story.hosts.addresses[HOST]}:{METRICS}"
        }
    groups = ask_prometheus(story, "rules")["groups"]
    assert sum(len(group["rules"]) for group in groups) == RULES
    managers = until(
        lambda: ask_prometheus(story, "alertmanagers")["activeAlertmanagers"], "the alertmanager"
    )
    assert [one["url"] for one in managers] == ["http://127.0.0.1:9093/api/v2/alerts"]


def rows_of(story: Story, query: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ask_prometheus(story, "query", query)["result"]
    return rows


def ask_prometheus(story: Story, what: str, query: str = "") -> dict[str, Any]:
    address = f"http://127.0.0.1:9090/api/v1/{what}"
    data = ["--data-urlencode", f"query={query}"] if query else []
    done = story.guest.run(["curl", "-sS", "-m", "30", "-G", *data, address])
    answer: dict[str, Any] = json.loads(done.stdout)["data"]
    return answer


def until(ask: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.5)  # Prometheus has no event for it
    return answer


def test_grafana_finds_the_dashboard(story: Story) -> None:
    provider = story.ask(f"cat {PROVISIONING}/dashboards/llmux.yaml")
    (path,) = re.findall(r"path: (\S+)", provider)
    own = ANSIBLE / "roles/llmux_monitoring/files/llmux-dashboard.json"
    assert story.guest.read(f"{path}/llmux.json") == own.read_bytes()
    started = story.ask("systemctl show -P ActiveState grafana-server")
    assert started == "active"  # it reads the list of providers when it starts
