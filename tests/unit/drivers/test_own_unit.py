"""Which unit this process is in, and who else is in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmux.drivers.systemd.own_unit import OwnUnit


@pytest.mark.parametrize("others", ["", "4:pids:/x.slice\n1:name=systemd:/x\n"])
def test_the_other_processes_of_a_service(tmp_path: Path, others: str) -> None:
    group = tmp_path / "cgroup/llmux.slice/llmux-gateway.service"
    group.mkdir(parents=True)
    (group / "cgroup.procs").write_text(f"1\n{os.getpid()}\n22\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(f"{others}0::/llmux.slice/llmux-gateway.service\n")
    assert OwnUnit(tmp_path, tmp_path / "cgroup").others() == [1, 22]


def test_outside_a_service_there_are_none(tmp_path: Path) -> None:
    assert OwnUnit(tmp_path).others() == []
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/user.slice/session-1.scope\n")
    unit = OwnUnit(tmp_path, tmp_path)
    assert unit.others() == []
    assert not unit.is_restarting() and not unit.is_replaced()
    assert not unit.restart(), "nobody was asked for one"
