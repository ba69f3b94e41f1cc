"""Debian 13 as it comes: its own kernel, its own CRIU, engines under a user of their own.

In a whole virtual machine, where the memory controller works and root lacks no capability.
$LLMUX_VM_SWAPS tries both ways to root there as well: swaps of paths under an image
(criu_swaps.py), and images in directories of others.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import pytest
from leftovers import leftovers
from llmux_guest import Guest, LlmuxGuest, host, model

# Emulated: the boot alone takes minutes, by what else the host does.
pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

RESTORES = 10


@pytest.fixture(scope="module")
def machine(package: str) -> Iterator[LlmuxGuest]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to start a virtual machine")
    with Guest.up(machine=True, debs=[package]) as guest:
        yield LlmuxGuest(guest)
        # Tested here, since tests come in any order and after this there is no machine.
        with pytest.raises(host.LabError, match=r"its kernel died during sh -c(?s:.)*sysrq"):
            guest.run(["sh", "-c", "echo c >/proc/sysrq-trigger"])
    assert leftovers(guest.name) == []


def test_a_machine_has_the_verbs_of_a_guest(machine: LlmuxGuest) -> None:
    guest = machine.guest
    done = guest.run(["sh", "-c", "cat; echo err >&2; exit 7"], input="in\n", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "in\n", "err\n")
    controllers = guest.read("/sys/fs/cgroup/cgroup.controllers").decode().split()
    assert {"cpu", "io", "memory"} <= set(controllers)  # what a container here may lack
    guest.write("/etc/made/by-test", "it's there\n")
    assert guest.run(["cat", "/etc/made/by-test"]).stdout == "it's there\n"
    assert guest.run(["test", "-e", "/srv/llmux/pyproject.toml"]).returncode == 0


def test_an_engine_past_its_memory_limit_dies_alone_and_is_told_so(machine: LlmuxGuest) -> None:
    hungry = {"STANDIN_HOST_WEIGHTS_MIB": "400"}
    machine.begin(
        {
            "alpha": model(gpu_memory=0.4, limits={"memory_max": "200MiB"}, env=hungry),
            "beta": model(gpu_memory=0.4),
        }
    )
    assert machine.ask("beta", timeout=120)["error"] == ""
    refused = machine.ask("alpha", timeout=120)
    past = "it went past MemoryMax=200M of llmux-alpha.scope (limits.memory_max)"
    assert past in refused["error"], machine.journal()
    listed = machine.status()["models"]
    assert past in listed["alpha"]["message"]
    assert past in machine.run(["llmux", "ps", "--format", "{name} {message}"]).stdout
    assert machine.ask("beta", timeout=120)["error"] == "", machine.journal()


@pytest.fixture
def limited(machine: LlmuxGuest) -> Iterator[LlmuxGuest]:
    """As an operator limits every engine's scope, whatever its model's name."""
    limits = "[Scope]\nMemoryMax=700M\nTasksMax=300\n"
    machine.drop_in("llmux-.scope", "limits", limits)
    yield machine
    machine.remove_drop_in("llmux-.scope", "limits")


def test_a_restored_engine_has_the_user_and_the_limits_it_had(limited: LlmuxGuest) -> None:
    machine = limited
    machine.begin(
        {"alpha": model("retain+checkpoint")},
        checkpoint={"keep_images": False},  # so that each turn is a dump as well
    )
    report = machine.load("cycles", str(RESTORES + 1), "alpha", timeout=600)
    first, *restored = report["turns"]
    user = machine.run(["stat", "-c", "%u", "/var/cache/llmux/alpha"]).stdout.strip()
    assert 60706 <= int(user) <= 61183
    said = machine.journal("-u", "llmux.service")
    assert said.count("criu restore: success") == RESTORES, said
    assert said.count("(no checkpoint available)") == 1, said
    assert first["memory.max"] == str(700 * 1024**2)
    assert first["pids.max"] == "300"
    processes = [value for key, value in first.items() if key.isdigit()]
    assert len(processes) >= 3
    for process in processes:
        assert process["Uid"].split() == [user] * 4
        assert int(process["CapEff"], 16) == int(process["CapBnd"], 16) == 0
        assert (process["NoNewPrivs"], process["Seccomp"]) == ("1", "2")
    assert restored == [first] * RESTORES


if "LLMUX_VM_REBOOT" in os.environ:  # ten minutes; a skipped test would fail the CI

    def test_a_reboot_uses_images_where_it_may_and_says_where_not(package: str) -> None:
        """`checkpoint.after_reboot: try` restores; `discard` finds the same image stale."""
        with Guest.up(machine=True, debs=[package], reboots=True) as guest:
            llmux = LlmuxGuest(guest)
            parked = {"alpha": model("retain+checkpoint")}
            llmux.begin(parked, checkpoint={"after_reboot": "try"})
            assert llmux.ask("alpha", timeout=120)["error"] == "", llmux.journal()
            llmux.run(["llmux", "sleep", "alpha"], timeout=120)
            began = time.monotonic()
            guest.reboot()
            # not enabled: the stand-in's directory is mounted from outside once it has booted
            llmux.run(["systemctl", "start", "llmux"], timeout=180)
            assert llmux.ask("alpha", timeout=120)["error"] == "", llmux.journal()
            print(f"rebooted and answered after {time.monotonic() - began:.1f} s")
            said = llmux.journal("-b", "-u", "llmux.service")
            assert "criu restore: success" in said, said
            llmux.run(["llmux", "sleep", "alpha"], timeout=120)
            llmux.configure(parked)
            guest.reboot()
            llmux.run(["systemctl", "start", "llmux"], timeout=180)
            listed = json.loads(llmux.run(["llmux", "images", "ls", "--json"]).stdout)
            assert "boot_id" in listed[0]["state"], listed
            assert llmux.ask("alpha", timeout=120)["error"] == "", llmux.journal()
            assert "criu restore" not in llmux.journal("-b", "-u", "llmux.service")


if "LLMUX_VM_SWAPS" in os.environ:  # five minutes

    @pytest.mark.parametrize(
        "scenario",
        [
            "an_untouched_image_is_restored_and_runs",
            "what_was_swapped_is_refused_before_criu_opens_it",
            "what_is_swapped_too_late_for_that_is_seen_before_the_engine_runs",
            "leftovers_of_root_and_behind_links_stay",
        ],
    )
    def test_no_swap_makes_root_open_what_the_engine_could_not(
        machine: LlmuxGuest, scenario: str
    ) -> None:
        machine.end()
        program = "/srv/llmux/tests/system/parking/criu_scenarios.py"
        done = machine.run(["/usr/bin/python3", program, scenario], check=False, timeout=600)
        print(done.stdout)
        assert done.returncode == 0, done.stderr[-4000:]

    # What is done as root first, then as nobody; where the images are; why that is refused.
    FOREIGN = {
        "the guide's, made first by another user": (
            ":", "mkdir -m 700 /tmp/llmux-checkpoints", "/tmp/llmux-checkpoints",
            "/tmp/llmux-checkpoints belongs to user 65534",
        ),
        "another user's": (
            "install -d -o nobody -m 700 /srv/images", ":", "/srv/images",
            "/srv/images belongs to user 65534",
        ),
        "below another user's": (
            "install -d -o nobody /srv/images && install -d -m 700 /srv/images/own", ":",
            "/srv/images/own", "/srv/images belongs to user 65534",
        ),
        "open to its group": (
            "install -d -g nogroup -m 770 /srv/images", ":", "/srv/images",
            "/srv/images can be written by others (mode 770)",
        ),
        "open to all": (
            "install -d -m 777 /srv/images", ":", "/srv/images",
            "/srv/images can be written by others (mode 777)",
        ),
        "behind another user's link": (
            "install -d -m 700 /srv/images", "ln -s /srv/images /tmp/images", "/tmp/images",
            "/tmp/images belongs to user 65534",
        ),
    }  # fmt: skip

    @pytest.mark.parametrize("which", FOREIGN)
    def test_no_images_are_kept_in_a_directory_of_others(machine: LlmuxGuest, which: str) -> None:
        """With links in it to a file of root's, in the place of each log and of what says where
        it ends: what stood there was read, overwritten and appended to."""
        prepare, attack, place, reason = FOREIGN[which]
        machine.end()
        try:
            machine.guest.write("/etc/victim", "root-only\n")
            machine.run(["chmod", "600", "/etc/victim"])
            machine.run(["sh", "-ec", prepare])
            names = " ".join(f"{log}.log {log}.log.offset" for log in ("stdout", "stderr"))
            machine.run(["sh", "-ec", attack], user="nobody")
            # the kernel keeps root itself from following a link in /tmp
            real = machine.run(["readlink", "-f", place]).stdout.strip()
            links = f"cd {real}; mkdir alpha; for n in {names}; do ln -s /etc/victim alpha/$n; done"
            # where not even its attacker reaches it, root puts them there
            if machine.run(["sh", "-ec", links], user="nobody", check=False).returncode:
                machine.run(["sh", "-ec", links])
            machine.configure(
                {"alpha": model("retain+checkpoint")}, checkpoint={"images_dir": place}
            )
            checked = machine.run(["llmux", "check", "--host"], check=False)
            assert checked.returncode != 0, checked.stdout
            assert reason in checked.stdout + checked.stderr
            cursor = machine.cursor()
            started = machine.run(["systemctl", "start", "llmux"], check=False, timeout=180)
            said = machine.journal("-u", "llmux.service", f"--after-cursor={cursor}")
            assert started.returncode != 0, said
            assert reason in said
            assert machine.show("llmux.service", "ExecMainStatus") == "78", said
            assert machine.run(["cat", "/etc/victim"]).stdout == "root-only\n"
            assert machine.run(["stat", "-c", "%U %a", "/etc/victim"]).stdout == "root 600\n"
            found = machine.run(["find", real, "-not", "-type", "d"]).stdout.split()
            assert len(found) == 4, "nothing was made there"
        finally:
            made = "/tmp/llmux-checkpoints /tmp/images /srv/images /etc/victim"
            machine.run(["sh", "-c", f"rm -rf {made}"])
            machine.end()
