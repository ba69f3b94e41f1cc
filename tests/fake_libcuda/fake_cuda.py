"""Builds and steers the fake ``libcuda.so.1`` and ``cuda-checkpoint`` (libcuda.c has the rules).

Each ``FakeCuda`` owns a directory with the library, the tool, a little /proc, the states, the
faults and the call log, so that tests running side by side share nothing. As a program:
``fake_cuda.py DIRECTORY`` makes such a directory and prints the library's path.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")


@functools.cache
def _workshop() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fake-libcuda-")


@functools.cache
def build(*defines: str) -> Path:
    """The library compiled with these macros, once per process."""
    return _compile(("libcuda.c", "contexts.c"), ["-shared", "-fPIC"], defines)


@functools.cache
def build_tool() -> Path:
    return _compile(("cuda-checkpoint.c",), [], ())


def _compile(sources: tuple[str, ...], flags: list[str], defines: tuple[str, ...]) -> Path:
    if COMPILER is None:
        raise RuntimeError("no C compiler (cc or gcc) to build the fake libcuda.so.1 with")
    out = Path(_workshop().name) / "-".join((*sources, *defines))
    flags = [*flags, "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    flags += [*(f"-D{name}" for name in defines)]
    files = [str(HERE / source) for source in sources]
    command = [COMPILER, *flags, "-o", str(out), *files, "-ldl"]
    subprocess.run(command, check=True)
    return out


class FakeCuda:
    """One fake driver. ``defines``: BEFORE_570 or WITHOUT_RESTORE leave symbols out."""

    def __init__(self, directory: Path, *defines: str) -> None:
        self.directory = directory
        self.proc = directory / "proc"
        for name in ("procs", "faults", "modes", "proc"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self.library = directory / "libcuda.so.1"
        shutil.copy(build(*defines), self.library)
        self.tool = directory / "cuda-checkpoint"
        shutil.copy(build_tool(), self.tool)

    def add(self, pid: int, state: int | None = 0, *, ticks: int = 1, maps: str = "") -> None:
        """A process; ``state`` None means one without CUDA."""
        (self.proc / "pretended").touch()
        entry = self.proc / str(pid)
        entry.mkdir(exist_ok=True)
        numbers = " ".join(["0"] * 18)
        (entry / "stat").write_text(f"{pid} (VLLM::Engine (x)) S {numbers} {ticks} 0\n")
        (entry / "maps").write_text(maps)
        if state is not None:
            (self.directory / "procs" / str(pid)).write_text(f"{state}\n")

    def end(self, pid: int) -> None:
        shutil.rmtree(self.proc / str(pid))
        (self.directory / "procs" / str(pid)).unlink(missing_ok=True)

    def mode(self, word: str, pid: int | None = None) -> None:
        """What the driver does with this process, or with all: see libcuda.c."""
        (self.directory / "modes" / str(pid or "all")).write_text(word + "\n")

    def hung_hosts(self) -> list[int]:
        """Processes that ended while restored and running: on a real host nothing goes on then."""
        dead = [path.name for path in (self.directory / "restored").glob("*")]
        hung = [int(name) for name in dead if not self._is_alive(int(name))]
        path = self.directory / "host_hung"
        return [*map(int, path.read_text().split() if path.exists() else ()), *hung]

    def _is_alive(self, pid: int) -> bool:
        if (self.proc / "pretended").exists():
            return (self.proc / str(pid)).exists()
        return Path(f"/proc/{pid}").exists()

    def state(self, pid: int) -> int:
        return int((self.directory / "procs" / str(pid)).read_text())

    def wait_for_state(self, pid: int, wanted: int) -> None:
        """Blocks until it is so; the test's own time limit is the bound."""
        while self.state(pid) != wanted:
            os.sched_yield()

    def fault(self, call: str, words: str, pid: int | None = None) -> Path:
        """Orders a fault; for "hang" the returned FIFO releases the call (see ``release``)."""
        path = self.directory / "faults" / (call if pid is None else f"{call}.{pid}")
        path.write_text(words + "\n")
        fifo = path.with_name(path.name + ".fifo")
        if words == "hang":
            os.mkfifo(fifo)
        return fifo

    def heal(self) -> None:
        """No more faults; calls already hanging stay."""
        for path in (self.directory / "faults").iterdir():
            if not path.name.endswith(".fifo"):
                path.unlink()

    @staticmethod
    def release(fifo: Path) -> None:
        """Releases one hanging call; blocks until there is one."""
        with fifo.open("wb"):
            pass

    def set_gpus(self, count: int) -> None:
        (self.directory / "gpus").write_text(f"{count}\n")

    def set_version(self, number: int) -> None:
        (self.directory / "version").write_text(f"{number}\n")

    def log(self) -> list[tuple[str, int]]:
        """Every call begun so far, but for the questions."""
        path = self.directory / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [(line.split()[0], int(line.split()[1])) for line in lines]
        return [call for call in calls if call[0] not in ("cuInit", "restore_tid", "state")]


if __name__ == "__main__":
    print(FakeCuda(Path(sys.argv[1])).library)
