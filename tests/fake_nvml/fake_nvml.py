"""A fake NVML library: built once, in a directory of its own with its orders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("libnvidia_ml.c")


class FakeNvml:
    """``directory`` gets the library; ``ledger``: the simulated GPUs that it speaks of.

    ``defines``: BEFORE_510 leaves out what drivers before 510 lack.
    """

    def __init__(self, directory: Path, ledger: str, *defines: str) -> None:
        self.directory = directory
        self.library = directory / "libnvidia-ml.so.1"
        (directory / "faults").mkdir(parents=True, exist_ok=True)
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        flags += [f"-D{name}" for name in defines]
        subprocess.run(
            ["cc", *flags, "-o", str(self.library), str(SOURCE), "-ldl"],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        (directory / "ledger").write_text(f"{ledger}\n")

    def fault(self, call: str, words: str) -> Path:
        """Orders a fault; for "hang" the returned FIFO releases the call."""
        path = self.directory / "faults" / call
        fifo = path.with_name(f"{call}.fifo")
        if words == "hang" and not fifo.exists():
            os.mkfifo(fifo)
        path.write_text(words + "\n")
        return fifo

    def heal(self) -> None:
        """No more faults, and calls that hang go on."""
        for path in (self.directory / "faults").iterdir():
            if not path.name.endswith(".fifo"):
                path.unlink()
        for fifo in (self.directory / "faults").glob("*.fifo"):
            os.close(os.open(fifo, os.O_RDWR))

    def foreign(self, *rows: tuple[int, int, int]) -> None:
        """(GPU, pid, bytes) of processes that are no engines."""
        lines = (f"{gpu} {pid} {used}\n" for gpu, pid, used in rows)
        (self.directory / "foreign").write_text("".join(lines))

    def late(self, milliseconds: int) -> None:
        """Memory of an ended process is back only so much later."""
        (self.directory / "late").write_text(f"{milliseconds}\n")

    def reserve(self, size: int) -> None:
        """Bytes that the driver keeps of each GPU."""
        (self.directory / "reserved").write_text(f"{size}\n")

    def mig(self, *gpus: int) -> None:
        """MIG is on there: of the whole device no processes are shown."""
        (self.directory / "mig").write_text("".join(f"{gpu}\n" for gpu in gpus))

    def unknown(self, pids: Sequence[int] | None) -> None:
        """Amounts of these processes are not available; None: of all."""
        words = ["all"] if pids is None else [str(pid) for pid in pids]
        (self.directory / "unknown").write_text("".join(f"{word}\n" for word in words))


if __name__ == "__main__":
    print(FakeNvml(Path(sys.argv[1]), sys.argv[2]).library)
