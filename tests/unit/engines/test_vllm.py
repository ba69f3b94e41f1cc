"""What is read from vLLM's arguments."""

from __future__ import annotations

import pytest

from llmux.config.schema import ModelConfig
from llmux.engines.vllm import cache_apart, discards_cache


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
