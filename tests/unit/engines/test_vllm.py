"""What is read from vLLM's arguments."""

from __future__ import annotations

import pytest

from llmux.config.schema import ModelConfig


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
