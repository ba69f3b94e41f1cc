"""Ansible without guests: the linter, and what playbooks make of the answers of an llmux."""

from __future__ import annotations

import http.server
import json
import pathlib
import shutil
import subprocess
import threading

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
        "image": {{"state": "serving",
            "eviction": "retain+checkpoint", "in_flight": 0, "queue_depth": 0}},
        "none": {{"state": "waiting for room",
            "eviction": "discard+checkpoint",
            "in_flight": {busy}, "queue_depth": 0}},
        "other": {{"state": "parked",
            "eviction": "offload+stop", "in_flight": 0, "queue_depth": 0}}}}}}' ;;
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


def test_the_table_is_not_folded_and_names_who_is_not_reached(tmp_path: pathlib.Path) -> None:
    away = tmp_path / "away.ini"
    away.write_text("[llmux]\naway ansible_host=127.0.0.1 ansible_port=1\n")
    played = play(tmp_path, PLAYBOOKS / "status.yml", "-i", str(away)).assert_ok()
    head, here, gone = (" ".join(line.split()) for line in table(played.output))
    assert head == "HOST VERSION MODELS STATES GPU MEMORY WAITING IN FLIGHT"
    assert here.startswith("here ") and here.endswith(" 0 0")
    assert gone == "away - - unreachable - - -"
    assert "FAILED" not in played.output


def table(output: str) -> list[str]:
    """The lines below ``msg:`` of the task that prints them."""
    lines = output.partition("msg: |-\n")[2].partition("\n\n")[0]
    return lines.splitlines()


class Refusing(http.server.BaseHTTPRequestHandler):
    """A gateway that is ready, and whose engine is not."""

    def do_GET(self) -> None:
        self.answer(200, {"status": "ready"})

    def do_POST(self) -> None:
        self.answer(503, {"error": {"message": "alpha could not be started: no room"}})

    def answer(self, status: int, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def test_a_gate_that_fails_says_why_and_does_not_show_the_key(tmp_path: pathlib.Path) -> None:
    role = "{ansible.builtin.include_role: {name: llmux, tasks_from: gate.yml}}"
    playbook = tmp_path / "gate.yml"
    playbook.write_text(f"- hosts: llmux\n  gather_facts: false\n  tasks: [{role}]\n")
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            values = {
                "llmux_config": {"gateway": {"listen": [f"127.0.0.1:{server.server_port}"]}},
                "llmux_models": {"alpha": {"model_path": "lab/tiny"}},
                "llmux_probe_key": "sk-secret",
            }
            played = play(tmp_path, playbook, "-e", json.dumps(values), "-vv")
        finally:
            server.shutdown()
            thread.join()
    assert played.status != 0
    assert "alpha could not be started: no room" in " ".join(played.output.split())
    assert "sk-secret" not in played.output


def test_a_file_with_secrets_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    role = "{ansible.builtin.include_role: {name: llmux, tasks_from: configure.yml}}"
    playbook = tmp_path / "configure.yml"
    playbook.write_text(f"- hosts: llmux\n  gather_facts: false\n  tasks: [{role}]\n")
    values = {"llmux_installed": False, "llmux_keys_src": "/nowhere/keys"}
    played = play(tmp_path, playbook, "--check", "-e", json.dumps(values))
    assert played.status != 0
    said = " ".join(played.output.split())
    assert "cannot write /etc/llmux/keys: /nowhere/keys does not exist on the control node" in said


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
