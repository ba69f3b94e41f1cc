"""What is read from vLLM's arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmux.config.schema import ModelConfig
from llmux.engines.vllm import (
    OWNED_OPTIONS,
    READ_OPTIONS,
    argument_faults,
    cache_apart,
    discards_cache,
)

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--lora-modules sql=/srv/sql two=/srv/two --dtype auto", ("sql", "two")),
        ("--enable-lora --lora-modules=sql=/srv/sql rest", ("sql",)),
        ("--lora_modules a=/a --lora-modules b=/b a=/c", ("b", "a")),
        ("--lora-modules q=/x --max-lora-rank 8 --lora_modules=r=/y", ("r",)),
        ("--lora-modules q=/x --lora-modules", ()),
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
        ("--lora-modules p=/a,b q=/c=d", {1: "p=/a,b"}),
        ("--lora-modules=sql --lora-modules ok=/b", {0: "sql"}),
    ],
)
def test_adapters_that_end_the_engine_are_found_before_it_starts(
    arguments: str, wrong: dict[int, str]
) -> None:
    """Before, `check` took them, and each start failed."""
    found = dict(argument_faults(arguments.split()))
    assert found == {
        index: "--lora-modules needs NAME=PATH without a comma, or a JSON object with name and "
        f"path, got {json.dumps(word)}"
        for index, word in wrong.items()
    }


@pytest.mark.parametrize(
    ("arguments", "name", "option"),
    [
        ("--lora-mod sql=/a", "--lora-mod", "--lora-modules"),
        ("--lora-modules.name sql", "--lora-modules.name", "--lora-modules"),
        ("--lora_mod.path=/a", "--lora-mod.path", "--lora-modules"),
        ("--gpu-mem=0.3", "--gpu-mem", "--gpu-memory-utilization"),
        ("--device-mem 0.3", "--device-mem", "--device-memory-utilization"),
        ("--max_model 9", "--max-model", "--max-model-len"),
        ("--tensor_parallel-si=2", "--tensor-parallel-si", "--tensor-parallel-size"),
        ("-t 2", "-t", "-tp"),
        ("--enable-sl", "--enable-sl", "--enable-sleep-mode"),
        ("--no-enable-cu", "--no-enable-cu", "--no-enable-cumem-allocator"),
        ("--confi x.yaml", "--confi", "--config"),
        ("--hf-tok secret", "--hf-tok", "--hf-token"),
    ],
)
def test_a_shortened_option_is_to_be_written_out(arguments: str, name: str, option: str) -> None:
    """vLLM's parser takes it for the whole one; llmux, which looks for whole names, did not."""
    text = f"cannot pass {name} to vLLM, which takes it for {option}: write it out"
    assert dict(argument_faults(arguments.split())) == {0: text}


@pytest.mark.parametrize("name", ["--ud", "--por", "--served_model", "--api", "--hos", "--model.x"])
def test_a_shortened_option_that_llmux_sets_is_refused_as_the_whole_one_is(name: str) -> None:
    option = next(option for option in OWNED_OPTIONS if option.startswith(name[:5]))
    (text,) = dict(argument_faults((f"{name}=1",))).values()
    assert text.endswith(f"which takes it for {option}: {OWNED_OPTIONS[option]}")


def test_no_option_of_vllm_s_own_is_taken_for_a_shortened_one() -> None:
    """Those of vLLM 0.32, what its parser prints; a dash alone and what is no option are none."""
    known = (FIXTURES / "vllm_options.txt").read_text().split()
    assert len(known) == 430
    assert {*READ_OPTIONS} <= {*known}
    assert list(argument_faults([*known, "--device", "--", "-", "-1", "lora", "--porta"])) == []


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
