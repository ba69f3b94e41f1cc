"""Ansible without guests: the linter, and what playbooks make of the answers of an llmux."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest
from fleet import ANSIBLE, PLAYBOOKS, Played, ansible_environment, ansible_tools, read_play

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(600),  # the first run makes the environment with Ansible
]

# Says what the test wants, and keeps what it was asked.
PROGRAM = """#!/bin/sh
echo "$@" >> {asked}
case "$1" in
status)
    echo '{{"models": {{
        "image": {{"eviction": "retain+checkpoint", "in_flight": 0, "queue_depth": 0}},
        "none": {{"eviction": "discard+checkpoint", "in_flight": {busy}, "queue_depth": 0}},
        "other": {{"eviction": "offload+stop", "in_flight": 0, "queue_depth": 0}}}}}}' ;;
checkpoint)
    if [ "$3" = image ]; then echo '{{"reused": true}}'; else echo '{{"reused": false}}'; fi ;;
esac
"""


def play(directory: pathlib.Path, playbook: pathlib.Path, *arguments: str, busy: int = 0) -> Played:
    """Run a playbook against this machine, with a program of ours as llmux."""
    tools = ansible_tools()
    (directory / "bin").mkdir(exist_ok=True)
    program = directory / "bin/llmux"
    program.write_text(PROGRAM.format(asked=directory / "asked", busy=busy))
    program.chmod(0o755)
    inventory = directory / "inventory.ini"
    inventory.write_text(
        "[llmux]\nhere ansible_connection=local ansible_become=false"
        " ansible_python_interpreter=/usr/bin/python3\n"
    )
    environment = ansible_environment(tools, directory)
    environment["PATH"] = f"{directory}/bin:{environment['PATH']}"
    done = subprocess.run(
        [str(tools / "bin/ansible-playbook"), "-i", str(inventory), *arguments, str(playbook)],
        cwd=ANSIBLE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return read_play(done.returncode, done.stdout)


def test_images_are_made_of_what_has_none(tmp_path: pathlib.Path) -> None:
    played = play(tmp_path, PLAYBOOKS / "checkpoint.yml").assert_ok()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["status --json", "checkpoint --json image", "checkpoint --json none"]
    assert "ok: [here] => (item=image)" in played.output
    assert "changed: [here] => (item=none)" in played.output


@pytest.mark.parametrize("must", [True, False])
def test_a_drain_that_does_not_end_fails_where_it_must(tmp_path: pathlib.Path, must: bool) -> None:
    role = "{ansible.builtin.include_role: {name: llmux, tasks_from: drained.yml}}"
    playbook = tmp_path / "drain.yml"
    playbook.write_text(f"- hosts: llmux\n  gather_facts: false\n  tasks: [{role}]\n")
    must_drain = f"llmux_must_drain={str(must).lower()}"
    limits = ("-e", "llmux_drain_secs=1", "-e", must_drain)
    assert (play(tmp_path, playbook, *limits, busy=2).status != 0) == must
    play(tmp_path, playbook, *limits).assert_ok()


def test_secrets_beside_the_inventory_are_no_hosts(tmp_path: pathlib.Path) -> None:
    """Ansible reads every file of an inventory directory, and a line of text is a host's name."""
    tools = ansible_tools()
    copy = tmp_path / "ansible"
    shutil.copytree(ANSIBLE, copy, ignore=shutil.ignore_patterns("inventory"))
    shutil.copytree(copy / "inventory.example", copy / "inventory")
    (copy / "inventory/probe-key").write_text("sk-secret\n")
    (copy / "inventory/keys").write_text('{"name": "fleet", "sha256": "ab"}\n')
    done = subprocess.run(
        [str(tools / "bin/ansible-inventory"), "--graph"],
        cwd=copy,
        env={**ansible_environment(tools, tmp_path), "ANSIBLE_CONFIG": str(copy / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "gpu01.example.org" in done.stdout
    assert "secret" not in done.stdout + done.stderr
    assert "WARNING" not in done.stderr


def test_the_linter_finds_nothing_at_profile_production(tmp_path: pathlib.Path) -> None:
    tools = ansible_tools()
    copy = tmp_path / "ansible"  # it writes beside what it reads
    shutil.copytree(ANSIBLE, copy)
    done = subprocess.run(
        [str(tools / "bin/ansible-lint"), "--offline", "--nocolor"],
        cwd=copy,
        env={**ansible_environment(tools, tmp_path), "ANSIBLE_CONFIG": str(copy / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed: 0 failure(s), 0 warning(s)" in done.stdout + done.stderr
    assert "'production' was required, and it passed" in done.stdout + done.stderr
