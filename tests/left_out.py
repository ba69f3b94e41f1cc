"""pytest plugin: lists what was left out and why, over all of a `scripts/test`; strict in CI.

A skipped test is not a passed one. Skips of this run and of earlier ones of the same call
(collected in the file $LLMUX_LEFT_OUT) are printed before pytest's last line. With CI=true any but
those of GPU tests make the run a failure.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

GPU_ONLY = "gpu"


def _file() -> Path | None:
    name = os.environ.get("LLMUX_LEFT_OUT")
    return Path(name) if name else None


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


class LeftOut:
    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str, str]] = Counter()

    def add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            where = report.nodeid.split("::")[0]
            kind = GPU_ONLY if GPU_ONLY in report.keywords else "other"
            self.seen[(kind, where, _reason(report))] += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            where = report.nodeid or "a module"
            self.seen[("other", where, _reason(report))] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return  # a worker of pytest-xdist: its reports reach the controller
        if (path := _file()) is not None:
            with path.open("a", encoding="utf-8") as file:
                for (kind, where, reason), count in sorted(self.seen.items()):
                    file.write(f"{kind}\t{count}\t{where}\t{reason.splitlines()[0]}\n")
        strict = os.environ.get("CI") == "true"
        if strict and any(kind != GPU_ONLY for kind, _, _ in self.seen):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK  # a level may be empty; the list says so

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        path = _file()
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        terminalreporter.section("left out")
        for line in lines:
            kind, count, where, reason = line.split("\t", 3)
            strict = os.environ.get("CI") == "true" and kind != GPU_ONLY
            note = "  [a failure in CI]" if strict else ""
            terminalreporter.line(f"{where}: {count} × {reason}{note}")
        if not lines:
            terminalreporter.line("nothing")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LeftOut(), "llmux-left-out")
