"""The engine's output in a real journal, under the engine's own unit. Run inside a guest."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
from pathlib import Path
from typing import Any

from rigs import DEADLINE, units_rig

from llmux.drivers.engine.output import EngineFiles
from llmux.drivers.systemd.journal import JournalHandler


def journal(*words: str) -> list[dict[str, Any]]:
    subprocess.run(["journalctl", "--sync"], check=True)
    command = ["journalctl", "--output=json", "--no-pager", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def append(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def test_lines_stand_under_the_engines_unit_with_their_level(tmp_path: Path) -> None:
    async def body() -> str:
        async with units_rig("systemd", tmp_path) as rig:
            heard = asyncio.Queue[str]()
            output = EngineFiles(str(tmp_path), on_line=lambda _, line: heard.put_nowait(line))
            output.paths("talker")  # before the start, as launch_spec does: from here on all counts
            # Its last words come when it is about to die: they must be attributed all the same.
            script = (
                "echo 'INFO 11-21 20:00:00 [api_server.py:1] started';"
                "echo '(EngineCore_DP0 pid=7) ERROR 11-21 boom' >&2; echo 'a\tb' ; sleep 1000"
            )
            handle = await rig.units.start(rig.spec("talker", ("/bin/sh", "-c", script)), DEADLINE)
            output.attach(handle)
            async with asyncio.timeout(DEADLINE):
                for _ in range(3):
                    await heard.get()
            await rig.units.kill(handle, DEADLINE)
            append(output.paths("talker")[0], "x" * 300_000 + "\nlast words")
            output.detach("talker")
            assert output.dropped == 0
            await output.close()
            return handle.unit

    unit = asyncio.run(body())
    entries = [e for e in journal("-u", unit) if e.get("SYSLOG_IDENTIFIER") == "vllm:talker"]
    shown = {str(entry["MESSAGE"])[:60]: entry for entry in entries}
    assert shown["INFO 11-21 20:00:00 [api_server.py:1] started"]["PRIORITY"] == "6"
    assert shown["(EngineCore_DP0 pid=7) ERROR 11-21 boom"]["PRIORITY"] == "3"
    assert "a\tb" in shown
    assert "last words" in shown
    assert {entry["LLMUX_MODEL"] for entry in entries} == {"talker"}


def test_records_carry_the_allowed_fields_and_nothing_else() -> None:
    handler = JournalHandler(identifier="llmux-test")
    logger = logging.getLogger("guest")
    logger.propagate = False
    logger.addHandler(handler)
    extra = {"model": "alpha", "duration_ms": 12, "prompt": "secret", "from": "a\nb"}
    logger.error("two\nlines", extra=extra)
    logger.error("y" * 400_000)  # too big for a datagram: goes as a memfd
    logger.removeHandler(handler)
    handler.close()
    first, second = journal("-t", "llmux-test")[-2:]
    assert first["MESSAGE"] == "two\nlines"
    assert first["LLMUX_MODEL"] == "alpha"
    assert first["LLMUX_DURATION_MS"] == "12"
    assert first["LLMUX_FROM"] == "a\nb"
    assert first["PRIORITY"] == "3"
    assert "secret" not in json.dumps(first)
    assert second["MESSAGE"] is None or len(second["MESSAGE"]) == 400_000
