"""The simulator: the same rules as the gateway's, the same core, the same figures each time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

import pytest

from llmux.cli.main import main
from llmux.config.schema import (
    Config,
    Eviction,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
    PolicyType,
    Process,
    Weights,
)
from llmux.errors import LlmuxError
from llmux.sim.bound import lower_bound
from llmux.sim.costs import Costs, ModelCosts, costs_from
from llmux.sim.drawing import duration
from llmux.sim.plot import drawing, svg
from llmux.sim.report import jain, report
from llmux.sim.trace import Arrival, read_trace
from llmux.sim.world import Result, Simulation
from tests.json_shape import faults, schema

SIM = schema("outputs.schema.json")["$defs"]["sim"]

OFFLOAD = Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING)
COSTS = Costs(ModelCosts(start=10.0, wake=4.0, park=1.0))


def simulated(
    *trace: Arrival,
    costs: Costs = COSTS,
    places: int = 32,
    gpus: int = 1,
    each: Mapping[str, Any] = MappingProxyType({}),
    each_of: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    **policy: Any,
) -> Result:
    """``each``: settings of every model; ``each_of``: of one."""
    models = {
        name: ModelConfig(name, name, eviction=OFFLOAD, gpus=1, **each, **each_of.get(name, {}))
        for name in sorted({arrival.model for arrival in trace})
    }
    config = Config(
        models=MappingProxyType(models),
        policy=PolicyConfig(**policy),
        gateway=GatewayConfig(max_in_flight=places),
    )
    return Simulation(config, trace, costs, gpu_count=gpus, record=True).run()


def waits(result: Result) -> list[float]:
    return [round(r.wait or 0.0, 3) for r in result.requests]


def test_a_request_waits_for_its_start_a_switch_and_its_way_back() -> None:
    result = simulated(Arrival(0, "a", 2), Arrival(20, "b", 2), Arrival(60, "a", 2))
    assert waits(result) == [10, 11, 5], "start; park and start; park and wake"
    assert report(result)["switches"] == 2


def test_an_engine_has_places() -> None:
    result = simulated(*[Arrival(0, "a", 3)] * 3, places=2)
    assert waits(result) == [10, 10, 13]


def test_gpus_are_used_side_by_side() -> None:
    result = simulated(Arrival(0, "a", 2), Arrival(0, "b", 2), gpus=2)
    assert waits(result) == [10, 10]


def test_two_halves_free_on_two_gpus_become_one_for_a_model_that_needs_it() -> None:
    """One of the small ones moves beside the other; until it had, each large one's request sent it
    away, and each of its own the large one."""
    shares = {"a": 0.45, "b": 0.45, "large": 0.9}
    models = {
        name: ModelConfig(
            name, name, eviction=OFFLOAD, gpus=1, gpu_memory=share, gpu_memory_parked=0.02
        )
        for name, share in shares.items()
    }
    small = [Arrival(10 * i, "ab"[i % 2], 3) for i in range(180)]
    large = [Arrival(100 + 13 * i, "large", 3) for i in range(130)]
    config = Config(models=MappingProxyType(models))
    result = Simulation(config, sorted(small + large), COSTS, gpu_count=2).run()
    switches = [one.serving_at for one in result.switches if one.victims]
    assert 1 <= len(switches) <= 8
    assert max(switches) < 300, "none in the other 25 minutes"


def test_a_request_waits_no_longer_than_its_deadline() -> None:
    result = simulated(Arrival(0, "a", 2, deadline=5), Arrival(0, "a", 2))
    assert [r.refused for r in result.requests] == ["wait_expired", ""]
    assert report(result)["unserved"] == 1


def test_starts_that_fail_refuse_those_that_wait() -> None:
    result = simulated(Arrival(0, "a", 2), costs=Costs(ModelCosts(failures=1.0)))
    assert result.requests[0].refused == "model_start_failed"


@pytest.mark.parametrize("kind", list(PolicyType))
def test_answers_longer_than_the_drain_timeout_get_done(kind: PolicyType) -> None:
    """Each client repeats what was cut: once cut, a model is given the time for its answers."""
    trace = [Arrival(0.1 * i, "ab"[i % 2], 50) for i in range(6)]
    result = simulated(*trace, policy_type=kind, drain_timeout_secs=10, request_timeout_secs=3000)
    assert not any(r.refused for r in result.requests)
    assert max(r.cuts for r in result.requests) <= 1


@pytest.mark.parametrize("kind", list(PolicyType))
def test_steady_traffic_of_a_higher_priority_starves_no_other(kind: PolicyType) -> None:
    """It left for the other and came back before it, for ever: switches that served nobody."""
    high = [Arrival(2.0 * i, "a", 3) for i in range(150)]
    result = simulated(
        *sorted([*high, Arrival(5, "b", 1), Arrival(100, "b", 1), Arrival(200, "b", 1)]),
        each_of={"a": {"priority": 5}},
        policy_type=kind,
    )
    waited = [r.wait or 0.0 for r in result.requests if r.arrival.model == "b"]
    assert max(waited) < 60.0, waited


def test_the_same_trace_gives_the_same_figures() -> None:
    trace = [Arrival(0.7 * i, "abc"[i * i % 3], 1 + i % 5) for i in range(200)]
    assert report(simulated(*trace)) == report(simulated(*trace))


def test_a_trace_names_its_faults() -> None:
    assert read_trace(["arrival_s,model,service_s,deadline_s", "2,b,1,", "1,a,1,9"]) == [
        Arrival(1, "a", 1, 9),
        Arrival(2, "b", 1),
    ]
    with pytest.raises(LlmuxError, match="no column service_s"):
        read_trace(["arrival_s,model"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("x,a,1", 'arrival_s must be a number of seconds, 0 or more, not "x"'),
        ("# later,a,1", "arrival_s must be"),
        ("1,a,-1", "service_s must be"),
        ("nan,a,1", "arrival_s must be"),
        ("1,a,inf", "service_s must be"),
        ("1,a", 'service_s must be a number of seconds, 0 or more, not ""'),
        ("1,,2", "model is empty"),
        ("1,a,2,-3", "deadline_s must be"),
        ("1,a,2,0", "deadline_s must be above 0"),
        ("1,a,2,3,k,more", "6 values, but the heading has 5"),
    ],
)
def test_a_row_that_is_none_is_named(row: str, said: str) -> None:
    heading = "arrival_s,model,service_s,deadline_s,key"
    with pytest.raises(LlmuxError, match=f"line 4: .*{said}"):
        read_trace([heading, "0,a,1", "", row])


def test_a_trace_may_have_spaces_and_must_have_requests() -> None:
    heading = "model, service_s, arrival_s\r\n"
    assert read_trace([heading, "a, 2, 1\r\n", "\r\n"]) == [Arrival(1, "a", 2)]
    with pytest.raises(LlmuxError, match="it has no requests"):
        read_trace([heading])


def test_costs_are_checked() -> None:
    costs = costs_from({"default": {"wake": 2}, "models": {"a": {"start": 9}}})
    assert (costs.of("a").wake, costs.of("a").start, costs.of("b").wake) == (2, 9, 2)
    wrongs: list[Any] = [[], {"x": 1}, {"default": {"wke": 1}}, {"models": {"a": {"wake": -1}}}]
    for wrong in wrongs:
        with pytest.raises(LlmuxError):
            costs_from(wrong)


def test_the_bound_is_exact_for_few_requests_and_no_policy_beats_it() -> None:
    trace = [Arrival(0, "a", 2), Arrival(0, "b", 2), Arrival(1, "a", 2), Arrival(9, "b", 1)]
    bound = lower_bound(trace, COSTS, places=1)
    assert bound.exact
    # a 0-2, a 2-4, park and wake 5 s, the short b 9-10, the long b 10-12: waits 0, 1, 0, 10
    assert bound.mean_wait == pytest.approx(11 / 4)
    for kind in PolicyType:
        mean = report(simulated(*trace, places=1, policy_type=kind))["wait_s"]["mean"]
        assert mean >= bound.mean_wait


def test_the_relaxed_bound_is_below_the_exact_one() -> None:
    trace = [Arrival(i % 3, "ab"[i % 2], 1 + i % 4) for i in range(9)]
    exact = lower_bound(trace, COSTS, places=2)
    more = lower_bound([*trace, Arrival(100, "a", 1)], COSTS, places=2)
    assert exact.exact
    assert not more.exact
    assert 0 < more.mean_wait * 10 <= exact.mean_wait * 9


def test_jain() -> None:
    assert jain([2, 2, 2]) == pytest.approx(1)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)


def test_the_plot_shows_each_gpu_and_each_model() -> None:
    plot = svg(simulated(Arrival(0, "a", 2), Arrival(20, "<b>", 2)))
    texts = [element.text or "" for element in ElementTree.fromstring(plot).iter()]
    for text in (
        "GPU 0",
        "<b>",
        "<b> serving on GPU 0, 2.0 s from 31 s; switch of 11 s: drain 0 ms",
    ):
        assert any(one.startswith(text) for one in texts), texts


def test_the_plot_shows_waits_and_failures() -> None:
    costs = Costs(ModelCosts(start=10.0, failures=0.9))
    result = simulated(*[Arrival(0, "a", 3)] * 3, Arrival(0, "b", 3), costs=costs, gpus=2)
    shapes = drawing(result).shapes
    words = [shape["title"] for shape in shapes if shape["kind"] in ("wait", "failure")]
    assert any(text.startswith("a: up to 3 requests waited ") for text in words), words
    assert any(" failed at " in text for text in words), words
    labels = [(shape["text"], shape["most"]) for shape in shapes if shape["kind"] == "label"]
    assert labels == [("GPU 0", ""), ("GPU 1", ""), ("a", "3"), ("b", "1")]


def test_spans_side_by_side_share_the_lane() -> None:
    halves = {"gpu_memory": 0.4}
    result = simulated(Arrival(0, "a", 30), Arrival(0, "b", 30), each=halves)
    spans = [shape for shape in drawing(result).shapes if shape["kind"] == "span"]
    assert {(round(shape["y"]), round(shape["height"])) for shape in spans} == {(6, 13), (20, 13)}
    assert {shape["fill"] for shape in spans} == {"#4269d0", "#efb118"}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0004, "0 ms"), (0.25, "250 ms"), (3.25, "3.3 s"), (42.4, "42 s"), (61, "1 min 1 s"),
     (7260, "2 h 1 min"), (90_000, "1 d 1 h"), (-1, "0 ms")],
)  # fmt: skip
def test_times_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"models": {"a": {"model_path": "x/a"}}}))
    (tmp_path / "t.csv").write_text("arrival_s,model,service_s\n0,a,1\n1,a,2\n")
    (tmp_path / "costs.json").write_text('{"default": {"start": 7}}')
    files = [f"--trace={tmp_path}/t.csv", f"--costs={tmp_path}/costs.json"]
    verb = ["sim", "-c", f"{tmp_path}/c.json", *files, "--policy", "fifo"]
    assert main([*verb, "--json", f"--plot={tmp_path}/p.svg"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wait_s"]["max"] == 7
    assert found["bound"]["exact"]
    assert faults(SIM, found) == []
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    assert main(verb) == 0
    assert "2 requests" in capsys.readouterr().out
    (tmp_path / "t.csv").write_text("arrival_s,model,service_s\n0,ghost,1\n")
    assert main(verb) == 1
    assert 'model "ghost" is not configured' in capsys.readouterr().err


@pytest.mark.parametrize(("share", "bounded"), [(0.4, False), (0.6, True)])
def test_models_that_fit_together_have_no_bound(
    share: float, bounded: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {name: {"model_path": f"x/{name}", "gpu_memory": share} for name in "ab"}
    (tmp_path / "c.json").write_text(json.dumps({"models": models}))
    (tmp_path / "t.csv").write_text("arrival_s,model,service_s\n0,a,1\n1,b,2\n")
    assert main(["sim", "-c", f"{tmp_path}/c.json", f"--trace={tmp_path}/t.csv", "--json"]) == 0
    assert ("bound" in json.loads(capsys.readouterr().out)) == bounded


@pytest.fixture
def verb(tmp_path: Path) -> list[str]:
    """``llmux sim`` of two models on a GPU."""
    models = {name: {"model_path": f"x/{name}"} for name in "ab"}
    (tmp_path / "c.json").write_text(json.dumps({"models": models}))
    (tmp_path / "t.csv").write_text("\ufeffarrival_s,model,service_s,deadline_s\n0,a,1,\n1,b,1,2\n")
    return ["sim", "-c", f"{tmp_path}/c.json", f"--trace={tmp_path}/t.csv"]


def test_what_was_never_served_has_no_wait(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(verb) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("2 requests in 61 s, 1 unserved, 0 cut; 0 switches of 0 s in all;")
    assert said[2].split() == ["all", *["60.00"] * 5]
    assert said[4].split() == ["b", *"-----"]
    assert said[5].startswith("assumed of each model: start 60 s, wake 5 s, park 1 s, stop 1 s")
    assert len(said) == 6, "no bound, since not all were served"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--plot=/nonexistent/t.svg"], "cannot write /nonexistent/t.svg: no such file or"),
        (["--costs=/nonexistent"], "cannot read /nonexistent: no such file or directory"),
        (["--costs={tmp}/ghost.json"], 'ghost.json: model "ghost" is not configured'),
        (["--costs={tmp}/t.csv"], "cannot read {tmp}/t.csv: "),
    ],
)
def test_what_cannot_be_done_is_said(
    more: list[str], said: str, verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ghost.json").write_text('{"models": {"ghost": {"wake": 1}}}')
    assert main([*verb, *(one.format(tmp=tmp_path) for one in more)]) == 1
    assert said.format(tmp=tmp_path) in capsys.readouterr().err


def test_the_models_files_may_be_on_another_host(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {name: {"model_path": f"/nonexistent/{name}"} for name in "ab"}
    (tmp_path / "c.json").write_text(json.dumps({"models": models}))
    assert main(verb) == 0
    assert capsys.readouterr().out.startswith("2 requests")


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program that makes PNG files is looked for, at first in vain."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory / "rsvg-convert"


def test_without_its_program_no_png_is_drawn(
    verb: list[str], converter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, f"--plot={tmp_path}/t.png"]) == 1
    said = capsys.readouterr().err
    assert f"cannot draw {tmp_path}/t.png: " in said and "rsvg-convert" in said
    assert f"(apt install librsvg2-bin, or name {tmp_path}/t.svg)" in said


def test_a_png_is_drawn_from_the_svg(verb: list[str], converter: Path, tmp_path: Path) -> None:
    assert main([*verb, f"--plot={tmp_path}/t.svg"]) == 0
    converter.write_text('#!/bin/sh\n[ "$1" = --output ] && exec /bin/cp "$3" "$2"\n')
    converter.chmod(0o755)
    assert main([*verb, f"--plot={tmp_path}/t.png"]) == 0
    assert (tmp_path / "t.png").read_text() == (tmp_path / "t.svg").read_text()


def test_a_png_that_cannot_be_written_is_said(
    verb: list[str], converter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converter.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    converter.chmod(0o755)
    assert main([*verb, f"--plot={tmp_path}/t.png"]) == 1
    assert f"cannot draw {tmp_path}/t.png: rsvg-convert: no room" in capsys.readouterr().err


def test_without_room_for_the_svg_no_png_is_drawn(
    verb: list[str],
    converter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert main([*verb, f"--plot={tmp_path}/t.png"]) == 1
    assert f"cannot draw {tmp_path}/t.png: no such file" in capsys.readouterr().err


def test_all_policies_are_not_drawn_at_once(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb[:3], "--from-journal=-", "--plot=t.svg"]) == 1
    assert "cannot draw all policies at once (name one with --policy)" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "x", "-1", "99999"])
def test_there_are_gpus(count: str, verb: list[str]) -> None:
    with pytest.raises(SystemExit):
        main([*verb, "--gpus", count])
