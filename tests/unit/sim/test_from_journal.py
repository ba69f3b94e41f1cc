"""From the lines that the supervisor writes to a trace, and to what each policy would have done."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from llmux.cli.main import main
from llmux.config.schema import Config, ModelConfig
from llmux.core.effects import SwitchFinished
from llmux.core.events import DemandChanged, WorkerJoined
from llmux.core.reducer import initial, reduce
from llmux.daemon.supervisor import _Catalogue
from llmux.drivers.systemd.journal import FIELDS
from llmux.errors import LlmuxError
from llmux.runtime.arrivals import MOST, ArrivalLog
from llmux.sim.journal import read_journal
from llmux.sim.trace import Arrival
from tests.json_shape import faults, schema

SIM = schema("outputs.schema.json")["$defs"]["sim"]

START = 1_700_000_000.0


def entry(record: logging.LogRecord, at: float) -> str:
    """As `journalctl -o json` shows the record."""
    fields: dict[str, Any] = {
        "MESSAGE": record.getMessage(),
        "__REALTIME_TIMESTAMP": str(int((START + at) * 1e6)),
    }
    for name, key in FIELDS.items():
        if (value := getattr(record, name, None)) is not None:
            fields[key] = str(value)
    return json.dumps(fields)


def test_what_the_supervisor_writes_is_read_back(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    config = Config(models=MappingProxyType({"a": ModelConfig("a", "x/a")}))
    state = initial(config, gpu_count=1, epoch_prefix="t")
    log = ArrivalLog(lambda: now)
    caplog.set_level(logging.INFO, "llmux")

    def happen(event: Any) -> None:
        nonlocal state
        former = state
        state, _ = reduce(state, event, now)
        log.published(former, state)

    happen(WorkerJoined("w", {}))
    for at, waiting, in_flight, completed in (
        (10, 1, 0, 0), (12, 0, 1, 0), (15, 0, 3, 0), (20, 0, 1, 2), (80, 0, 0, 3),
    ):  # fmt: skip
        now = float(at)
        happen(DemandChanged("w", "a", waiting, now if waiting else None, in_flight, 0, completed))
    (record,) = caplog.records
    assert "3 requests in the last 70 s" in record.getMessage()
    trace, _ = read_journal([entry(record, 80.0)], ["a"])
    assert [(round(one.at, 2), one.model) for one in trace] == [(0, "a"), (5, "a"), (5, "a")]
    assert trace[0].service > 1


def test_a_counter_that_jumps_fills_one_line_at_most(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that said 2,147,483,648 of them took the supervisor all memory of the machine."""
    config = Config(models=MappingProxyType({"a": ModelConfig("a", "x/a")}))
    former = initial(config, gpu_count=1, epoch_prefix="t")
    joined, _ = reduce(former, WorkerJoined("w", {}), 0.0)
    jumped, _ = reduce(joined, DemandChanged("w", "a", 0, None, 0, 0, 2**31), 0.0)
    caplog.set_level(logging.INFO, "llmux")
    ArrivalLog(lambda: 0.0).published(joined, jumped)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"a: {MOST} requests in the last 0 s")


def test_costs_are_the_means_of_the_switches(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llmux")
    catalogue = object.__new__(_Catalogue)
    for switch in (
        SwitchFinished("a", (), True, 0.0, 0.0, 0.0, 30.0),
        SwitchFinished("b", ("a",), True, 0.0, 1.0, 3.0, 43.0, ("c", "d"), 160.0),
        SwitchFinished("a", ("b",), False, 0.0, 1.0, 5.0, 9.0),
        SwitchFinished("a", ("b",), False, 0.0, 1.0, 5.0, 11.0),
    ):
        catalogue.switched(switch)
    lines = [entry(record, 1.0) for record in caplog.records]
    assert caplog.messages[1].endswith(", after 160.000 s behind c, d, pinned or by never_evict")
    lines.append(
        json.dumps(
            {
                "LLMUX_MODEL": "a",
                "LLMUX_ARRIVALS": "1.0",
                "LLMUX_DURATION_MS": "2000",
                "__REALTIME_TIMESTAMP": "5000000",
            }
        )
    )
    trace, costs = read_journal(lines, ["a", "b"])
    assert trace == [Arrival(0.0, "a", 2.0)]
    assert (costs.of("a").start, costs.of("a").wake, costs.of("a").park) == (30, 5, 2)
    assert (costs.of("b").start, costs.of("b").park) == (40, 4)


def test_the_journals_faults_are_named() -> None:
    with pytest.raises(LlmuxError, match="says nothing of requests"):
        read_journal(["", '{"MESSAGE": "x"}'], ["a"])
    broken: list[Mapping[str, str]] = [
        {"LLMUX_MODEL": "a", "LLMUX_ARRIVALS": "1"},
        {
            "LLMUX_MODEL": "a",
            "LLMUX_ARRIVALS": "x",
            "__REALTIME_TIMESTAMP": "1",
            "LLMUX_DURATION_MS": "1",
        },
    ]
    for fields in broken:
        with pytest.raises(LlmuxError, match="line 1"):
            read_journal([json.dumps(fields)], ["a"])
    for line in ("{", "[]"):
        with pytest.raises(LlmuxError, match="line 1"):
            read_journal([line], ["a"])


def test_the_verb_compares_all_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(
        json.dumps({"models": {name: {"model_path": "x/a"} for name in "ab"}})
    )
    lines = [
        {
            "LLMUX_MODEL": model,
            "LLMUX_ARRIVALS": "9.0 8.0 1.0",
            "LLMUX_DURATION_MS": "500",
            "__REALTIME_TIMESTAMP": str(at * 1_000_000),
        }
        for at, model in ((100, "a"), (110, "b"), (120, "a"))
    ]
    (tmp_path / "j.json").write_text("\n".join(map(json.dumps, lines)))
    verb = ["sim", "-c", f"{tmp_path}/c.json", f"--from-journal={tmp_path}/j.json"]
    assert main(verb) == 0
    said = capsys.readouterr().out
    assert "9 requests for 2 models in 28 s" in said
    assert "fair (configured)" in said
    assert "time_slice" in said
    assert main([*verb, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"fair", "fifo", "cost_aware", "time_slice"}
    assert [faults(SIM, one) for one in found.values()] == [[]] * 4
    assert main([*verb, "--policy", "fifo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 9
