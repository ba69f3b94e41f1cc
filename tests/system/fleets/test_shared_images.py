"""An image made on one host serves on another that is alike: two guests, ssh between them."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fleet import Fleet, fleet
from llmux_guest import STANDIN, LlmuxGuest

IMAGES = "/var/lib/llmux/checkpoints"
# Higher than any id of a guest's own daemons: what is restored gets its ids back.
FIRST_PID = 20000

pytestmark = [
    pytest.mark.system,
    pytest.mark.fleet,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start guests with ssh"),
    pytest.mark.timeout(1200),
]


@dataclass
class Pair:
    fleet: Fleet
    one: LlmuxGuest
    two: LlmuxGuest

    @property
    def there(self) -> str:
        return f"root@{self.fleet.addresses['two']}"

    def begin(self) -> None:
        """Both serve the same model, with no image; the one's engine has high process ids."""
        for host in (self.one, self.two):
            host.end()
            host.run(["sh", "-c", f"rm -rf {IMAGES}/*"])
            configure(host)
        self.one.run(["sh", "-c", f"echo {FIRST_PID} > /proc/sys/kernel/ns_last_pid"])
        for host in (self.one, self.two):
            host.run(["systemctl", "start", "llmux"])

    def states(self) -> list[str]:
        done = self.two.run(["llmux", "checkpoint", "--list", "--json"])
        return [row["state"] for row in json.loads(done.stdout)]


def configure(host: LlmuxGuest, *arguments: str) -> None:
    # In a container CRIU cannot dump the processes of another user.
    model = {
        "model_path": "lab/tiny",
        "eviction": "discard+checkpoint",
        "env": {"STANDIN_HOST_WEIGHTS_MIB": "64", "API_TOKEN": "same on both"},
        "extra_args": list(arguments),
    }
    host.configure({"alpha": model}, engine_user="root", vllm_command=[STANDIN])


@pytest.fixture(scope="module")
def pair(package: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    suites = {"one": "trixie", "two": "trixie"}
    with fleet(suites, tmp_path_factory.mktemp("pair"), {}, [package]) as hosts:
        one, two = (LlmuxGuest(hosts.guests[name]) for name in suites)
        key = (hosts.directory / "key").read_bytes()
        one.guest.write("/root/.ssh/id_ed25519", key, mode=0o600)
        one.guest.write("/root/.ssh/config", "StrictHostKeyChecking accept-new\n", mode=0o600)
        yield Pair(hosts, one, two)


def test_an_image_serves_on_the_other_host(pair: Pair) -> None:
    pair.begin()
    pair.one.run(["llmux", "checkpoint", "alpha"])
    cut = f"llmux images export alpha | head -c 3000000 | ssh {pair.there} llmux images import"
    done = pair.one.run(["sh", "-c", cut], check=False)
    assert "the stream ended too early" in done.stderr
    received = pair.two.run(["llmux", "images", "received", "alpha"]).stdout.strip()
    print(received)
    assert int(received.partition(":")[2]) > 0
    assert pair.states() == []
    done = pair.one.run(["llmux", "images", "export", "alpha", "--ssh", pair.there])
    print(done.stdout, done.stderr)
    assert pair.states() == ["valid"]
    answer = pair.two.ask("alpha")
    assert not answer["error"], answer
    journal = pair.two.journal("-u", "llmux")
    assert "Restoring alpha from checkpoint" in journal
    assert "criu restore: success" in journal
    assert "Starting alpha cold" not in journal
    assert min(pair.two.pids()["alpha"]) >= FIRST_PID
    # it was not used up, and the first host has its own still
    pair.two.run(["llmux", "sleep", "alpha"])
    assert not pair.two.ask("alpha")["error"]
    assert not pair.one.ask("alpha")["error"]


def test_what_cannot_work_is_refused_by_name(pair: Pair) -> None:
    pair.begin()
    pair.one.run(["llmux", "checkpoint", "alpha"])
    file = "/var/tmp/images"
    pair.one.run(["install", "-d", "-m", "0700", file])
    pair.one.run(["llmux", "images", "export", "alpha", "--to", file])
    send = f"ssh {pair.there} llmux images import < {file}/alpha.tar"
    configure(pair.two, "--max-num-seqs", "7")
    pair.two.run(["llmux", "reload"])
    done = pair.one.run(["sh", "-c", send], check=False)
    print(done.stderr)
    assert done.returncode == 3
    assert "would not work here: arguments:" in done.stderr
    configure(pair.two)
    pair.two.run(["llmux", "reload"])
    head = pair.one.run(["tar", "-xOf", f"{file}/alpha.tar", "llmux-image.json"]).stdout
    library = next(p for p in (f["path"] for f in json.loads(head)["paths"]) if ".so" in p)
    pair.two.run(["sh", "-c", f"cp -p {library} /var/tmp/kept && echo >> {library}"])
    try:
        done = pair.one.run(["sh", "-c", send], check=False)
        print(done.stderr)
    finally:
        pair.two.run(["cp", "-p", "/var/tmp/kept", library])
    assert f"path {library}: its state is" in done.stderr
    assert pair.states() == []
    pair.one.run(["sh", "-c", f"cat {file}/alpha.tar | ssh {pair.there} llmux images import"])
    assert pair.states() == ["valid"]
    # what is in the image no longer fits the host that made it
    pair.one.run(["sh", "-c", f'sed -i \'s/"boot_id": "./"boot_id": "x/\' {IMAGES}/*/images/m*'])
    done = pair.one.run(["llmux", "images", "export", "alpha", "--to", file], check=False)
    assert done.returncode == 3
    assert "boot_id was" in done.stderr


def test_images_are_made_once_and_copied(pair: Pair, tmp_path: pathlib.Path) -> None:
    pair.begin()
    inventory = pair.fleet.inventory({"llmux": ["one", "two"]}, {})
    share = ("-e", "llmux_checkpoint_share=true")
    played = pair.fleet.play("checkpoint.yml", inventory, *share).assert_ok()
    print(played.output)
    assert played.changed["one"] == ["llmux : Make an image of each model"]
    assert played.changed["two"] == ["llmux : Copy an image"]
    assert pair.states() == ["valid"]
    again = pair.fleet.play("checkpoint.yml", inventory, *share).assert_ok()
    assert again.changed == {"one": [], "two": []}
