"""Names that clients may use, and the gateway's own keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmux.config.load import load_config, load_marked
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


@pytest.mark.parametrize(
    ("claims", "noted"),
    [
        ((0.5, 0.5), {"m0", "m1"}),
        ((0.25, 0.25, 0.25, 0.25, 0.25), {"m0", "m1", "m2", "m3"}),
        ((0.9, 0.08), {"m0", "m1"}),
        ((0.9, 0.9), set()),  # never together
        ((0.4, 0.4), set()),
        ((1.0,), set()),
    ],
)
def test_claims_that_leave_no_room_for_contexts_are_noted(
    claims: tuple[float, ...], noted: set[str], tmp_path: Path
) -> None:
    models = {f"m{i}": {"model_path": "o/m", "gpu_memory": c} for i, c in enumerate(claims)}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"models": models}))
    notes = load_marked(file).notes
    assert len(notes) == bool(noted)
    for note in notes:
        assert set(note.message.partition(" fit together")[0].split(", ")) == noted
        assert note.path.endswith(".gpu_memory")


def test_secrets_on_a_command_line_are_noted(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    args = ["--hf-token", "x", "--tokenizer=org/t", "--max-num-batched-tokens", "8"]
    file.write_text(json.dumps({"models": {"a": {"model_path": "o/a", "extra_args": args}}}))
    (note,) = load_marked(file).notes
    assert note.path == "models.a.extra_args[0]"
    assert "--hf-token shows in the process list" in note.message


LONG = ["--max-model-len", "32768"]


@pytest.mark.parametrize(
    ("changes", "noted"),
    [
        ({}, True),
        ({"policy": {"drain_timeout_secs": 120}}, False),  # it was meant
        ({"policy": {"drain_before_switch": False}}, False),
        ({"args": ["--max-model-len", "8192"]}, False),  # 82 s
        ({"args": []}, False),  # not known
        ({"never_evict": True, "gpu_memory": 0.4}, False),
        ({"gpu_memory": 0.4}, False),  # they never leave for each other
        ({"gpu_memory": 0.4, "exclusive": [["a", "b"]]}, True),
    ],
)
def test_answers_that_the_default_drain_would_cut_are_noted(
    changes: dict[str, Any], noted: bool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        key: changes[key] for key in ("gpu_memory", "never_evict") if key in changes
    }
    top = {key: changes[key] for key in ("policy", "exclusive") if key in changes}
    a: dict[str, Any] = {"model_path": "o/a", "extra_args": changes.get("args", LONG), **settings}
    b = {**a, "never_evict": False, "extra_args": []}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**top, "models": {"a": a, "b": b}}))
    notes = load_marked(file).notes
    assert [note.path for note in notes] == ["models.a"] * noted
    for note in notes:
        assert "answers of a may be cut" in note.message
        assert "328" in note.message
