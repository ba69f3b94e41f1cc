"""What is found out about a criu before it is used: a program that cannot run says why."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from llmux.drivers.criu.driver import Criu
from llmux.drivers.images.store import ImageStore

LOADER = "criu: /lib/libc.so.6: version `GLIBC_2.38' not found (required by criu)"


def probe(directory: Path, script: str) -> tuple[str, ...]:
    program = directory / "criu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    images = directory / "images"
    images.mkdir()
    criu = Criu(
        cast("Any", None), ImageStore(str(images)), str(images), criu_path=str(program)
    )  # no unit is started to ask it
    return asyncio.run(criu.check()).problems


def test_a_criu_that_the_loader_refuses_says_what_is_missing(tmp_path: Path) -> None:
    problems = probe(tmp_path, f'echo "{LOADER}" >&2; exit 1'.replace("`", r"\`"))
    assert len(problems) == 1
    assert problems[0].startswith(f"`{tmp_path}/criu --version` fails: ")
    assert "GLIBC_2.38' not found" in problems[0]


def test_an_old_criu_is_named_with_its_version(tmp_path: Path) -> None:
    problems = probe(tmp_path, 'echo "Version: 3.17.1"')
    assert f"{tmp_path}/criu is version 3.17.1, 4.1 or later is needed" in problems
