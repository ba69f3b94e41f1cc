"""What a reload changes, and when it takes effect."""

from __future__ import annotations

from dataclasses import fields, replace

from llmux.config.diff import (
    MODEL_EFFECTS,
    ConfigDiff,
    Effect,
    ModelChange,
    diff_config,
    setting_effect,
)
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

A = ModelConfig("a", "org/a")
B = ModelConfig("b", "org/b")
BASE = Config(models={"a": A, "b": B})


def test_the_same_configuration_from_other_files_is_no_change() -> None:
    diff = diff_config(BASE, replace(BASE, sources=("elsewhere",)))
    assert diff == ConfigDiff()
    assert not diff


def test_models_come_and_go() -> None:
    new = replace(BASE, models={"b": B, "c": ModelConfig("c", "org/c")})
    diff = diff_config(BASE, new)
    assert diff == ConfigDiff(added=("c",), removed=("a",))
    assert diff


def test_what_an_engine_was_started_with_waits_for_its_restart() -> None:
    changed = replace(
        A,
        model_path="org/z",
        port=8001,
        gpu_memory=0.5,
        eviction=Eviction(Weights.OFFLOAD, Process.FREEZE),
        stop_grace_secs=1,
    )
    diff = diff_config(BASE, replace(BASE, models={"a": changed, "b": B}))
    assert diff.changed == (
        ModelChange(
            "a",
            live=("eviction", "stop_grace_secs"),
            engine_restart=("model_path", "port", "gpu_memory"),
        ),
    )


def test_the_top_level_command_changes_the_models_that_use_it() -> None:
    own = replace(B, vllm_command=("/opt/vllm",))
    old = replace(BASE, models={"a": A, "b": own})
    diff = diff_config(old, replace(old, vllm_command=("vllm2",)))
    assert [change.name for change in diff.changed] == ["a"]
    assert diff.changed[0].engine_restart == ("vllm_command",)
    assert diff.live == ("vllm_command",)


def test_naming_the_command_that_is_used_anyway_is_no_change() -> None:
    named = replace(A, vllm_command=BASE.vllm_command)
    assert not diff_config(BASE, replace(BASE, models={"a": named, "b": B})).changed


def test_settings_are_sorted_by_who_must_restart() -> None:
    new = replace(
        BASE,
        policy=PolicyConfig(min_active_secs=1),
        checkpoint=CheckpointConfig(images_dir="/srv", keep_images=False),
        gateway=GatewayConfig(workers=2),
        port=3001,
        engine_user="vllm",
        warmup=True,
    )
    assert diff_config(BASE, new) == ConfigDiff(
        live=("policy.min_active_secs", "checkpoint.keep_images", "warmup"),
        gateway_restart=("gateway.workers", "port"),
        supervisor_restart=("checkpoint.images_dir", "engine_user"),
    )


def test_every_field_of_the_schema_has_an_effect() -> None:
    assert set(MODEL_EFFECTS) == {field.name for field in fields(ModelConfig)} - {"name"}
    assert set(MODEL_EFFECTS.values()) == {Effect.LIVE, Effect.ENGINE}
    for field in fields(Config):
        if field.name not in ("models", "sources"):
            assert setting_effect(field.name) is not Effect.ENGINE
