"""The tools of `scripts/bench proxy`: a measuring instrument that lies is worse than none."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from _bench.proxies import report, subjects  # noqa: E402  # found through the line above
from _bench.proxy import Load  # noqa: E402
from _lab import host  # noqa: E402

pytestmark = pytest.mark.long

needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("taskset") is None, reason="no gcc or no taskset"
)


@needs_compiler
def test_clients_and_engine_count_what_passes_between_them(tmp_path: Path) -> None:
    program = subjects.compiled("load", tmp_path)
    with subjects.engine(tmp_path) as engine, Load(program, engine.path) as load:
        assert load.ask("short 4 300")["count"] == 300
        assert load.ask("first 3")["count"] == 3
        for arrival in ("spread", "together"):
            load.ask(f"streams 16 1 {arrival}")
            seen = load.ask("measure 0.2")
            assert seen["count"] > 0
            assert 0 <= seen["p50_us"] <= seen["p99_us"] <= seen["max_us"]
        assert subjects.cpu_seconds(engine.pid) > 0


@needs_compiler
def test_clients_report_an_engine_that_ends(tmp_path: Path) -> None:
    program = subjects.compiled("load", tmp_path)
    with subjects.engine(tmp_path) as engine:
        load = Load(program, engine.path)
        load.ask("streams 2 1")
    with load, pytest.raises(host.LabError, match="a connection ended"):
        load.ask("measure 5")


def test_added_latency_is_of_the_same_round_and_ratios_are_of_pairs() -> None:
    def one(cpu: float, p50: float, per_cpu: float) -> dict[str, object]:
        streams = {"cpu_us": cpu, "delivered": 1.0, "load_share": 0.5, "p50_us": p50,
                   "p99_us": p50, "first_p50_us": p50, "first_p99_us": p50}  # fmt: skip
        short = {"per_cpu_second": per_cpu, "per_second": per_cpu, "load_share": 0.5}
        return {"spread": {"256": streams}, "together": {"256": streams}, "short": short}

    rounds = [
        {"direct": one(1, 10, 1), "nginx": one(10, 50, 40_000), "llmux": one(12, 110, 16_000)},
        {"direct": one(1, 30, 1), "nginx": one(20, 50, 20_000), "llmux": one(28, 150, 8_000)},
    ]
    memory = {name: {"bytes_per_stream": 8192.0} for name in ("nginx", "llmux")}
    document = report.document(rounds, memory, {"requests": 10, "bytes": 2 << 20})
    llmux = document["proxies"]["llmux"]
    assert llmux["spread"]["added_p50_us"] == 110
    assert llmux["spread"]["to_nginx"] == pytest.approx(1.3)
    assert llmux["short"]["to_nginx"] == pytest.approx(0.4)
    assert document["goals"]["short"]
    assert not document["goals"]["growth"]
