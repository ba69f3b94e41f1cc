"""A Prometheus that runs the role's configuration and rules against given targets."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from front_programs import ROOT, need
from front_rig import free_port, get, until

ROLE = ROOT / "ansible/roles/llmux_monitoring"
RULES = ROLE / "files/llmux.rules.yml"
JSON = dict[str, Any]
Targets = Mapping[str, Sequence[tuple[str, str]]]  # job → (host, address)


def promtool(*words: str) -> str:
    run = subprocess.run(
        [need("promtool", "prometheus"), *words], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@dataclass
class Prometheus:
    directory: Path
    port: int
    process: subprocess.Popen[bytes]

    def query(self, expression: str) -> list[JSON]:
        answer = self._ask("/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        result: list[JSON] = answer["data"]["result"]
        return result

    def rules(self) -> list[JSON]:
        groups = self._ask("/api/v1/rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def fired(self, **labels: str) -> dict[str, list[JSON]]:
        """Rule → labels of its alerts that fire now or did before; of those with ``labels``."""
        found: dict[str, list[JSON]] = {}
        wanted = "".join(f',{name}="{value}"' for name, value in labels.items())
        for row in self.query(f'max_over_time(ALERTS{{alertstate="firing"{wanted}}}[1d])'):
            found.setdefault(row["metric"]["alertname"], []).append(row["metric"])
        return found

    def until_fired(self, names: set[str], seconds: float, **labels: str) -> dict[str, list[JSON]]:
        """As ``fired``, once all of ``names`` have."""
        deadline = time.monotonic() + seconds
        while missing := names - set(found := self.fired(**labels)):
            assert time.monotonic() < deadline, f"did not fire: {sorted(missing)}"
            time.sleep(0.2)  # Prometheus has no event for it
        for name in sorted(names):
            print(f"{name}: {found[name]}")
        return found

    def until_firing(self, name: str, seconds: float, *, wanted: bool = True) -> None:
        """Until an alert of that name fires now; not ``wanted``: until none does."""
        deadline = time.monotonic() + seconds
        now = f'ALERTS{{alertname="{name}",alertstate="firing"}}'
        while bool(self.query(now)) != wanted:
            assert time.monotonic() < deadline, f"{name} is still {'quiet' if wanted else 'firing'}"
            time.sleep(0.2)  # Prometheus has no event for it

    def _ask(self, path: str) -> JSON:
        status, body = get(self.port, path)
        answer: JSON = json.loads(body)
        assert status == 200 and answer["status"] == "success", (path, answer)
        return answer


def as_they_are(rules: str) -> str:
    return rules


# A scrape a second may be missed on a busy machine; an alert must outlast that.
LEAST_FOR_SECS = 6.0


def with_minutes_of(seconds: float) -> Callable[[str], str]:
    """The rules with every duration shortened alike, ``for`` to some scrapes at least."""
    factors = {"s": 1 / 60, "m": 1, "h": 60, "d": 1440}

    def shorten(matched: re.Match[str]) -> str:
        short = int(matched[2]) * factors[matched[3]] * seconds
        least = min(LEAST_FOR_SECS, 60 * short) if matched[1] == "for: " else 0.001
        return f"{matched[1]}{round(max(short, least) * 1000)}ms"

    return lambda rules: re.sub(r"(for: |\[|offset )(\d+)([smhd])\b", shorten, rules)


def configuration(directory: Path, targets: Targets, edit: Callable[[str], str]) -> Path:
    """The role's own template, with the role's defaults."""
    variables = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["to_json"] = json.dumps
    template = environment.from_string((ROLE / "templates/prometheus.yml.j2").read_text())
    variables |= {
        "ansible_managed": "a test",
        "llmux_monitoring_directory": str(directory),
        "llmux_monitoring_scrape_interval": "1s",
    }
    (directory / "targets").mkdir()
    for job, ones in targets.items():
        found = [{"targets": [address], "labels": {"host": host}} for host, address in ones]
        (directory / f"targets/{job}.json").write_text(json.dumps(found))
    (directory / "llmux.rules.yml").write_text(edit(RULES.read_text()))
    path = directory / "prometheus.yml"
    path.write_text(template.render(variables))
    promtool("check", "config", str(path))
    return path


@contextlib.contextmanager
def ended(*words: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs as long as the block."""
    with log.open("ab") as file:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def prometheus(
    directory: Path, targets: Targets, edit: Callable[[str], str] = as_they_are
) -> Iterator[Prometheus]:
    """``edit`` changes the rules."""
    port = free_port()
    config = configuration(directory, targets, edit)
    words = (
        need("prometheus", "prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    )
    with ended(*words, log=directory / "prometheus.log") as process:
        until(lambda: get(port, "/-/ready")[0] == 200, "Prometheus is ready")
        yield Prometheus(directory, port, process)
