"""The kernel objects a vLLM tree holds, for CRIU and for the cleaning up after a kill.

- one shared memory segment `/dev/shm/psm_…`, mapped by every process;
- one named semaphore that stays linked: glibc makes it under a temporary name, links it and
  unlinks the temporary one, so the mapping refers to a deleted name of a file that still has
  another (CRIU needs --link-remap for it);
- one named semaphore unlinked at once (a ghost file for CRIU);
- a resource tracker that waits on a pipe and, when everybody who held the other end is gone,
  unlinks what is left. It ignores SIGTERM, as Python's does. Killed with the rest of the tree, as a
  cgroup kill does, it unlinks nothing, and the files stay behind.
"""

from __future__ import annotations

import _multiprocessing  # type: ignore[import-not-found]  # typeshed has no stubs for these two
import _posixshmem  # type: ignore[import-not-found]
import mmap
import os
import signal
from contextlib import suppress

from .process import set_name

_SHARED_BYTES = 1 << 20
_SEMAPHORE = 1  # multiprocessing's number for a semaphore, as against a recursive mutex


class KernelObjects:
    """Made before the fork; every process of the tree inherits the mappings."""

    def __init__(self) -> None:
        self.shm_name = f"/psm_{os.urandom(4).hex()}"
        fd = _posixshmem.shm_open(self.shm_name, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
        os.ftruncate(fd, _SHARED_BYTES)
        self._shared = mmap.mmap(fd, _SHARED_BYTES)
        os.close(fd)
        self.semaphore_name = f"/mp-{os.urandom(4).hex()}"
        self._linked = _multiprocessing.SemLock(_SEMAPHORE, 1, 1, self.semaphore_name, False)
        ghost_name = f"/mp-{os.urandom(4).hex()}"
        self._ghost = _multiprocessing.SemLock(_SEMAPHORE, 1, 1, ghost_name, True)

    def count_step(self) -> None:
        """Use all of them, so that a restore that got one wrong shows in the next answer."""
        with self._linked, self._ghost:
            steps = int.from_bytes(self._shared[:8], "little") + 1
            self._shared[:8] = steps.to_bytes(8, "little")

    def unlink(self) -> None:
        for remove, name in (
            (_posixshmem.shm_unlink, self.shm_name),
            (_multiprocessing.sem_unlink, self.semaphore_name),
        ):
            with suppress(FileNotFoundError):
                remove(name)


def fork_resource_tracker(objects: KernelObjects, close_in_child: list[int]) -> tuple[int, int]:
    """Its pid, and the end of the pipe whose closing makes it clean up and go."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read_end)
        return pid, write_end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(write_end)
    for fd in close_in_child:
        os.close(fd)
    set_name("resource_tracker")
    while os.read(read_end, 512):
        pass
    objects.unlink()
    os._exit(0)
