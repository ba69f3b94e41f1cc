"""Follow engines' stdout and stderr, which are append-only files, into the journal.

Files, because a pipe or a journal stream breaks when CRIU dumps its end, and because an engine that
writes to a file never waits for us, not even while the supervisor is down. The position reached is
kept beside each file, so that the next supervisor continues there.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from llmux.drivers.engine.line_rate import AGAIN_SECS, WINDOW_SECS, LineRate
from llmux.drivers.engine.output_marks import BACKLOG, read_mark, read_part, write_mark
from llmux.drivers.memory import disk_space
from llmux.drivers.processes.inotify import Inotify, Mask, Watch
from llmux.drivers.systemd.journal import Journal
from llmux.engines import line_priority
from llmux.errors import DriverError
from llmux.names import escape, identifier
from llmux.ports import UnitHandle
from llmux.printable import clean
from llmux.trusted import make_private, open_own, open_private

log = logging.getLogger(__name__)
engine_log = logging.getLogger("llmux.engine")

_LOGS: Final = ("stdout.log", "stderr.log")
KEEP_LINES: Final = 200
MAX_LINE: Final = 16 * 1024  # longer lines are split
MAX_FILE: Final = 16 * 1024 * 1024  # truncated in place beyond it, once passed on
CHUNK: Final = 32 * 1024  # read in one turn of the loop, and at most so many lines:
MOST_LINES: Final = 256  # about 5 ms of work
MOST_BEHIND: Final = 1024 * 1024  # what is older is counted, not passed on
MOST_TURNS: Final = 64  # before lines are left out, where the loop has to wait for all of them
LEAST_ROOM: Final = 64 * 1024  # free bytes, below which a line more may fail


@dataclass(slots=True, eq=False)
class _File:
    """One followed file. Lines before ``offset`` were forwarded; ``partial`` follows it."""

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
    rate: LineRate = field(default_factory=LineRate)
    report: asyncio.TimerHandle | None = None  # of what the journal did not get


class EngineFiles:
    """EngineOutput below ``directory``: ``<directory>/<model>/{stdout,stderr}.log``.

    Lines go to ``journal`` when it is there and the unit is a systemd one (only root's OBJECT_
    fields count there), else to the logger ``llmux.engine`` at DEBUG. ``on_line(model, line)`` sees
    each too, and ``on_progress(model, text)`` what a progress bar shows on a line that has no end
    yet.
    """

    def __init__(
        self,
        directory: str,
        *,
        journal: Journal | None = None,
        max_file: int = MAX_FILE,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        self._directory = directory
        self._journal = journal or Journal()
        self._max_file = max_file
        self.on_line = on_line
        self.on_progress: Callable[[str, str], None] | None = None
        self._models: dict[str, _Model] = {}
        self._inotify: Inotify | None = None
        self._reported_drops = 0

    def paths(self, model: str) -> tuple[str, str]:
        directory = os.path.join(self._directory, escape(model))
        # Ours alone: engines may write keys and prompts.
        with self._opened(model) as opened:
            for name in _LOGS:
                self._mark_start(opened, name)
        return os.path.join(directory, _LOGS[0]), os.path.join(directory, _LOGS[1])

    @contextmanager
    def _opened(self, model: str) -> Iterator[int]:
        """A descriptor of the model's directory. DriverError when it is not ours alone."""
        opened = -1
        try:
            make_private(self._directory)
            opened = open_private(os.path.join(self._directory, escape(model)))
            yield opened
        except OSError as error:
            raise DriverError(
                "open",
                f'the output of model "{model}"',
                str(error),
                hint=f"{self._directory} must be root's, and closed to all others",
            ) from error
        finally:
            if opened >= 0:
                os.close(opened)

    @staticmethod
    def _mark_start(opened: int, name: str) -> None:
        """A new engine: its output before attach() counts, that of earlier engines does not."""
        with suppress(FileExistsError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            mark = open_own(opened, f"{name}.offset", flags, 0o640)
            try:
                size = os.stat(name, dir_fd=opened).st_size
            except FileNotFoundError:
                size = 0
            os.write(mark, write_mark(size, 0, None, 0).encode())
            os.close(mark)

    def attach(self, handle: UnitHandle) -> None:
        self.detach(handle.model)
        model = self._models.setdefault(handle.model, _Model(handle.model))
        model.handle = handle
        model.lines.clear()
        if self._inotify is None:
            self._inotify = Inotify()
        for path in self.paths(handle.model):
            try:
                with self._opened(handle.model) as opened:
                    file = self._open(opened, path, model)
            except DriverError as error:
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
        if entry.handle is not None:
            self._report_left_out(entry, entry.handle)
        entry.handle = None

    def tail(self, model: str, lines: int = 20) -> list[str]:
        entry = self._models.get(model)
        if lines <= 0:
            return []
        if entry is None:  # its last engine was another supervisor's
            return self._from_files(model, lines, lambda begin, _before, size: (begin, size))
        # The engine's last lines may be newer than the last event the loop has seen.
        for file in entry.files:
            self._drain_all(entry, file)
        last = list(entry.lines)
        unfinished = (clean(file.partial.decode(errors="replace")) for file in entry.files)
        last += [text for text in unfinished if text]
        return last[-lines:]

    def previous(self, model: str, lines: int = 20) -> list[str]:
        return self._from_files(model, lines, lambda begin, before, _size: (before, begin))

    def shortage(self) -> str | None:
        with suppress(OSError):
            if disk_space(self._directory)[1] < LEAST_ROOM:
                return f"the disk of {self._directory} is full (free some space there)"
        return None

    def _from_files(
        self, model: str, lines: int, part: Callable[[int, int, int], tuple[int, int]]
    ) -> list[str]:
        """The last lines of a part of both files, which is chosen by (where the last engine's
        output begins, where that of the one before begins, the file's size)."""
        found: list[str] = []
        directory = os.path.join(self._directory, escape(model))
        for name in _LOGS:
            with suppress(OSError):
                opened = open_private(directory) if os.path.isdir(directory) else -1
                if opened < 0:
                    continue
                try:
                    found += read_part(opened, name, part)
                finally:
                    os.close(opened)
        return found[-lines:]

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
        """Lines that the journal did not accept. They are still in the file."""
        return self._journal.dropped

    def _open(self, opened: int, path: str, model: _Model) -> _File:
        assert model.handle is not None
        name = os.path.basename(path)
        fd = open_own(opened, name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o640)
        try:
            mark = open_own(opened, f"{name}.offset", os.O_RDWR | os.O_CREAT, 0o640)
        except OSError:
            os.close(fd)
            raise
        size = os.fstat(fd).st_size
        offset, begin, owner, before = read_mark(os.pread(mark, 256, 0), size)
        me = f"{model.handle.pid}:{model.handle.start_ticks}"
        if owner == me:
            # Adopted after a restart: earlier lines are context for the engine's next error.
            start = max(begin if begin <= offset else 0, offset - BACKLOG)
            said = os.pread(fd, offset - start, start).decode(errors="replace")
            model.lines.extend(text for line in said.split("\n") if (text := clean(line)))
        else:
            begin, before = offset, begin
        file = _File(path, fd, mark, offset)
        os.pwrite(mark, write_mark(offset, begin, me, before).encode(), 0)
        return file

    def _drain_all(self, model: _Model, file: _File) -> None:
        """Without a turn of the loop between; of very many short lines only the last."""
        for turn in range(2 * MOST_TURNS):
            if not self._read(model, file):
                return
            behind = os.fstat(file.fd).st_size - file.offset - len(file.partial)
            if turn == MOST_TURNS and behind > CHUNK:
                self._leave_out(model, file, behind - CHUNK)

    def _drain(self, model: _Model, file: _File) -> None:
        if file not in model.files:
            return
        if self._read(model, file):
            # Yield: an engine that floods its output must not hold the loop.
            asyncio.get_running_loop().call_soon(self._drain, model, file)

    def _read(self, model: _Model, file: _File) -> bool:
        """Pass on one chunk; True when there may be more."""
        position = file.offset + len(file.partial)
        size = os.fstat(file.fd).st_size
        if size - position > MOST_BEHIND:
            # A chunk at least, so that there is a line's end in it.
            skip = max(CHUNK, min(size - position - MOST_BEHIND, MOST_BEHIND))
            return self._leave_out(model, file, skip)
        data = os.pread(file.fd, CHUNK, position)
        if not data:
            if size < position:
                # Truncated by another program (logrotate's copytruncate): start over.
                file.partial.clear()
                file.offset = 0
                self._note(model, file)
                return size > 0
            if size > self._max_file and (not file.partial or size > 2 * self._max_file):
                # All of it was forwarded; what is appended between the two calls is lost.
                os.ftruncate(file.fd, 0)
                file.partial.clear()
                file.offset = 0
                self._note(model, file)
            return False
        file.partial += data
        *lines, rest = bytes(file.partial).split(b"\n", MOST_LINES)
        file.offset += len(file.partial) - len(rest)
        if len(lines) == MOST_LINES:
            rest = b""  # there may be more lines in it: it is read again
        file.partial = bytearray(rest)
        for line in lines:
            self._pass_on(model, line)
        if len(rest) > MAX_LINE:
            self._pass_on(model, rest)
            file.offset += len(rest)
            file.partial.clear()
        elif self.on_progress is not None and b"\r" in rest:
            self.on_progress(model.name, clean(rest.decode(errors="replace")))
        self._note(model, file)
        return True

    def _leave_out(self, model: _Model, file: _File, size: int) -> bool:
        """Skip the lines in the next ``size`` bytes: an engine that writes faster than is read."""
        data = os.pread(file.fd, size, file.offset + len(file.partial))
        skipped = (data.rfind(b"\n") + 1) or len(data)  # what comes next begins a line
        file.offset += len(file.partial) + skipped
        file.partial.clear()
        self._note(model, file)
        if self._has_journal(model.handle):
            model.rate.left_out += data.count(b"\n")
            self._report_later(model)
        return bool(data)

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
        if handle is None or not self._has_journal(handle):
            engine_log.debug("%s", line, extra={"model": model.name})
            return
        priority = line_priority(line)
        if model.rate.admits(priority):
            self._send(model.name, handle, line, priority)
        else:
            self._report_later(model)

    def _has_journal(self, handle: UnitHandle | None) -> bool:
        return handle is not None and handle.cgroup is not None and self._journal.present

    def _report_later(self, model: _Model) -> None:
        if model.report is None and model.handle is not None:
            loop, handle = asyncio.get_running_loop(), model.handle
            model.report = loop.call_later(WINDOW_SECS, self._report_left_out, model, handle)

    def _report_left_out(self, model: _Model, handle: UnitHandle) -> None:
        if model.report is not None:
            model.report.cancel()
            model.report = None
        if not model.rate.left_out:
            return
        text = f"{model.rate.left_out} lines left out; `llmux logs {model.name}` has the last ones"
        if self._send(model.name, handle, text, 4):
            model.rate.left_out = 0
        else:
            loop = asyncio.get_running_loop()
            model.report = loop.call_later(AGAIN_SECS, self._report_left_out, model, handle)

    def _send(self, name: str, handle: UnitHandle, line: str, priority: int) -> bool:
        fields = (
            ("MESSAGE", line),
            ("PRIORITY", str(priority)),
            ("SYSLOG_IDENTIFIER", identifier(name)),
            ("SYSLOG_PID", str(handle.pid)),
            # For lines that come after their process: journald looks at its cgroup.
            ("OBJECT_PID", str(handle.pid)),
            ("OBJECT_SYSTEMD_UNIT", handle.unit),
            ("LLMUX_MODEL", name),
            ("LLMUX_UNIT", handle.unit),
        )
        taken = self._journal.send(fields, handle.pid)
        if self._journal.dropped > self._reported_drops:
            if self._reported_drops == 0:
                log.warning(
                    "the journal does not keep up: lines of %s are dropped there; they are in its"
                    " output files",
                    handle.unit,
                    extra={"model": name},
                )
            self._reported_drops = self._journal.dropped
        return taken
