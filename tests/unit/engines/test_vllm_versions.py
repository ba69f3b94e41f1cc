"""The length that vLLM's arguments allow, and what is known of its versions."""

from __future__ import annotations

import pytest

from llmux.config.schema import ModelConfig
from llmux.engines import ENGINE_TYPES


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ("--max-model-len 4096 --dtype auto", 4096),
        ("--max_model_len=4096", 4096),
        ("--max-model-len 4096 --max-model-len 8192", 8192),
        ("--max-model-len auto", None),
        ("--dtype auto --max-model-len", None),  # its value is missing: the engine says so
        ("--dtype auto", None),
    ],
)
def test_the_length_that_the_arguments_allow(arguments: str, length: int | None) -> None:
    assert ModelConfig("m", "org/m", extra_args=tuple(arguments.split())).max_model_len == length


@pytest.mark.parametrize(
    ("version", "sleeping", "said", "serious"),
    [
        ("0.13.2", True, "older than what llmux is tested with", False),
        ("0.14.0", True, "does not free the weights", True),
        ("0.16.9", False, "does not free the weights", False),
        ("0.17.0", True, None, None),
        ("1.0", True, None, None),
        ("", True, None, None),
        ("dev", True, None, None),  # says nothing of how old it is
    ],
)
def test_faults_of_versions(
    version: str, sleeping: bool, said: str | None, serious: bool | None
) -> None:
    fault = ENGINE_TYPES["vllm"].version_fault(version, sleeping)
    assert (fault is None) is (said is None)
    if fault is not None and said is not None:
        assert said in fault.problem
        assert fault.serious is serious


def test_an_image_does_not_outlive_an_upgrade_of_what_its_processes_run() -> None:
    """Their versions are in its identity; they compile kernels, or hold them."""
    compiled = {"vllm", "torch", "transformers", "triton", "flashinfer_python"}
    assert compiled <= set(ENGINE_TYPES["vllm"].libraries)
