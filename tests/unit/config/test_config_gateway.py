"""Names that clients may use, and the gateway's own keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmux.config.load import load_config
from llmux.config.schema import Config, ModelConfig
from llmux.errors import ConfigError


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    (one,) = caught.value.problems
    return f"{one.path}: {one.message}"


def test_aliases_may_be_any_names(tmp_path: Path) -> None:
    config = load(tmp_path, "models: {a: {model_path: o/a, aliases: [gpt-4o-mini, 'org/A b']}}")
    assert config.models["a"].aliases == ("gpt-4o-mini", "org/A b")


@pytest.mark.parametrize(
    ("aliases", "said"),
    [
        ("[b]", 'models.a.aliases[0]: the name "b" is taken by models.b'),
        ("[x, x]", 'models.a.aliases[1]: the name "x" is taken by models.a.aliases[0]'),
        ("['']", "models.a.aliases[0]: expected a name of up to 200 characters"),
        ("['--port']", "models.a.aliases[0]: expected a name, got the option"),
    ],
)
def test_a_name_belongs_to_one_model(aliases: str, said: str, tmp_path: Path) -> None:
    text = f"models: {{a: {{model_path: o/a, aliases: {aliases}}}, b: {{model_path: o/b}}}}"
    assert problem(tmp_path, text).startswith(said)


def test_the_context_length_is_known_before_the_engine_runs() -> None:
    assert ModelConfig("a", "o/a", extra_args=("--max-model-len", "4096")).max_model_len == 4096
    assert ModelConfig("a", "o/a", extra_args=("--max_model_len=16k",)).max_model_len is None
    assert ModelConfig("a", "o/a").max_model_len is None


@pytest.mark.parametrize("origin", ["https://chat.example.org", "http://[::1]:8080", "'*'"])
def test_origins(origin: str, tmp_path: Path) -> None:
    config = load(tmp_path, f'gateway: {{cors_origins: ["{origin.strip(chr(39))}"]}}')
    assert config.gateway.cors_origins == (origin.strip("'"),)


@pytest.mark.parametrize("origin", ["chat.example.org", "https://x/", "ftp://x", "https://*.x"])
def test_not_origins(origin: str, tmp_path: Path) -> None:
    text = f'gateway: {{cors_origins: ["{origin}"]}}'
    assert problem(tmp_path, text).startswith("gateway.cors_origins[0]: expected an origin")
