"""What a CRIU that fails leaves, and who is blamed: seen on a program that fails as it does."""

from __future__ import annotations

import asyncio
import pathlib
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from llmux.drivers.criu.command import WANTED
from llmux.drivers.criu.driver import Criu
from llmux.drivers.images.store import ImageStore
from llmux.drivers.processes.process import start_ticks
from llmux.errors import Blame, CheckpointFailed, TreeState
from llmux.image_ports import DumpSpec
from llmux.ports import LaunchSpec, UnitHandle
from tests.twins.units import MemoryUnits
from tests.twins.world import World

CRIU = """#!/bin/sh
case $1 in
--version) echo "Version: 4.2.1" ;;
--help) echo "{options}" ;;
check) ;;
dump)
    while [ $# -gt 1 ]; do
        [ "$1" != --work-dir ] || log=$2/dump.log
        [ "$1" != --tree ] || root=$2
        shift
    done
    {dump}
    ;;
esac
"""
STOP = "kill -STOP $root; until grep -q 'State:.T' /proc/$root/status; do :; done"


@pytest.fixture
def engine() -> Iterator[subprocess.Popen[bytes]]:
    done = subprocess.Popen(
        ["cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with done:
        yield done
        done.kill()


def dump(home: pathlib.Path, pid: int, script: str) -> CheckpointFailed:
    """The failure of a dump of the process, by a CRIU that does this."""
    program = home / "criu"
    program.write_text(CRIU.format(options=" ".join(WANTED), dump=script))
    program.chmod(0o755)

    class Units(MemoryUnits):
        async def pids(self, handle: UnitHandle) -> Sequence[int]:
            return [pid]

    images, shm = str(home / "images"), home / "shm"
    shm.mkdir()
    criu = Criu(
        Units(World()), ImageStore(images), images, criu_path=str(program), shm=str(shm)
    )  # fmt: skip
    handle = UnitHandle("m", "llmux-m.scope", pid, start_ticks(pid) or 0)
    launch = LaunchSpec("m", ("cat",), {}, None, "/dev/null", "/dev/null", str(home / "run"))
    with pytest.raises(CheckpointFailed) as caught:
        asyncio.run(criu.dump(handle, DumpSpec(launch, {}), 60.0))
    return caught.value


ERROR = 'echo "(00.1) Error (criu/x.c:1): Something is not as it must be" > "$log"'
FULL = 'echo "(00.1) Error (criu/x.c:1): No space left on device" > "$log"'


@pytest.mark.parametrize(
    ("script", "said", "tree", "blame"),
    [
        (f"{ERROR}; exit 1", "Something is not", TreeState.RUNNING, Blame.ENGINE),
        (f"{FULL}; exit 1", "No space left", TreeState.RUNNING, Blame.HOST),
        (f"{STOP}; {ERROR}; exit 1", "Something is not", TreeState.BROKEN, Blame.ENGINE),
        # it says that it is done, and its log does not
        (f"{ERROR}; exit 0", "Something is not", TreeState.RUNNING, Blame.ENGINE),
        ("exit 0", "CRIU ended with status 0", TreeState.RUNNING, Blame.ENGINE),
        (f"{ERROR}; kill -9 $$", "killed by signal 9", TreeState.BROKEN, Blame.HOST),
    ],
)
def test_a_failure_says_what_is_left_of_the_engine_and_whose_fault_it_is(
    home: pathlib.Path,
    engine: subprocess.Popen[bytes],
    script: str,
    said: str,
    tree: TreeState,
    blame: Blame,
) -> None:
    error = dump(home, engine.pid, script)
    assert said in str(error)
    assert (error.tree, error.blame) == (tree, blame)
    assert engine.poll() is None
