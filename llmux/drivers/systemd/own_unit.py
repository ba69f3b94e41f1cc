"""The unit that this process runs in: what systemd does with it, and which processes are in it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class OwnUnit:
    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._group: Path | None = None
        try:
            lines = (proc / "self/cgroup").read_text().splitlines()
        except OSError:
            return
        # Hierarchies of cgroup v1 have lines of their own on some hosts.
        name = next((line[3:] for line in lines if line.startswith("0::")), "")
        if name.endswith(".service"):
            self._group = cgroups / name.lstrip("/")

    def is_restarting(self) -> bool:
        """Whether systemd starts a successor once this process has ended. False when systemd does
        not answer."""
        return self._job_and_kill_mode()[0] == "restart"

    def is_replaced(self) -> bool:
        """Whether systemd also leaves the unit's other processes alone."""
        return self._job_and_kill_mode() == ("restart", "process")

    def _job_and_kill_mode(self) -> tuple[str, str]:
        if self._group is None:
            return "", ""
        try:
            # Imported late: only a stop needs it, and each worker would keep it in its memory.
            from llmux.drivers.systemd.bus import Bus
        except ImportError:
            return "", ""
        bus = Bus()
        try:
            return bus.service_end(self._group.name)
        except Exception as error:  # noqa: BLE001  # then the stop is an ordinary one
            log.warning("cannot ask systemd whether this is a restart: %s", error)
            return "", ""
        finally:
            bus.close()

    def restart(self) -> bool:
        """Have systemd end this process and start a successor; False when it does not."""
        if self._group is None:
            return False
        try:
            from llmux.drivers.systemd.bus import Bus
        except ImportError:
            return False
        bus = Bus()
        try:
            bus.restart_unit(self._group.name)
        except Exception as error:  # noqa: BLE001  # it goes on as it is
            log.warning("cannot ask systemd for a restart: %s", error)
            return False
        finally:
            bus.close()
        return True

    def others(self) -> list[int]:
        """The pids of the unit's other processes."""
        if self._group is None:
            return []
        try:
            pids = [int(pid) for pid in (self._group / "cgroup.procs").read_text().split()]
        except OSError:
            return []
        return [pid for pid in pids if pid != os.getpid()]
