"""Manual pages, shell completion and examples: made from the code, compared with it, and true."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmux.cli.main import build_parser
from llmux.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from _docs import manual  # noqa: E402

EXAMPLES = sorted((ROOT / "packaging/examples").glob("*.yaml"))


@pytest.mark.parametrize("path", manual.documents(), ids=lambda path: path.name)
def test_the_documents_are_those_of_the_code(path: Path) -> None:
    text = manual.documents()[path]
    assert path.read_text(encoding="utf-8") == text, "run scripts/manual"


def test_every_verb_has_its_page() -> None:
    pages = manual.llmux_1() + manual.llmux_8()
    for verb in manual.commands():
        assert f".SS {manual.escape(verb)}\n" in pages
    assert str(build_parser().description) in manual.llmux_1().replace("\\-", "-")


@pytest.mark.parametrize("key", manual.keys(), ids=lambda key: key.path)
def test_the_example_of_a_key_is_one(key: manual.Key, tmp_path: Path) -> None:
    section, _, name = key.path.rpartition(".")
    if not key.example:
        pytest.fail("a key without a default needs an example")
    model = {"model_path": "m/m"}
    line = f"{name}: {key.example}"
    if section == "models.<name>":
        rest = "" if name == "model_path" else "    model_path: m/m\n"
        text = f"models:\n  m:\n{rest}    {line}\n"
    else:
        body = f"{section}:\n  {line}\n" if section else f"{line}\n"
        partner = {
            "tls_certificate": "tls_key: credential:k",
            "tls_key": "tls_certificate: credential:c",
        }
        body += f"  {partner[name]}\n" if name in partner else ""
        named = dict.fromkeys(("m", "qwen3-8b", "chat", "coder"), model)
        text = f"models: {named}\n{body}"
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    load_config(path, check_files=False)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_configuration_is_good(path: Path) -> None:
    assert load_config(path, check_files=False).models


def complete(*words: str, path: str) -> list[str]:
    script = (
        f". {ROOT}/packaging/completions/llmux; COMP_WORDS=(llmux {' '.join(words)});"
        f' COMP_CWORD={len(words)}; _llmux; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env={"PATH": path}
    )
    return done.stdout.split()


def test_completion_of_verbs_options_and_models(tmp_path: Path) -> None:
    program = tmp_path / "llmux"
    program.write_text('#!/bin/sh\nprintf "MODEL STATE\\nalpha serving\\nbeta parked\\n"\n')
    program.chmod(0o755)
    awk = shutil.which("awk")
    assert awk
    path = f"{tmp_path}:{Path(awk).parent}"
    assert complete("un", path=path) == ["unload", "unpin"]
    assert complete("--verbose", "load", "''", path=path) == ["alpha", "beta"]
    assert "--follow" in complete("logs", "--f", path=path)
