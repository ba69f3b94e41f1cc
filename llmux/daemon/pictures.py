"""Pictures for ``llmux sim --plot FILE.png``: by librsvg's program, since Python draws none."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Final

from llmux.config.files.documents import cause_of
from llmux.drivers.processes.run import run
from llmux.errors import LlmuxError, Unsupported

PROGRAM: Final = "rsvg-convert"
PACKAGE: Final = "librsvg2-bin"
SECS: Final = 120.0


def draw_png(svg: str, path: Path) -> None:
    """Raises LlmuxError."""
    try:
        with tempfile.TemporaryDirectory(prefix="llmux-sim-") as directory:
            source = Path(directory, "timeline.svg")
            source.write_text(svg, encoding="utf-8")
            done = asyncio.run(run((PROGRAM, "--output", str(path.absolute()), str(source)), SECS))
    except Unsupported as error:
        hint = f"apt install {PACKAGE}, or name {path.with_suffix('.svg')}"
        raise LlmuxError(f"cannot draw {path}: {error.message}", hint=hint) from error
    except OSError as error:
        raise LlmuxError(f"cannot draw {path}: {cause_of(error)}") from error
    if done.code:
        raise LlmuxError(f"cannot draw {path}: {PROGRAM}: {done.excerpt}")
