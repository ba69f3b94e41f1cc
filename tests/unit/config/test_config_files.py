"""Good files load to the expected values; bad ones give exactly the text beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmux.config.load import load_config, load_marked
from llmux.config.schema import (
    CheckpointConfig,
    Config,
    Eviction,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
    PolicyType,
    Process,
    Weights,
)
from llmux.errors import ConfigError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "config"
GOOD = FIXTURES / "good"
BAD = FIXTURES / "bad"


def bad_cases() -> list[str]:
    return sorted(path.name for path in BAD.iterdir() if path.suffix != ".txt")


@pytest.mark.parametrize("name", bad_cases())
def test_a_bad_file_gives_every_problem_in_file_order(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(BAD)
    path = Path(name) / "config.yaml" if Path(name).is_dir() else Path(name)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = "".join(f"{problem}\n" for problem in caught.value.problems)
    assert text == Path(f"{name}.txt").read_text(encoding="utf-8")


def test_the_config_of_the_users_guide_loads_unchanged() -> None:
    path = GOOD / "guide.json"
    eviction = Eviction(Weights.DISCARD, Process.CHECKPOINT)
    sizes = {"0.6": 8001, "1.7": 8002, "4": 8003}
    assert load_config(path) == Config(
        models={
            f"qwen3-{size}b": ModelConfig(
                name=f"qwen3-{size}b",
                model_path=f"Qwen/Qwen3-{size}B",
                port=port,
                eviction=eviction,
            )
            for size, port in sizes.items()
        },
        policy=PolicyConfig(request_timeout_secs=300),
        checkpoint=CheckpointConfig(
            criu_path="/usr/local/bin/criu",
            cuda_plugin_dir="/usr/lib/criu/",
            images_dir="/tmp/llmux-checkpoints",
            cuda_checkpoint_path="/usr/local/bin/cuda-checkpoint",
            keep_images=True,
        ),
        port=3000,
        sources=(str(path),),
    )


def test_every_key_is_read() -> None:
    path = GOOD / "full.yaml"
    assert load_config(path) == Config(
        models={
            "big": ModelConfig(
                name="big",
                model_path="org/big",
                port=8001,
                eviction=Eviction(Weights.OFFLOAD, Process.FREEZE),
                extra_args=(
                    "--tensor-parallel-size",
                    "2",
                    "--max-model-len",
                    "4096",
                    "--gpu-memory-utilization=0.80",
                ),
                env={"HF_HUB_OFFLINE": "1", "NAME": "text"},
                checkpoint_path="/",
                gpus=(2, 3),
                gpu_memory=0.8,
                gpu_memory_parked=0.05,
                vllm_command=("/bin/sh", "-c"),
                startup_timeout_secs=5400,
                sleep_timeout_secs=0.25,
                wake_timeout_secs=60.5,
                stop_grace_secs=0,
                stall_timeout_secs=120,
                canary=False,
                allow_tensor_parallel_parking=True,
            ),
            "small": ModelConfig(
                name="small",
                model_path="/",
                eviction=Eviction(Weights.DISCARD, Process.KEEP_RUNNING),
                gpus=1,
                gpu_memory=0.25,
                priority=-3,
                never_evict=True,
                idle_timeout_secs=1800,
            ),
        },
        policy=PolicyConfig(
            policy_type=PolicyType.TIME_SLICE,
            request_timeout_secs=600,
            drain_before_switch=False,
            drain_timeout_secs=30,
            min_active_secs=1,
            coalesce_window_ms=1000,
            amortization_factor=1,
            max_wait_secs=20,
            give_up_start_secs=3,
            idle_timeout_secs=3600,
            backoff_secs=1,
            backoff_max_secs=60,
        ),
        checkpoint=CheckpointConfig(
            criu_path="/usr/sbin/criu",
            cuda_plugin_dir="/usr/lib/criu",
            images_dir="/srv/images",
            cuda_checkpoint_path="cuda-checkpoint",
            keep_images=False,
            max_bytes=200 * 1024**3,
        ),
        gateway=GatewayConfig(
            allow_public_without_keys=True,
            listen=("0.0.0.0:80", "[::1]:3000", "localhost:3001", "unix:/run/llmux/http.sock"),
            workers=4,
            max_body_bytes=1_500_000,
            max_waiting=10,
            fallback_model="small",
        ),
        port=3002,
        metrics_port=0,
        vllm_command=("/bin/sh",),
        engine_user="nobody",
        gpu_count=4,
        warmup=True,
        preload=("small", "big"),
        exclusive=(("big", "small"),),
        startup_timeout_secs=900,
        sources=(str(path),),
    )


@pytest.mark.parametrize("name", ["tabs.json", "tabs_in_a_yaml_name.yaml"])
def test_json_with_tabs_exponents_and_surrogate_pairs_loads(name: str) -> None:
    model = load_config(GOOD / name).models["m"]
    assert model.sleep_timeout_secs == 100
    assert model.env == {"A": "\U0001f600/"}


@pytest.mark.parametrize("name", ["empty.yaml", "commented_out.yaml"])
def test_a_server_without_models_is_allowed(name: str) -> None:
    path = GOOD / name
    assert load_config(path) == Config(sources=(str(path),))


def test_the_packaged_example_loads() -> None:
    assert load_config(Path(__file__).parents[3] / "packaging" / "config.yaml").models == {}


def test_anchors_and_merge_keys_are_followed() -> None:
    models = load_config(GOOD / "anchors.yaml").models
    assert [model.model_path for model in models.values()] == [
        "org/first",
        "org/second",
        "org/third",
    ]
    assert models["second"].eviction == Eviction(Weights.OFFLOAD, Process.KEEP_RUNNING)
    assert models["third"].extra_args == ("--max-model-len", "4096")
    assert models["third"].eviction == Eviction()


def test_drop_ins_add_models_and_override_keys_in_name_order() -> None:
    config = load_config(GOOD / "drop_in" / "config.yaml")
    assert list(config.models) == ["a", "b"]
    assert config.port == 3002
    assert config.policy.min_active_secs == 4
    assert config.policy.max_wait_secs == 2
    assert {model.eviction for model in config.models.values()} == {
        Eviction(Weights.RETAIN, Process.FREEZE)
    }
    assert [Path(source).name for source in config.sources] == [
        "config.yaml",
        "10-more.yaml",
        "20-last.yaml",
    ]


def test_only_config_yaml_has_drop_ins_unless_a_folder_is_named(tmp_path: Path) -> None:
    alone = tmp_path / "other.yaml"
    alone.write_text("port: 3001\n")
    drop_ins = tmp_path / "conf.d"
    drop_ins.mkdir()
    (drop_ins / "a.yaml").write_text("port: 3002\n")
    assert load_config(alone).port == 3001
    assert load_config(alone, conf_d=drop_ins).port == 3002


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot read the file: no such file or directory"),
        (lambda path: path.mkdir(), "cannot read the file: is a directory"),
        (
            lambda path: path.write_bytes(b" " * (8 * 1024**2 + 1)),
            "cannot read the file: larger than",
        ),
    ],
    ids=["absent", "folder", "huge"],
)
def test_an_unreadable_file_is_a_problem_of_its_own(make, message, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # three lambdas
    path = tmp_path / "config.yaml"
    make(path)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.column, problem.path) == (str(path), 1, 1, "")
    assert message in problem.message


def test_a_named_folder_of_drop_ins_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("")
    with pytest.raises(ConfigError, match="cannot list the folder: no such file"):
        load_config(path, conf_d=tmp_path / "absent")


def test_missing_files_are_let_through_for_a_sandboxed_process() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(BAD / "files.yaml", check_files=False)
    assert [problem.line for problem in caught.value.problems] == [12, 14, 16]


def test_the_same_problem_in_an_anchor_is_told_for_each_model_that_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("models:\n  a: &a {model_path: org/a, port: 0}\n  b: *a\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [problem.path for problem in caught.value.problems] == ["models.a.port", "models.b.port"]


def test_nested_aliases_do_not_explode(tmp_path: Path) -> None:
    lines = ["models:", "  m0: &m0 {env: {A: b}}"]
    for level in range(1, 40):
        merged = ", ".join([f"*m{level - 1}"] * 9)
        lines.append(f"  m{level}: &m{level} {{<<: [{merged}], extra_args: [{merged}]}}")
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError):
        load_config(path)


def test_values_keep_their_places_for_later_problems() -> None:
    marked = load_marked(GOOD / "full.yaml")
    at = marked.marks.at
    assert (at(("models", "big", "port")).line, at(("models", "big", "port")).column) == (4, 11)
    assert at(("models", "big", "extra_args", 2)).column == 45
    assert at(("models", "small", "port")).line == 19, "a default: the model that has it"
    assert at(("policy", "eviction", "process")).line == 28
    assert at(("nothing", "such")).line == 1
    problem = marked.marks.problem(("engine_user",), "cannot be")
    assert str(problem) == f"{GOOD / 'full.yaml'}:59:14: engine_user: cannot be"
