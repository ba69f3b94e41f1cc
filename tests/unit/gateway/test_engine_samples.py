"""Engines' own series: whatever an engine writes, the scrape stays readable for Prometheus."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from llmux.gateway.engine_samples import MAX_LINE, MAX_LINES, MAX_SAMPLES, merge, parse
from llmux.gateway.exposition import OPENMETRICS, TEXT, encode

PREFIXES = ("vllm:",)
ENGINE = """\
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="x"} 1.0
# HELP vllm:lat Latency.
# TYPE vllm:lat histogram
vllm:lat_bucket{le="1"} 1
vllm:lat_bucket{le="+Inf"} 2
vllm:lat_count 2
vllm:lat_sum 3.5
# HELP vllm:lat_created Latency.
# TYPE vllm:lat_created gauge
vllm:lat_created 1.7e+09
# HELP vllm:tokens_total Tokens.
# TYPE vllm:tokens_total counter
vllm:tokens_total{why="a \\"b\\" \\\\ c\\n"} 7 1700000000000
# HELP vllm:tokens_created Tokens.
# TYPE vllm:tokens_created gauge
vllm:tokens_created{why="x"} 1.7e+09
# HELP process_cpu_seconds_total Not ours to pass on.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 5
process_nonsense{ 1 2 3
vllm:untyped_total 4
"""


def read(texts: dict[str, str | bytes]) -> tuple[dict[str, Any], dict[str, int]]:
    """The families that both parsers of prometheus_client find in the page of these engines."""

    async def page() -> tuple[str, str, dict[str, int]]:
        engines = {
            model: await parse(text.encode() if isinstance(text, str) else text, PREFIXES)
            for model, text in texts.items()
        }
        families, dropped = merge(engines)
        kept = list(families)
        return (
            (await encode(kept, TEXT)).decode(),
            (await encode(kept, OPENMETRICS)).decode(),
            dropped,
        )

    text, strict, dropped = asyncio.run(page())
    by_text = {family.name: family for family in plain(text)}
    found = openmetrics(strict)  # type: ignore[no-untyped-call]
    by_openmetrics = {family.name: family for family in found}
    assert by_text.keys() == by_openmetrics.keys()
    for name, family in by_text.items():
        assert series(family) == series(by_openmetrics[name]), name
    return by_text, dropped


def series(family: Any) -> list[tuple[str, tuple[tuple[str, str], ...], str]]:
    found = [(s.name, tuple(sorted(s.labels.items())), str(float(s.value))) for s in family.samples]
    assert len({one[:2] for one in found}) == len(found), "a series came twice"
    return sorted(found)


def test_engines_series_get_the_models_name_and_one_header() -> None:
    families, dropped = read({"b": ENGINE, "a": ENGINE, "silent": ""})
    assert set(families) == {
        "vllm:num_requests_running", "vllm:lat", "vllm:tokens", "vllm:untyped_total",
    }  # fmt: skip
    running = families["vllm:num_requests_running"]
    assert [s.labels["model"] for s in running.samples] == ["a", "b"]
    assert running.samples[0].labels["engine"] == "0"
    assert running.documentation == "Number of requests."
    assert families["vllm:lat"].type == "histogram" and len(families["vllm:lat"].samples) == 8
    assert families["vllm:tokens"].samples[0].labels["why"] == 'a "b" \\ c\n'
    assert dropped == {"a": 0, "b": 0, "silent": 0}
    assert read({}) == ({}, {})


@pytest.mark.parametrize(
    "line",
    [
        'vllm:bad{ 1 2 3 nonsense',
        'vllm:bad{model="other"} 1',
        'vllm:bad{a="1",a="2"} 1',
        'vllm:bad{__name__="up"} 1',
        'vllm:bad{a="1" b="2"} 1',
        'vllm:bad{a=1} 1',
        'vllm:bad{a="\\x"} 1',
        'vllm:bad{a="x} 1',
        "vllm:bad",
        "vllm:bad ",
        "vllm:bad 1_000",
        "vllm:bad 0x10",
        "vllm:bad infinity",
        "vllm:bad \u0661",
        "vllm:bad 1 2 3",
        "vllm:bad 1\r",
        'vllm:bad 1 # {trace_id="x"} 1',
        "vllm:b\u00e4d 1",
        f'vllm:bad{{a="{"x" * MAX_LINE}"}} 1',
        "vllm:num_requests_running{model_name=\"x\",engine=\"0\"} 2",  # the series is there already
        "# TYPE vllm:c_total counter\nvllm:c_total -1",
        "# TYPE vllm:c_total counter\nvllm:c_total NaN",
        '# TYPE vllm:h histogram\nvllm:h_bucket{le="x"} 1',
        '# TYPE vllm:h histogram\nvllm:h_count{le="1"} 1',
        '# TYPE vllm:s summary\nvllm:s{quantile="2"} 1',
        'vllm:lat 1',
    ],
)  # fmt: skip
def test_a_bad_line_is_dropped_and_counted(line: str) -> None:
    families, dropped = read({"bad": f"{ENGINE}{line}\n", "good": ENGINE})
    expected, _ = read({"bad": ENGINE, "good": ENGINE})
    assert dropped == {"bad": 1, "good": 0}
    assert {name: series(f) for name, f in families.items()} == {
        name: series(f) for name, f in expected.items()
    }


@pytest.mark.parametrize(
    "group",
    [
        'h_bucket{le="1.0"} 1|h_count 1|h_sum 1',  # no +Inf
        'h_bucket{le="+Inf"} 1|h_sum 1',
        'h_bucket{le="+Inf"} 1|h_count 1',
        'h_bucket{le="+Inf"} 1|h_count 2|h_sum 1',
        'h_bucket{le="1.0"} 3|h_bucket{le="+Inf"} 2|h_count 2|h_sum 1',
        'h_bucket{le="1"} 2|h_bucket{le="1.0"} 2|h_bucket{le="+Inf"} 2|h_count 2|h_sum 1',
        'h_bucket{le="-1"} 1|h_bucket{le="+Inf"} 2|h_count 2|h_sum 1',
        'h_bucket{le="+Inf"} 1.5|h_count 1.5|h_sum 1',
        'h_bucket{le="+Inf"} NaN|h_count NaN|h_sum 1',
        'h_bucket{le="+Inf"} +Inf|h_count +Inf|h_sum 1',
        'h_bucket{le="+Inf"} -1|h_count -1|h_sum 1',
        'h_bucket{le="x"} 1|h_bucket{le="+Inf"} 1|h_count 1|h_sum 1',
        'h_bucket{le="+Inf"} 1|h_bucket{le="x"} 1|h_count 1|h_sum 1',
        'h_bucket{le="+Inf"} 1|h_count 1|h_sum -1',
        'h_bucket{le="+Inf"} 1|h_count 1|h_sum NaN',
    ],
)
def test_a_histogram_is_whole_or_left_out(group: str) -> None:
    lines = [f"vllm:{line}" for line in group.split("|")]
    good = 'vllm:h_bucket{a="1",le="+Inf"} 1\nvllm:h_count{a="1"} 1\nvllm:h_sum{a="1"} 1\n'
    text = "# TYPE vllm:h histogram\n" + "\n".join(lines) + "\n" + good
    families, dropped = read({"a": text})
    assert len(families["vllm:h"].samples) == 3 and dropped == {"a": len(lines)}


@pytest.mark.parametrize(
    ("group", "whole"),
    [
        ('s{quantile="0.5"} 1|s{quantile="0.9"} 2|s_sum 3|s_count 2', True),
        ('s{quantile="0"} 0|s{quantile="1"} 0|s_sum 0|s_count 0', True),  # nothing was seen yet
        ("s_sum 0|s_count 0", True),
        ('s{quantile="0.5"} 0.25|s_sum 0.5|s_count 2', True),
        ("s_sum 0|s_count 0.5", False),
        ('s_sum{quantile="0.5"} 1|s_count 1', False),
        ('s{quantile="1.5"} 1|s_sum 3|s_count 2', False),
        ('s{quantile="-0.5"} 1|s_sum 3|s_count 2', False),
        ('s{quantile="0.5"} 1|s{quantile="0.50"} 2|s_sum 3|s_count 2', False),
        ('s{quantile="0.5"} -1|s_sum 3|s_count 2', False),
        ("s 1|s_sum 3|s_count 2", False),
        ('s{quantile="0.5"} 1|s_sum -3|s_count 2', False),
        ('s{quantile="0.5"} 1|s_sum 3|s_count 1.5', False),
    ],
)
def test_a_summary_is_whole_or_left_out(group: str, whole: bool) -> None:
    lines = [f"vllm:{line}" for line in group.split("|")]
    families, dropped = read({"a": "# TYPE vllm:s summary\n" + "\n".join(lines) + "\n"})
    kept = len(families["vllm:s"].samples) if "vllm:s" in families else 0
    assert (kept, dropped) == ((len(lines), {"a": 0}) if whole else (0, {"a": len(lines)}))


def test_buckets_come_in_their_order() -> None:
    lines = [
        '_bucket{le="+Inf"} 3',
        "_sum 4",
        '_bucket{le="10"} 2',
        "_count 3",
        '_bucket{le="2"} 1',
    ]
    text = "# TYPE vllm:h histogram\n" + "".join(f"vllm:h{line}\n" for line in lines)
    families, _ = read({"a": text})
    bounds = [s.labels["le"] for s in families["vllm:h"].samples if "le" in s.labels]
    assert bounds == ["2.0", "10.0", "+Inf"]


def test_engines_that_disagree_about_a_kind() -> None:
    gauge = "# TYPE vllm:x gauge\nvllm:x 1\n"
    counter = "# TYPE vllm:x_total counter\nvllm:x_total 2\n"
    families, dropped = read({"a": gauge, "b": counter, "c": gauge})
    assert families["vllm:x"].type == "gauge"
    assert [s.labels["model"] for s in families["vllm:x"].samples] == ["a", "c"]
    assert dropped == {"a": 0, "b": 1, "c": 0}


def test_one_engine_does_not_hide_what_the_others_say() -> None:
    """Its model comes first, and its families take their names."""
    bad = "# TYPE vllm:lat_count gauge\nvllm:lat_count 1\n# TYPE vllm:tokens gauge\nvllm:tokens 1\n"
    families, dropped = read({"a": bad, "b": ENGINE, "c": ENGINE})
    assert families["vllm:lat"].type == "histogram" and families["vllm:tokens"].type == "counter"
    assert dropped == {"a": 2, "b": 0, "c": 0}


def test_an_engine_has_a_bounded_part_of_the_page() -> None:
    many = "".join(f'vllm:x{{a="{at}"}} 1\n' for at in range(MAX_SAMPLES + 50))
    families, dropped = read({"a": many, "b": "vllm:x 1\n"})
    assert len(families["vllm:x"].samples) == MAX_SAMPLES + 1
    assert dropped == {"a": 50, "b": 0}
    families, dropped = read({"a": "#\n" * MAX_LINES + "vllm:x 1\nvllm:y 1\n"})
    assert families == {} and dropped == {"a": 1}, "what is behind the last line counts as one"


NAMES = st.sampled_from(
    ["vllm:a", "vllm:a_total", "vllm:a_count", "vllm:a_sum", "vllm:a_bucket", "vllm:a_created",
     "vllm:b", "vllm:b_bucket", "vllm:b_count", "vllm:b_info", "vllm:", "vllm:a:b", "up"]
)  # fmt: skip
TEXTS = st.text(st.sampled_from('ab"\\\n\r{}=,# 1\u2028\x85é\x00'), max_size=6)
LABELS = st.dictionaries(
    st.sampled_from(["a", "le", "quantile", "model", "count", "__x", "1a", ""]),
    TEXTS | st.sampled_from(["1", "1.0", "+Inf", "-1", "0.5", "NaN", "1e400"]),
    max_size=3,
)
NUMBERS = st.sampled_from(["0", "1", "2", "2.5", "-1", "NaN", "+Inf", "-Inf", "1e400", "x", "١"])


@st.composite
def lines(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(["sample", "sample", "sample", "TYPE", "HELP", "junk"]))
    name = draw(NAMES)
    if kind == "TYPE":
        kinds = ["counter", "gauge", "histogram", "summary", "untyped", "info", "stateset", ""]
        return f"# TYPE {name} {draw(st.sampled_from(kinds))}"
    if kind == "HELP":
        return f"# HELP {name} {draw(TEXTS)}"
    if kind == "junk":
        return draw(st.text(max_size=20)) if draw(st.booleans()) else f"{name}{draw(TEXTS)}"
    labels = draw(LABELS)
    if draw(st.booleans()):
        quoted = {
            key: value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
            for key, value in labels.items()
        }
    else:
        quoted = labels
    inner = ",".join(f'{key}="{value}"' for key, value in quoted.items())
    return f"{name}{{{inner}}} {draw(NUMBERS)}" if labels else f"{name} {draw(NUMBERS)}"


HISTOGRAM = [
    "# TYPE vllm:b histogram",
    'vllm:b_bucket{le="+Inf"} 1',
    "vllm:b_count 1",
    "vllm:b_sum 1",
]
PAGES = st.lists(lines() | st.sampled_from(HISTOGRAM), max_size=12).map("\n".join)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(["a", 'b"\\']), PAGES, max_size=2))
def test_whatever_engines_write_both_parsers_read_the_page(texts: dict[str, str]) -> None:
    read({model: text.encode(errors="replace") for model, text in texts.items()})


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_are_no_exception(data: bytes) -> None:
    read({"a": b"vllm:x" + data, "b": data})


def test_a_sample_of_another_kind_costs_itself_alone() -> None:
    text = """\
# HELP vllm:h How long.
# TYPE vllm:h histogram
vllm:h_bucket{le="+Inf"} 2
vllm:h 5
vllm:h_count 2
vllm:h_sum 1.5
# HELP vllm:tokens_total Tokens that were made.
# TYPE vllm:tokens_total counter
vllm:tokens_total 7
vllm:no_help 4
"""
    families, dropped = read({"a": text})
    assert dropped == {"a": 1}
    values = {
        sample.name: sample.value for family in families.values() for sample in family.samples
    }
    assert values == {
        "vllm:h_bucket": 2, "vllm:h_count": 2, "vllm:h_sum": 1.5, "vllm:tokens_total": 7,
        "vllm:no_help": 4,
    }  # fmt: skip
    told = {name.removesuffix("_total"): one.documentation for name, one in families.items()}
    assert told == {
        "vllm:h": "How long.", "vllm:tokens": "Tokens that were made.", "vllm:no_help": "",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["histogram", "summary"])
@pytest.mark.parametrize("suffix", ["odd", "total", "created", "info", "bucket", ""])
def test_a_name_that_only_begins_as_a_familys_is_one_of_its_own(kind: str, suffix: str) -> None:
    bucket = 'vllm:f_bucket{le="+Inf"} 2\n' if kind == "histogram" else ""
    whole = f"# TYPE vllm:f {kind}\n{bucket}vllm:f_count 2\nvllm:f_sum 0.5\n"
    other = f"vllm:f_{suffix} 7\n"
    families, dropped = read({"a": whole + other})
    count = 3 if kind == "histogram" else 2
    if suffix == "bucket" and kind == "histogram":  # one without a bound
        assert (families, dropped) == ({}, {"a": count + 1})
        return
    assert [one.value for one in families["vllm:f"].samples] == [2.0, 2.0, 0.5][-count:]
    assert dropped == {"a": 0}
    if suffix == "created":
        assert set(families) == {"vllm:f"}, "it is known of the family"
    else:
        (own,) = (one for name, one in families.items() if name != "vllm:f")
        assert [(one.name, one.value) for one in own.samples] == [(f"vllm:f_{suffix}", 7.0)]


def test_what_is_zero_is_a_value() -> None:
    text = """\
# TYPE vllm:h histogram
vllm:h_bucket{le="0"} 0
vllm:h_bucket{le="+Inf"} 0
vllm:h_count 0
vllm:h_sum 0
# TYPE vllm:c_total counter
vllm:c_total 0
# TYPE vllm:g gauge
vllm:g 0
"""
    families, dropped = read({"a": text})
    assert ({name: len(one.samples) for name, one in families.items()}, dropped) == (
        {"vllm:h": 4, "vllm:c": 1, "vllm:g": 1}, {"a": 0},
    )  # fmt: skip
