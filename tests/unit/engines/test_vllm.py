"""What is read from vLLM's arguments."""

from __future__ import annotations

import json

import pytest

from llmux.config.schema import ModelConfig
from llmux.engines.vllm import argument_faults, cache_apart, discards_cache


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--lora-modules sql=/srv/sql two=/srv/two --dtype auto", ("sql", "two")),
        ("--enable-lora --lora-modules=sql=/srv/sql rest", ("sql",)),
        ("--lora_modules a=/a --lora-modules b=/b a=/c", ("a", "b")),
        ('--lora-modules {"name":"x/y","path":"/srv"} {broken', ("x/y",)),
        ("--lora-modules", ()),
        ("--enable-lora --max-loras 4", ()),
    ],
)
def test_adapters_are_found_in_the_arguments(arguments: str, names: tuple[str, ...]) -> None:
    assert ModelConfig("m", "org/m", extra_args=tuple(arguments.split())).adapters == names


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ("--lora-modules sql=/srv/sql --dtype auto", {}),
        ('--lora-modules {"name":"x","path":"/srv"}', {}),
        ("--lora-modules {broken ok=/srv", {1: "{broken"}),
        ('--lora-modules {"name":"x"}', {1: '{"name":"x"}'}),
        ('--lora-modules {"path":"/srv"} ["x"]', {1: '{"path":"/srv"}', 2: '["x"]'}),
        ('--lora-modules {"name":1,"path":"/srv"}', {1: '{"name":1,"path":"/srv"}'}),
        ('--lora-modules {"name":"x","path":""}', {1: '{"name":"x","path":""}'}),
        ("--lora-modules=sql a=/b", {0: "sql"}),
        ("--lora-modules sql= =/srv", {1: "sql=", 2: "=/srv"}),
    ],
)
def test_adapters_that_end_the_engine_are_found_before_it_starts(
    arguments: str, wrong: dict[int, str]
) -> None:
    """Before, `check` took them, and each start failed."""
    found = dict(argument_faults(arguments.split()))
    assert found == {
        index: "--lora-modules needs NAME=PATH, or a JSON object with name and path, got "
        + json.dumps(word)
        for index, word in wrong.items()
    }


@pytest.mark.parametrize(
    ("arguments", "apart"),
    [
        ("", False),
        ("--enable-sleep-mode", True),
        ("--enable_cumem_allocator", True),
        ("--enable-sleep-mode --no-enable-sleep-mode", False),
        ("--no-enable-cumem-allocator --enable-sleep-mode", True),
    ],
)
def test_the_kv_cache_can_go_alone_in_vllms_own_allocator(arguments: str, apart: bool) -> None:
    assert cache_apart(arguments.split()) is apart


@pytest.mark.parametrize(
    ("version", "can"),
    [("0.32.0", True), ("0.32.1rc1+cu130", True), ("1.0", True), ("0.31.9", False), ("", False)],
)
def test_which_versions_discard_it(version: str, can: bool) -> None:
    assert discards_cache(version) is can
