"""Engines' stdout and stderr: append-only files, followed into the journal, last lines kept.

Files, because a pipe or a journal stream breaks when CRIU dumps its end, and because an engine that
writes to a file never waits for us, not even while the supervisor is down. The position reached is
kept beside each file, so that the next supervisor goes on exactly there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from llmux.drivers.inotify import Inotify, Mask, Watch
from llmux.drivers.journald import Journal
from llmux.ports import UnitHandle

log = logging.getLogger(__name__)
engine_log = logging.getLogger("llmux.engine")

KEEP_LINES: Final = 200
MAX_LINE: Final = 16 * 1024  # a longer one is passed on in pieces
MAX_FILE: Final = 16 * 1024 * 1024  # truncated in place beyond it, once passed on
CHUNK: Final = 32 * 1024  # read in one turn of the loop: about 5 ms of work
BACKLOG: Final = 64 * 1024  # of a file without a known position: no more than this is looked at

# CSI sequences, OSC sequences, other two-character escapes, control characters but tab.
_ESCAPES: Final = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]"
    r"|[\x00-\x08\x0a-\x1f\x7f]"
)
# "INFO 11-21 20:41:07 [api_server.py:1]", "(EngineCore_DP0 pid=7) ERROR …", "INFO:     Started …"
_LEVEL: Final = re.compile(r"\s*(?:\([^)]*\)\s*)*(DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL)\b")
_PRIORITIES: Final = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2, "FATAL": 2}
_FAULT: Final = re.compile(
    r"\s*(?:\([^)]*\)\s*)*(?:Traceback \(most recent call last\)|[\w.]*(?:Error|Exception)(?::|$)"
    r"|Segmentation fault|terminate called)"
)


def clean(line: str) -> str:
    """Without escape sequences; of a progress bar's redrawings only the last."""
    shown = line.rstrip("\r").rpartition("\r")[2]
    return _ESCAPES.sub("", shown).rstrip()


def priority_of_line(line: str) -> int:
    """syslog priority by the level word that vLLM and uvicorn begin a line with; 6 without one."""
    if (match := _LEVEL.match(line)) is not None:
        return _PRIORITIES[match.group(1)]
    return 3 if _FAULT.match(line) else 6


@dataclass(slots=True, eq=False)
class _File:
    """One followed file. ``offset``: up to where lines were passed on; ``partial`` comes after
    it."""

    path: str
    fd: int
    mark: int  # descriptor of the file that keeps the offset
    offset: int
    watch: Watch | None = None
    partial: bytearray = field(default_factory=bytearray)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.mark)


@dataclass(slots=True, eq=False)
class _Model:
    name: str
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEEP_LINES))
    files: list[_File] = field(default_factory=list)
    handle: UnitHandle | None = None


class EngineFiles:
    """EngineOutput below ``images_dir``: ``<images_dir>/<model>/{stdout,stderr}.log``.

    Lines go to ``journal`` when it is there and the unit is a systemd one (only root's OBJECT_
    fields count there), else to the logger ``llmux.engine`` at DEBUG. ``on_line(model, line)`` sees
    each too.
    """

    def __init__(
        self,
        images_dir: str,
        *,
        journal: Journal | None = None,
        max_file: int = MAX_FILE,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        self._directory = images_dir
        self._journal = journal or Journal()
        self._max_file = max_file
        self.on_line = on_line
        self._models: dict[str, _Model] = {}
        self._inotify: Inotify | None = None
        self._reported_drops = 0

    def paths(self, model: str) -> tuple[str, str]:
        directory = os.path.join(self._directory, model)
        # Root's alone: the images beside the logs hold keys, prompts and weights.
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        os.makedirs(directory, mode=0o750, exist_ok=True)
        stdout, stderr = (os.path.join(directory, f"{name}.log") for name in ("stdout", "stderr"))
        for path in (stdout, stderr):
            # An engine starts: what it says before attach() counts, what others said does not.
            if not os.path.exists(f"{path}.offset"):
                size = os.path.getsize(path) if os.path.exists(path) else 0
                with open(f"{path}.offset", "w") as file:
                    file.write(_mark(size, 0, None))
        return stdout, stderr

    def attach(self, handle: UnitHandle) -> None:
        self.detach(handle.model)
        model = self._models.setdefault(handle.model, _Model(handle.model))
        model.handle = handle
        model.lines.clear()
        if self._inotify is None:
            self._inotify = Inotify()
        for path in self.paths(handle.model):
            try:
                file = self._open(path, model)
            except OSError as error:
                log.warning("cannot follow %s: %s", path, error, extra={"model": handle.model})
                continue
            model.files.append(file)
            with suppress(OSError):
                file.watch = self._inotify.watch(
                    path, Mask.MODIFY, lambda *_, file=file: self._drain(model, file)
                )
            self._drain(model, file)

    def detach(self, model: str) -> None:
        entry = self._models.get(model)
        if entry is None:
            return
        files, entry.files = entry.files, []
        for file in files:
            if self._inotify is not None and file.watch is not None:
                self._inotify.unwatch(file.watch)
            self._drain_all(entry, file)
            if file.partial:
                self._pass_on(entry, bytes(file.partial))
                file.offset += len(file.partial)
                self._note(entry, file)
            file.close()
        entry.handle = None

    def tail(self, model: str, lines: int = 20) -> list[str]:
        entry = self._models.get(model)
        if entry is None or lines <= 0:
            return []
        # The engine's last words may be newer than the last event that the loop has seen.
        for file in entry.files:
            self._drain_all(entry, file)
        last = list(entry.lines)
        unfinished = (clean(file.partial.decode(errors="replace")) for file in entry.files)
        last += [text for text in unfinished if text]
        return last[-lines:]

    async def close(self) -> None:
        """Stop following everything; positions are kept."""
        for model in list(self._models):
            self.detach(model)
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
        self._journal.close()

    @property
    def dropped(self) -> int:
        """Lines that the journal did not take. They are still in the file."""
        return self._journal.dropped

    def _open(self, path: str, model: _Model) -> _File:
        assert model.handle is not None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        try:
            mark = os.open(f"{path}.offset", flags, 0o640)
        except OSError:
            os.close(fd)
            raise
        size = os.fstat(fd).st_size
        offset, begin, owner = _parse_mark(os.pread(mark, 256, 0), size)
        me = _owner(model.handle)
        if owner == me:
            # Adopted after a restart: what the engine said before is context for its next error.
            start = max(begin if begin <= offset else 0, offset - BACKLOG)
            said = os.pread(fd, offset - start, start).decode(errors="replace")
            model.lines.extend(text for line in said.split("\n") if (text := clean(line)))
        else:
            begin = offset
        file = _File(path, fd, mark, offset)
        os.pwrite(mark, _mark(offset, begin, me).encode(), 0)
        return file

    def _drain_all(self, model: _Model, file: _File) -> None:
        while self._read(model, file):
            pass

    def _drain(self, model: _Model, file: _File) -> None:
        if file not in model.files:
            return
        if self._read(model, file):
            # Let others have their turn; an engine in a rage must not hold the loop.
            asyncio.get_running_loop().call_soon(self._drain, model, file)

    def _read(self, model: _Model, file: _File) -> bool:
        """Pass on one chunk; True when there may be more."""
        position = file.offset + len(file.partial)
        data = os.pread(file.fd, CHUNK, position)
        if not data:
            size = os.fstat(file.fd).st_size
            if size < position:
                # Truncated by somebody else (logrotate's copytruncate): begin anew.
                file.partial.clear()
                file.offset = 0
                self._note(model, file)
                return size > 0
            if size > self._max_file and (not file.partial or size > 2 * self._max_file):
                # Everything in it was passed on; what is appended between the two calls is lost.
                os.ftruncate(file.fd, 0)
                file.partial.clear()
                file.offset = 0
                self._note(model, file)
            return False
        file.partial += data
        *lines, rest = bytes(file.partial).split(b"\n")
        for line in lines:
            self._pass_on(model, line)
        file.offset += len(file.partial) - len(rest)
        file.partial = bytearray(rest)
        if len(rest) > MAX_LINE:
            self._pass_on(model, rest)
            file.offset += len(rest)
            file.partial.clear()
        self._note(model, file)
        return True

    def _note(self, model: _Model, file: _File) -> None:
        # In place and padded: a few microseconds, no new file per chunk.
        if model.handle is not None:
            os.pwrite(file.mark, f"{file.offset:020d}".encode(), 0)

    def _pass_on(self, model: _Model, data: bytes) -> None:
        text = clean(data.decode(errors="replace"))
        for start in range(0, len(text), MAX_LINE):
            line = text[start : start + MAX_LINE]
            model.lines.append(line)
            if self.on_line is not None:
                self.on_line(model.name, line)
            self._forward(model, line)

    def _forward(self, model: _Model, line: str) -> None:
        handle = model.handle
        if handle is None or handle.cgroup is None or not self._journal.present:
            engine_log.debug("%s", line, extra={"model": model.name})
            return
        self._journal.send(
            (
                ("MESSAGE", line),
                ("PRIORITY", str(priority_of_line(line))),
                ("SYSLOG_IDENTIFIER", "vllm"),
                # journald finds the unit by OBJECT_PID while the process lives; the unit's name as
                # well, so that an engine's last words are not lost to `journalctl -u`.
                ("OBJECT_PID", str(handle.pid)),
                ("OBJECT_SYSTEMD_UNIT", handle.unit),
                ("LLMUX_MODEL", model.name),
                ("LLMUX_UNIT", handle.unit),
            )
        )
        if self._journal.dropped > self._reported_drops:
            if self._reported_drops == 0:
                log.warning(
                    "the journal does not keep up: lines of %s are dropped there; they are in its"
                    " output files",
                    handle.unit,
                    extra={"model": model.name},
                )
            self._reported_drops = self._journal.dropped


def _owner(handle: UnitHandle) -> str:
    return f"{handle.pid}:{handle.start_ticks}"


def _mark(offset: int, begin: int, owner: str | None) -> str:
    return f"{offset:020d} {begin:020d} {owner or '-'}".ljust(80) + "\n"


def _parse_mark(data: bytes, size: int) -> tuple[int, int, str]:
    """(offset, where this engine's output began, whose it is). Without a mark: the present end."""
    fields = data.split()
    try:
        offset, begin = int(fields[0]), int(fields[1])
        owner = fields[2].decode()
    except (ValueError, IndexError):
        return size, size, "-"
    return (offset if offset <= size else 0), begin, owner
