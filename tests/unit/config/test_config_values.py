"""Single values, checks that need a made-up host, and the fuzz test."""

from __future__ import annotations

import itertools
import json
import os
import pwd
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmux.config import keys
from llmux.config.host import check_embedded, check_host
from llmux.config.keyfile import without_key
from llmux.config.load import load_config, load_marked
from llmux.config.quantities import format_duration, format_size, parse_duration, parse_size
from llmux.config.schema import (
    CheckpointConfig,
    Config,
    Eviction,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
    Process,
    Weights,
)
from llmux.errors import ConfigError


def load(tmp_path: Path, text: str, name: str = "c.yaml") -> Config:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def one_model(tmp_path: Path, settings: str) -> ModelConfig:
    return load(tmp_path, f"models: {{m: {{model_path: org/m, {settings}}}}}").models["m"]


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return [f"{problem.path}: {problem.message}" for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ("limits: {memory_max: }", "limits.memory_max"),
        ("limits: {ip_address_deny: }", "limits.ip_address_deny"),
        ("limits: {tasks_max: null}", "limits.tasks_max"),
    ],
)
def test_a_key_without_a_value_is_no_setting(tmp_path: Path, settings: str, where: str) -> None:
    """Of those, too, that have no default to be told: a limit that was meant would not be set."""
    text = f"models: {{m: {{model_path: org/m, {settings}}}}}"
    why = "has no value; remove the key to keep the default"
    assert problems(tmp_path, text) == [f"models.m.{where}: {why}"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("250ms", 0.25), ("1h", 3600), ("1h30m", 5400), ("1.5s", 1.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "s", "30 s", "-1s", "1h 30m", "1us", "1S", "1e3s", "٣s"]
)
def test_not_durations(text: str) -> None:
    assert parse_duration(text) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 * 1024**3),
        ("500MB", 500_000_000),
        ("1.5 kB", 1500),
        ("7B", 7),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "20", "20G", "20gib", "-1GB", "GB", "1  GB", "1GBs"])
def test_not_sizes(text: str) -> None:
    assert parse_size(text) is None


@given(st.integers(1, 10**7))
def test_printed_durations_and_sizes_read_back(value: int) -> None:
    assert parse_duration(format_duration(value)) == value
    assert parse_size(format_size(value)) == value


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"), (0.25, "250ms"), (1, "1s"), (90, "90s"), (120, "2m"), (5400, "90m"),
        (7200, "2h"), (86400, "1d"), (129600, "36h"), (604800, "7d"),
    ],
)  # fmt: skip
def test_a_duration_is_written_in_its_largest_whole_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize("pair", list(itertools.product(Weights, Process)), ids="+".join)
def test_all_fifteen_evictions_are_legal_in_both_forms(
    pair: tuple[Weights, Process], tmp_path: Path
) -> None:
    weights, process = pair
    as_text = one_model(tmp_path, f"eviction: {weights}+{process}")
    as_mapping = one_model(tmp_path, f"eviction: {{weights: {weights}, process: {process}}}")
    assert as_text.eviction == as_mapping.eviction == Eviction(weights, process)


def test_a_ladder_may_end_in_the_word_stop(tmp_path: Path) -> None:
    ladder = "eviction: [offload+keep_running, discard+cuda_suspend, discard+checkpoint, stop]"
    read = one_model(tmp_path, ladder)
    assert read.ladder[-1] == one_model(tmp_path, "eviction: stop").eviction
    assert [rung.process for rung in (read.eviction, *read.ladder)] == [
        Process.KEEP_RUNNING, Process.CUDA_SUSPEND, Process.CHECKPOINT, Process.STOP,
    ]  # fmt: skip


def test_a_models_own_eviction_wins_over_the_policys(tmp_path: Path) -> None:
    text = (
        "policy: {eviction: retain+freeze}\n"
        "models: {a: {model_path: org/a}, b: {model_path: org/b, eviction: discard+stop}}\n"
    )
    evictions = {str(model.eviction) for model in load(tmp_path, text).models.values()}
    assert evictions == {"retain+freeze", "discard+stop"}


@pytest.mark.parametrize(
    "args",
    [
        "--gpu-memory-utilization, 0.5",
        "--gpu-memory-utilization=0.5",
        '--gpu_memory_utilization, "0.5"',
    ],
)
def test_gpu_memory_is_taken_from_the_engines_arguments(args: str, tmp_path: Path) -> None:
    assert one_model(tmp_path, f"extra_args: [{args}]").gpu_memory == 0.5
    assert one_model(tmp_path, f"gpu_memory: 0.5, extra_args: [{args}]").gpu_memory == 0.5


def test_gpu_memory_defaults_to_that_of_vllm(tmp_path: Path) -> None:
    assert one_model(tmp_path, "").gpu_memory == 0.9


@pytest.mark.parametrize(
    "args", ["--tensor-parallel-size, 2", "--tensor-parallel-size=2", "-tp, 2", "-tp=2"]
)
def test_tensor_parallelism_is_seen_in_every_form(args: str, tmp_path: Path) -> None:
    assert one_model(tmp_path, f"extra_args: [{args}]").gpus == (0, 1)
    assert one_model(tmp_path, f"gpus: 4, extra_args: [{args}]").gpus == 4
    model = f"{{m: {{model_path: org/m, extra_args: [{args}], %s}}}}"
    for process in ("cuda_suspend", "checkpoint"):
        suspended = f"models: {model % f'eviction: retain+{process}'}"
        (problem,) = problems(tmp_path, suspended)
        assert problem.startswith(f"models.m.eviction: cannot use {process} with a model on 2 GPUs")
    (problem,) = problems(tmp_path, f"models: {model % 'gpus: [1]'}")
    assert problem.startswith("models.m.extra_args[0]: vLLM is told to use 2 GPUs")
    opted_in = (
        f"extra_args: [{args}], eviction: retain+checkpoint, allow_tensor_parallel_parking: yes"
    )
    assert one_model(tmp_path, opted_in).allow_tensor_parallel_parking


def test_one_gpu_may_be_parked_in_any_way(tmp_path: Path) -> None:
    assert one_model(tmp_path, "extra_args: [-tp, 1], eviction: retain+cuda_suspend")


def test_hub_ids_are_not_looked_for_on_disk(tmp_path: Path) -> None:
    assert one_model(tmp_path, "").model_path == "org/m"


def test_a_file_that_may_not_be_looked_at_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> os.stat_result:
        raise PermissionError(13, "Permission denied", path)

    text = (
        "models: {m: {model_path: /secret/m, checkpoint_path: /secret/i, vllm_command: /secret/v}}"
    )
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr("llmux.config.host.os.stat", refuse)
        assert load_config(path).models["m"].model_path == "/secret/m"


@pytest.mark.parametrize("process", ["cuda_suspend", "checkpoint"])
def test_a_host_without_the_tools_is_told_with_their_place(process: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"vllm_command: no-such-vllm\nengine_user: no-such-user\n"
        f"checkpoint: {{criu_path: no-such-criu, cuda_checkpoint_path: /no/tool,"
        f" cuda_plugin_dir: /no/dir}}\n"
        f"models: {{m: {{model_path: org/m, eviction: retain+{process}, vllm_command: absent}}}}\n"
    )
    marked = load_marked(path)
    found = {problem.path: problem for problem in check_host(marked.config, marked.marks)}
    expected = {
        "vllm_command": 1,
        "engine_user": 2,
        "models.m.vllm_command": 4,
        "checkpoint.cuda_checkpoint_path": 3,
    }
    if process == "checkpoint":
        expected |= {"checkpoint.criu_path": 3, "checkpoint.cuda_plugin_dir": 3}
    assert {place: problem.line for place, problem in found.items()} == expected
    assert "useradd" in found["engine_user"].message
    assert len(check_host(marked.config)) == len(expected), "the places are optional"


def test_a_fit_host_has_no_problems() -> None:
    user = pwd.getpwuid(os.getuid()).pw_name
    model = ModelConfig("m", "org/m", eviction=Eviction(Weights.RETAIN, Process.CHECKPOINT))
    config = Config(
        models={"m": model},
        vllm_command=("sh",),
        engine_user=user,
        checkpoint=CheckpointConfig(criu_path="/bin/sh"),
    )
    assert check_host(config) == ()


def test_without_systemd_some_evictions_are_refused() -> None:
    models = {
        process.value: ModelConfig(process.value, "org/m", eviction=Eviction(process=process))
        for process in Process
    }
    refused = [problem.path for problem in check_embedded(Config(models=models))]
    assert refused == [
        "models.freeze.eviction",
        "models.cuda_suspend.eviction",
        "models.checkpoint.eviction",
    ]


def test_the_file_format_has_exactly_the_fields_of_the_schema() -> None:
    def names(cls: type) -> set[str]:
        return {field.name for field in fields(cls)}

    # the rungs of the ladder are written as a list in `eviction`
    assert set(keys.MODEL.parsers) == names(ModelConfig) - {"name", "ladder"}
    assert set(keys.POLICY.parsers) == names(PolicyConfig) | {"eviction"} | set(keys.POLICY.idle)
    assert set(keys.CHECKPOINT.parsers) == names(CheckpointConfig)
    assert set(keys.GATEWAY.parsers) == names(GatewayConfig)
    assert set(keys.TOP.parsers) == names(Config) - {"sources"}


WORDS = sorted(
    {*keys.TOP.parsers, *keys.MODEL.parsers, *keys.POLICY.parsers, "weights", "sleep_level"}
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["retain+stop", "-tp=2", "--port", "30s", "1GiB", "org/m", "/", "0.5", "<<", "~"]
    ),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner, max_size=6)
    ),
    max_leaves=25,
)
QUICK = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def load_or_config_error(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        load_config(path)
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.line >= 1
            assert problem.column >= 1
            assert "\n" not in str(problem)
            str(problem).encode()


@QUICK
@given(st.text() | st.text("{}[]:,&*<-?!|>'\"#%@`\\ \n\tab01.e~=", max_size=60))
@example("&a [*a]")
@example("models: &a {<<: *a}")
@example("%YAML 99999.1\n---\n{}")
@example("? {a: b}\n: 1")
@example("port: !!int ''")
@example("port: 1e99999")
@example("=: <<")
def test_any_text_loads_or_is_a_config_error(tmp_path: Path, text: str) -> None:
    data = text.encode(errors="surrogatepass")
    load_or_config_error(tmp_path / "any.yaml", data)
    load_or_config_error(tmp_path / "any.json", data)


@QUICK
@given(st.binary())
def test_any_bytes_load_or_are_a_config_error(tmp_path: Path, data: bytes) -> None:
    load_or_config_error(tmp_path / "any.yaml", data)


@QUICK
@given(st.dictionaries(st.sampled_from(WORDS), TREES, max_size=5), st.lists(TREES, max_size=3))
def test_any_values_load_or_are_a_config_error(
    tmp_path: Path, tree: dict[str, object], models: list[object]
) -> None:
    if models:
        tree = {**tree, "models": {f"m{i}": model for i, model in enumerate(models)}}
    load_or_config_error(tmp_path / "any.yaml", yaml.safe_dump(tree, allow_unicode=True).encode())
    load_or_config_error(tmp_path / "any.json", json.dumps(tree).encode())


def test_an_image_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    (tmp_path / "c.yaml").write_text(
        f"models: {{m: {{model_path: org/m, checkpoint_path: {tmp_path}/image}}}}\n"
    )
    with pytest.raises(ConfigError, match=f"checkpoint: {tmp_path}/image is not a directory"):
        load_config(tmp_path / "c.yaml")


def test_what_is_no_key_stays_in_a_file_of_keys() -> None:
    """Comments and empty lines; a list in YAML is written again as lines."""
    lines = '# of the team\n\n{"name": "a"}\n  # theirs\n{"name": "b"}\n'
    assert without_key(lines, "a") == '# of the team\n\n  # theirs\n{"name": "b"}\n'
    assert without_key(lines, "nobody") == lines
    assert without_key("- name: a\n- name: b\n", "a") == '{"name": "b"}\n'


def test_a_network_may_be_written_with_an_address_of_it(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "models:\n  m:\n    model_path: org/m\n"
        "    limits: {ip_address_allow: [10.1.2.3/8, 192.0.2.7, localhost]}\n"
    )
    allowed = load_config(tmp_path / "c.yaml").models["m"].limits.ip_address_allow
    assert allowed == ("10.0.0.0/8", "192.0.2.7/32", "127.0.0.0/8", "::1/128")


@pytest.mark.parametrize("own", [None, 0.0, 7.0])
def test_a_models_own_timeout_goes_before_that_of_all(own: float | None) -> None:
    one = ModelConfig("m", "org/m", idle_timeout_secs=own, startup_timeout_secs=own)
    config = Config(
        models={"m": one}, policy=PolicyConfig(idle_timeout_secs=30.0), startup_timeout_secs=60.0
    )
    assert config.idle_timeout(one) == (30.0 if own is None else own)
    assert config.startup_timeout(one) == (60.0 if own is None else own)


@pytest.mark.parametrize(
    "wrong",
    [
        "eviction: nonsense",
        "eviction: {weights: offload}",
        "allow_tensor_parallel_parking: nonsense",
        "extra_args: {tp: 2}",
    ],
)
def test_what_is_wrong_itself_is_not_judged_with_the_rest(tmp_path: Path, wrong: str) -> None:
    """Two GPUs cannot be parked so; who mistyped how is told of that alone."""
    settings = {
        "gpus": "gpus: 2",
        "extra_args": "extra_args: [-tp=2]",
        "eviction": "eviction: offload+checkpoint",
    }
    settings[wrong.partition(":")[0]] = wrong
    policy = "policy: {eviction: offload+checkpoint}"
    right = [value for key, value in settings.items() if value != wrong]
    model = "{model_path: org/m, " + ", ".join([*right, wrong]) + "}"
    (found,) = problems(tmp_path, f"{policy}\nmodels: {{m: {model}}}")
    assert found.startswith(f"models.m.{wrong.partition(':')[0]}")
