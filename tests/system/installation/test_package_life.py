"""The life of an installation: removed and installed again, upgraded with a mistake in the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from llmux_guest import CONFIG, GATEWAY, SUPERVISOR, LlmuxGuest, model

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

MODELS = {"alpha": model()}
DEB = "/root/llmux.deb"


@pytest.fixture
def installed(llmux: LlmuxGuest, package: str) -> Iterator[LlmuxGuest]:
    """Both services up on this version, and again on it afterwards."""
    llmux.begin(MODELS)
    yield llmux
    llmux.end()
    install(llmux, Path(package))


def install(llmux: LlmuxGuest, deb: Path) -> str:
    """As apt does it; returns what was said."""
    llmux.guest.write(DEB, deb.read_bytes())
    done = llmux.run(["sh", "-c", f"dpkg --force-confold -i {DEB} 2>&1"], check=False, timeout=120)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_an_operator_needs_a_group_and_not_root(installed: LlmuxGuest) -> None:
    llmux = installed
    llmux.run(["useradd", "--groups", "llmux-admin", "op-one"])
    llmux.run(["useradd", "passer-by"])
    try:
        cursor = llmux.cursor()
        loaded = llmux.run(["llmux", "load", "alpha"], user="op-one")
        assert loaded.stdout == "Model alpha is serving\n"
        assert "by op-one" in llmux.journal("-u", SUPERVISOR, f"--after-cursor={cursor}")
        refused = llmux.run(["llmux", "ps"], user="passer-by", check=False)
        assert refused.returncode == 4
        assert "member of group llmux-admin" in refused.stderr
        secret = llmux.run(["cat", CONFIG], user="op-one", check=False)
        assert secret.returncode != 0, "an operator reads no secrets"
    finally:
        llmux.run(["sh", "-c", "userdel op-one; userdel passer-by"])


def test_a_file_that_the_gateway_cannot_read_is_found_before_it_starts(
    installed: LlmuxGuest,
) -> None:
    """As an administrator whose umask is 077 leaves it."""
    llmux = installed
    drop_in = "/etc/llmux/conf.d/beta.yaml"
    llmux.guest.write(drop_in, "models: {beta: {model_path: lab/tiny}}\n", mode=0o600)
    try:
        checked = llmux.run(["llmux", "check"], check=False)
        assert checked.returncode == 78
        assert f"user llmux cannot read {drop_in}: {drop_in} is closed to it" in checked.stderr
        assert f"chgrp llmux {drop_in}" in checked.stderr
        assert llmux.run(["systemctl", "reload", SUPERVISOR], check=False).returncode != 0
        llmux.run(["sh", "-c", f"chgrp llmux {drop_in} && chmod g+rX {drop_in}"])
        assert llmux.run(["llmux", "check"]).returncode == 0
    finally:
        llmux.run(["rm", drop_in])


def main_pids(llmux: LlmuxGuest) -> list[str]:
    return [llmux.show(unit, "MainPID") for unit in (SUPERVISOR, GATEWAY)]


def test_removed_and_installed_again_it_starts(installed: LlmuxGuest, package: str) -> None:
    llmux = installed
    llmux.run(["dpkg", "-r", "llmux"], timeout=60)
    assert llmux.run(["test", "-e", CONFIG], check=False).returncode == 0
    left = "cat /sys/fs/cgroup/llmux.slice/llmux-gateway.service/cgroup.procs 2>/dev/null || true"
    assert llmux.run(["sh", "-c", left]).stdout == ""
    install(llmux, Path(package))
    owners = llmux.run(["stat", "-c", "%a %U:%G", "/etc/llmux", "/etc/llmux/conf.d", CONFIG])
    assert owners.stdout.split("\n")[:3] == [
        "2750 root:llmux", "2750 root:llmux", "640 root:llmux",
    ]  # fmt: skip
    llmux.run(["systemctl", "start", "llmux"], timeout=100)
    assert llmux.ask("alpha")["error"] == "", llmux.journal()


def test_an_upgrade_with_a_mistake_in_the_file_leaves_what_runs(
    installed: LlmuxGuest, next_package: Path
) -> None:
    llmux = installed
    assert llmux.ask("alpha")["error"] == ""
    before = main_pids(llmux)
    good = llmux.guest.read(CONFIG).decode()
    llmux.write_config(good.replace('"models"', '"bogus": 1, "models"'))
    said = install(llmux, next_package)
    assert "not restarted" in said and "bogus" in said
    assert llmux.run(["llmux", "--version"]).stdout == "llmux 9.9.9\n"
    assert main_pids(llmux) == before
    assert llmux.ask("alpha")["error"] == ""

    # a restart by hand goes on with the configuration that was in force, and says so
    llmux.run(["systemctl", "restart", SUPERVISOR, GATEWAY], timeout=100)
    assert set(main_pids(llmux)).isdisjoint({*before, "0"})
    assert llmux.ask("alpha")["error"] == "", llmux.journal()
    assert "continuing with the last good configuration" in llmux.journal()

    llmux.write_config(good)
    old = main_pids(llmux)
    assert "not restarted" not in install(llmux, next_package)
    assert set(main_pids(llmux)).isdisjoint({*old, "0"})
    assert llmux.ask("alpha")["error"] == "", llmux.journal()
