"""The ends of each number's range, and what of a file stands alone or is said twice."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from llmux.config import keys
from llmux.config.files.documents import MAX_DEPTH, parse_text
from llmux.config.files.marks import Kind, Mark, ParseError, Parser, Scalar
from llmux.config.load import load_config, load_marked
from llmux.config.schema import (
    CheckpointConfig,
    Config,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
)
from llmux.errors import ConfigError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
DAY = 24 * 3600
SMALL = 1e-6

Range = tuple[float, float]
TOP: dict[str, Range] = {
    "port": (1, 65535),
    "metrics_port": (0, 65535),
    "gpu_count": (1, 64),
    "startup_timeout_secs": (1, DAY),
}
GATEWAY: dict[str, Range] = {
    "workers": (1, 256),
    "drain_timeout_secs": (0, DAY),
    "max_body_bytes": (KIB, 16 * GIB),
    "max_buffered_bytes": (MIB, TIB),
    "max_connections": (1, 10**6),
    "max_waiting": (1, 10**6),
    "max_in_flight": (1, 10**6),
    "keep_alive_comment_secs": (0, 3600),
}
POLICY: dict[str, Range] = {
    "request_timeout_secs": (0.01, 7 * DAY),
    "drain_timeout_secs": (0, DAY),
    "min_active_secs": (0, DAY),
    "coalesce_window_ms": (0, 3_600_000),
    "amortization_factor": (0, 1000),
    "max_wait_secs": (0, DAY),
    "tick_interval_ms": (1, 60_000),
    "min_quantum_ms": (0, 3_600_000),
    "give_up_start_secs": (0, DAY),
    "idle_timeout_secs": (0, 365 * DAY),
    "parked_max_bytes": (MIB, 1024 * TIB),
    "backoff_secs": (0.01, DAY),
    "backoff_max_secs": (0.01, DAY),
}
MODEL: dict[str, Range] = {
    "port": (1, 65535),
    "gpu_memory": (SMALL, 1),
    "gpu_memory_parked": (0, 1),
    "startup_timeout_secs": (1, DAY),
    "sleep_timeout_secs": (0.1, DAY),
    "wake_timeout_secs": (0.1, DAY),
    "checkpoint_timeout_secs": (1, DAY),
    "stop_grace_secs": (0, 3600),
    "stall_timeout_secs": (0, DAY),
    "priority": (-1000, 1000),
    "idle_timeout_secs": (0, 365 * DAY),
    "gpus": (1, 64),
}
WHOLE = (
    "_bytes",
    "port",
    "_count",
    "workers",
    "connections",
    "waiting",
    "flight",
    "priority",
    "us",
)

CASES = [
    *(("", key, keys.SCALARS[key], ends) for key, ends in TOP.items()),
    *(("gateway.", key, keys.GATEWAY.parsers[key], ends) for key, ends in GATEWAY.items()),
    *(("policy.", key, keys.POLICY.parsers[key], ends) for key, ends in POLICY.items()),
    *(("models.m.", key, keys.MODEL.parsers[key], ends) for key, ends in MODEL.items()),
    ("checkpoint.", "max_bytes", keys.CHECKPOINT.parsers["max_bytes"], (MIB, 1024 * TIB)),
]


@pytest.mark.parametrize(
    ("key", "parser", "ends"),
    [pytest.param(key, parser, ends, id=at + key) for at, key, parser, ends in CASES],
)
def test_a_number_is_taken_up_to_both_ends_and_no_further(
    key: str, parser: Parser[float], ends: Range
) -> None:
    def read(value: float) -> float:
        text = str(int(value)) if value == int(value) else f"{value:.9f}"
        return parser(Scalar(Mark("c.yaml"), Kind.NUMBER, text))

    low, high = ends
    step = 1 if key.endswith(WHOLE) else SMALL
    assert (read(low), read(high)) == ends
    for outside in (low - step, high + step):
        with pytest.raises(ParseError, match="expected "):
            read(outside)


def load(tmp_path: Path, text: str) -> list[str]:
    """The problems of the file."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    try:
        load_config(file)
    except ConfigError as error:
        return [f"{one.path}: {one.message}" for one in error.problems]
    return []


OPEN = "gateway.listen: every client that reaches this address could use and control all models"


@pytest.mark.parametrize(
    ("address", "further", "refused"),
    [
        ("0.0.0.0:3000", "", True),
        ("192.0.2.1:3000", "", True),
        ("'[::]:3000'", "", True),
        ("gpu.example.org:3000", "", True),
        ("127.0.0.1:3000", "", False),
        ("127.8.9.1:3000", "", False),
        ("'[::1]:3000'", "", False),
        ("localhost:3000", "", False),
        ("unix:/run/llmux-gateway/http.sock", "", False),
        ("0.0.0.0:3000", "keys_file: /etc/llmux/keys", False),
        ("0.0.0.0:3000", "allow_public_without_keys: true", False),
        ("0.0.0.0:3000", "allow_public_without_keys: false", True),
    ],
)
def test_an_open_address_needs_keys_or_a_word(
    address: str, further: str, refused: bool, tmp_path: Path
) -> None:
    problems = load(tmp_path, f"gateway: {{listen: {address}, {further}}}\n")
    assert [problem[: len(OPEN)] for problem in problems] == [OPEN] * refused


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ("listen: 0.0.0.0:3000, allow_public_without_keys: perhaps", "allow_public_without_keys"),
        ("listen: 0.0.0.0:3000, keys_file: keys", "keys_file"),
        ("listen: [0.0.0.0:3000, x], keys_file: ''", "keys_file"),
    ],
)
def test_what_was_meant_to_close_it_is_the_only_problem(
    wrong: str, where: str, tmp_path: Path
) -> None:
    problems = load(tmp_path, f"gateway: {{{wrong}}}\n")
    assert f"gateway.{where}" in [problem.partition(":")[0] for problem in problems]
    assert OPEN not in [problem[: len(OPEN)] for problem in problems]


def test_an_alias_may_be_used_as_often_as_one_likes_but_not_in_itself(tmp_path: Path) -> None:
    shared = "x: &a [--enforce-eager]\n"
    tree, faults = parse_text(shared + "one: *a\ntwo: *a\n", "c.yaml")
    assert (tree is None, faults) == (False, ())
    _, faults = parse_text("x: &a {y: {z: *a}, w: *a}\n", "c.yaml")
    assert {fault.message for fault in faults} == {"cannot use an alias inside the value it names"}
    assert [fault.path for fault in faults] == [("x", "y", "z"), ("x", "w")]
    # What was refused for its depth is in nothing any more.
    deep = "[" * MAX_DEPTH + "&b {k: &c [1]}" + "]" * MAX_DEPTH
    _, faults = parse_text(f"x: {deep}\ny: *c\nz: *b\n", "c.yaml")
    assert {fault.message for fault in faults} == {"the values are nested too deeply"}


def test_models_that_fill_two_gpus_together_are_noted_once(tmp_path: Path) -> None:
    model = "{model_path: o/m, gpu_memory: 0.5, gpus: [0, 1]}"
    file = tmp_path / "c.yaml"
    file.write_text(f"models: {{a: {model}, b: {model}}}\n")
    (note,) = load_marked(file).notes
    assert "a, b fit together on GPU 0 and claim 1 of it" in note.message
    assert note.path == "models.b.gpu_memory"


@pytest.mark.parametrize(
    ("claim", "noted"), [(0.485, False), (0.486, True), (0.5, True), (0.501, False)]
)
def test_what_contexts_take_is_left_free_exactly(claim: float, noted: bool, tmp_path: Path) -> None:
    model = f"{{model_path: o/m, gpu_memory: {claim}}}"
    file = tmp_path / "c.yaml"
    file.write_text(f"models: {{a: {model}, b: {model}}}\n")
    assert [note.path for note in load_marked(file).notes] == ["models.b.gpu_memory"] * noted


SPECS = {
    "": (keys.TOP, Config),
    "policy": (keys.POLICY, PolicyConfig),
    "checkpoint": (keys.CHECKPOINT, CheckpointConfig),
    "gateway": (keys.GATEWAY, GatewayConfig),
    "models.m": (keys.MODEL, ModelConfig),
}


@pytest.mark.parametrize("section", SPECS)
def test_a_key_without_a_value_is_an_error_where_there_is_a_default(
    section: str, tmp_path: Path
) -> None:
    """And says which."""
    spec, schema = SPECS[section]
    defaults = {one.name: one.default for one in fields(schema)}
    for key in spec.parsers:
        own = f"{section}.{key}".lstrip(".")
        text = f"{key}: \n"
        for step in reversed(section.split(".") if section else []):
            text = f"{step}:\n" + "".join(f"  {line}\n" for line in text.splitlines())
        if section == "models.m" and key != "model_path":
            text += "    model_path: o/m\n"
        found = [one for one in load(tmp_path, text) if one.startswith(f"{own}: has no value")]
        default = defaults.get(key, "")
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        if isinstance(default, bool | int | float | str):
            told = f" ({shown})" if default != "" else ""
            assert found == [f"{own}: has no value; remove the key to keep the default{told}"]
        elif key != "model_path":
            assert found == [], own
