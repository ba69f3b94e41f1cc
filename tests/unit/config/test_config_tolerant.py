"""A file or a GPU that one model lacks: `llmux check` and a reload refuse it, a start does not."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from llmux.config import host
from llmux.config.files.last_good import LastGood
from llmux.config.load import load_config, load_marked
from llmux.errors import ConfigError

TEXT = """\
gpu_count: 1
models:
  gone: {model_path: /nonexistent/model}
  image: {model_path: m, checkpoint_path: /nonexistent/image}
  wide: {model_path: m, gpus: [3]}
  good: {model_path: m}
"""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Others may pass through it, and through all above it."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to other users")
def test_a_file_that_the_gateway_cannot_read_is_named_with_the_remedy(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "GATEWAY", "nobody")
    file, keys = open_directory / "config.yaml", open_directory / "keys"
    file.write_text(f"gateway: {{keys_file: {keys}}}\nmodels: {{}}\n")
    keys.write_text("")
    keys.chmod(0o600)
    marked = load_marked(file)
    (problem,) = host.check_gateway_reads(marked.config, marked.marks)
    assert (problem.line, problem.path) == (1, "gateway.keys_file")
    assert f"chgrp nobody {keys} && chmod g+rX {keys}" in problem.message
    os.chown(keys, 65534, 0)
    assert host.check_gateway_reads(marked.config, marked.marks) == ()
    os.chown(keys, 0, pwd.getpwnam("nobody").pw_gid)
    assert len(host.check_gateway_reads(marked.config, marked.marks)) == 1
    keys.chmod(0o640)
    assert host.check_gateway_reads(marked.config, marked.marks) == (), "its own group's"
    os.chown(keys, 0, 64999)
    assert len(host.check_gateway_reads(marked.config, marked.marks)) == 1
    member = SimpleNamespace(gr_gid=64999, gr_mem=["nobody"])
    monkeypatch.setattr(grp, "getgrall", lambda: [member])
    assert host.check_gateway_reads(marked.config, marked.marks) == (), "it is a member"
    open_directory.chmod(0o700)
    found = host.check_gateway_reads(marked.config)
    assert [one.path for one in found] == ["", "gateway.keys_file"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(TEXT)
    return file


def test_a_start_serves_the_others_and_names_each(file: Path, tmp_path: Path) -> None:
    marked = LastGood(str(tmp_path / "none")).load(str(file))
    assert list(marked.config.models) == ["gone", "image", "wide", "good"]
    noted = [(note.line, note.path) for note in marked.notes]
    assert noted == [
        (3, "models.gone.model_path"),
        (4, "models.image.checkpoint_path"),
        (5, "models.wide.gpus"),
    ]


def test_a_check_and_a_reload_refuse_all_of_them(file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_marked(file)
    assert [problem.line for problem in refused.value.problems] == [3, 4, 5]


def test_any_other_mistake_still_keeps_a_start_from_it(file: Path, tmp_path: Path) -> None:
    file.write_text(TEXT + "bogus: 1\n")
    with pytest.raises(ConfigError, match="bogus"):
        LastGood(str(tmp_path / "none")).load(str(file))


def test_the_gateway_which_sees_no_files_starts_too(file: Path) -> None:
    assert len(load_config(file, check_files=False).models) == 4
