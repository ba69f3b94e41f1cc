"""Whole files and everything that is said of them; and what follows from the values together.

``together.txt`` has short files, each with its problems (``!``), its notes (``~``) or ``ok``.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from llmux.config.load import load_config, load_marked
from llmux.config.schema import (
    CheckpointConfig,
    Config,
    Eviction,
    GatewayConfig,
    Limits,
    ModelConfig,
    PolicyConfig,
    Process,
    Weights,
)
from llmux.errors import ConfigError

TOGETHER = Path(__file__).parents[2] / "fixtures" / "config" / "together.txt"
CASES = TOGETHER.read_text(encoding="utf-8").split("---\n")


@pytest.mark.parametrize("case", CASES, ids=range(1, len(CASES) + 1))
def test_everything_that_is_said_of_a_file(case: str, tmp_path: Path) -> None:
    lines = case.splitlines()
    expected = [line for line in lines if line.startswith(("! ", "~ ")) or line == "ok"]
    file = tmp_path / "c.yaml"
    file.write_text("\n".join(lines[: -len(expected)]), encoding="utf-8")
    try:
        said = [f"~ {note}" for note in load_marked(file).notes] or ["ok"]
    except ConfigError as error:
        said = [f"! {problem}" for problem in error.problems]
    assert [line.replace(f"{file}:", "") for line in said] == [
        line.replace("c.yaml:", "") for line in expected
    ]


def test_problems_come_in_the_order_of_files_and_lines(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    files = {
        "config.yaml": "warmup: 1\nport: x\nmodels: {a: {model_path: a, canary: 1, gpus: x}}\n",
        "conf.d/a.yaml": "policy: {x: 1}\nmodels: {b: 7, a: 7}\n",
        "conf.d/0.yaml": "gateway: [\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml")
    places = [f"{Path(one.file).name}:{one.line}:{one.column}" for one in caught.value.problems]
    assert places == [
        "config.yaml:1:9", "config.yaml:2:7", "config.yaml:3:37", "config.yaml:3:46",
        "0.yaml:2:1", "a.yaml:1:10", "a.yaml:2:13", "a.yaml:2:16",
    ]  # fmt: skip
    assert "already in" in caught.value.problems[-1].message
    (tmp_path / "alone.yaml").write_text("port: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "alone.yaml", conf_d=tmp_path / "absent")
    assert [Path(problem.file).name for problem in caught.value.problems] == [
        "alone.yaml",
        "absent",
    ]


def test_what_is_half_read_is_not_judged_together(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.yaml").write_text("models: [")
    (tmp_path / "config.yaml").write_text("preload: [of_the_other_file]\nvllm_command: /no/vllm\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml")
    assert [Path(problem.file).name for problem in caught.value.problems] == ["a.yaml"]


def test_a_missing_file_is_a_problem_a_note_or_not_looked_for(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("vllm_command: /no/vllm\n")
    with pytest.raises(ConfigError, match="cannot run vLLM"):
        load_marked(file)
    (note,) = load_marked(file, tolerate_files=True).notes
    assert "cannot run vLLM" in note.message
    assert load_marked(file, check_files=False).notes == ()
    assert load_marked(file, check_files=False, tolerate_files=True).notes == ()
    assert load_config(file, check_files=False).vllm_command == ("/no/vllm",)


def test_the_places_of_values_and_of_their_items(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "policy: {eviction: [offload+freeze, stop]}\n"
        "preload: [a]\n"
        "models:\n"
        "  a:\n"
        "    model_path: o/a\n"
        "    env: {A: x}\n"
        "    extra_args:\n"
        "      - --eager\n"
    )
    marked = load_marked(file)
    places: dict[Any, tuple[int, int]] = {
        ("policy",): (1, 1),
        ("policy", "eviction"): (1, 20),
        ("policy", "eviction", 1): (1, 37),
        ("preload",): (2, 10),
        ("preload", 0): (2, 11),
        ("models",): (3, 1),
        ("models", "a"): (4, 3),
        ("models", "a", "model_path"): (5, 17),
        ("models", "a", "env"): (6, 5),
        ("models", "a", "env", "A"): (6, 14),
        ("models", "a", "extra_args"): (8, 7),
        ("models", "a", "extra_args", 0): (8, 9),
    }
    for path, place in places.items():
        at = marked.marks.at(path)
        assert (at.line, at.column) == place, path
    model = marked.config.models["a"]
    assert str(model.eviction) == "offload+freeze"
    assert [str(rung) for rung in model.rungs] == ["offload+freeze", "retain+stop"]


def test_where_the_gateway_and_the_metrics_listen() -> None:
    assert Config().listen_addresses() == ("127.0.0.1:3000",)
    assert Config().metrics_addresses() == ("127.0.0.1:9090",)
    assert Config(port=1, metrics_port=2).listen_addresses() == ("127.0.0.1:1",)
    assert Config(port=1, metrics_port=2).metrics_addresses() == ("127.0.0.1:2",)
    named = GatewayConfig(listen=("a:1",), metrics_listen=("b:2", "c:3"))
    assert Config(gateway=named).listen_addresses() == ("a:1",)
    assert Config(gateway=named).metrics_addresses() == ("b:2", "c:3")
    assert Config(gateway=named, metrics_port=0).metrics_addresses() == ()
    assert Config(gateway=named, metrics_port=1).metrics_addresses() == ("b:2", "c:3")


def test_what_follows_from_a_models_settings() -> None:
    image = Eviction(Weights.RETAIN, Process.CHECKPOINT)
    plain = ModelConfig("a", "o/a")
    assert (plain.rungs, plain.makes_images) == ((Eviction(),), False)
    assert ModelConfig("a", "o/a", eviction=image).makes_images
    last = ModelConfig("a", "o/a", ladder=(image, Eviction(process=Process.STOP)))
    assert last.rungs == (Eviction(), image, Eviction(process=Process.STOP))
    assert last.makes_images
    assert plain.ranks == 1
    assert ModelConfig("a", "o/a", extra_args=("-tp", "x", "-pp=2")).ranks == 2
    args = ("-tp", "2", "--pipeline-parallel-size=3", "--lora-modules", "x=/p", "y=/q")
    wide = ModelConfig("a", "o/a", extra_args=args)
    assert (wide.ranks, wide.adapters) == (6, ("x", "y"))
    assert wide.parking_obstacle(image) is not None
    allowed = ModelConfig("a", "o/a", extra_args=args, allow_tensor_parallel_parking=True)
    assert allowed.parking_obstacle(image) is None
    assert plain.parking_obstacle(image) is None


def test_models_without_a_command_have_the_one_of_all() -> None:
    own = ModelConfig("b", "o/b", vllm_command=("own",))
    config = Config(models={"a": ModelConfig("a", "o/a"), "b": own}, vllm_command=("all",))
    resolved = config.resolved()
    assert {name: m.vllm_command for name, m in resolved.models.items()} == {
        "a": ("all",),
        "b": ("own",),
    }
    assert resolved.vllm_command == ("all",)


def test_what_holds_where_nothing_was_written() -> None:
    def numbers(*settings: object) -> dict[str, object]:
        found: dict[str, object] = {}
        for one in settings:
            values = {field.name: getattr(one, field.name) for field in fields(one)}  # type: ignore[arg-type]  # a dataclass
            found |= {k: v for k, v in values.items() if isinstance(v, bool | int | float)}
        return found

    assert numbers(PolicyConfig()) == {
        "request_timeout_secs": 300, "drain_before_switch": True, "drain_timeout_secs": 120,
        "min_active_secs": 5, "coalesce_window_ms": 2000, "amortization_factor": 0.5,
        "max_wait_secs": 15, "give_up_start_secs": 10, "idle_timeout_secs": 0, "backoff_secs": 2,
        "backoff_max_secs": 300,
    }  # fmt: skip
    assert numbers(GatewayConfig()) == {
        "workers": 1, "max_body_bytes": 64 << 20, "max_buffered_bytes": 1 << 30,
        "max_connections": 8192, "drain_timeout_secs": 600, "max_waiting": 1024,
        "max_in_flight": 1024, "keep_alive_comment_secs": 15, "loading_text": False,
        "allow_public_without_keys": False, "ui": True,
    }  # fmt: skip
    assert numbers(Config(), CheckpointConfig(), Limits()) == {
        "port": 3000, "metrics_port": 9090, "warmup": False, "startup_timeout_secs": 1800,
        "keep_images": True, "memory_max_share": 0.95, "tasks_max": 32768,
    }  # fmt: skip
    assert numbers(ModelConfig("a", "o/a")) == {
        "gpu_memory": 0.9, "sleep_timeout_secs": 120, "wake_timeout_secs": 300,
        "checkpoint_timeout_secs": 900, "stop_grace_secs": 10, "stall_timeout_secs": 120,
        "canary": True, "allow_tensor_parallel_parking": False, "priority": 0, "never_evict": False,
    }  # fmt: skip
    assert ModelConfig("a", "o/a").gpus == (0,)
