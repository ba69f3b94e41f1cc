"""Where the processes of an installation find each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

RUNTIME: Final = "/run/llmux"


@dataclass(frozen=True, slots=True)
class Files:
    """Of the one supervisor of a host. ``runtime`` is emptied by a boot, ``state`` is not."""

    runtime: str = RUNTIME
    state: str = "/var/lib/llmux"

    @property
    def socket(self) -> str:
        return f"{self.runtime}/supervisor.sock"

    @property
    def lock(self) -> str:
        return f"{self.runtime}/lock"

    @property
    def notes(self) -> str:
        return f"{self.runtime}/state.json"

    @property
    def events(self) -> str:
        return f"{self.runtime}/events.jsonl"

    @property
    def last_good(self) -> str:
        return f"{self.runtime}/last-good"

    @property
    def driver_mark(self) -> str:
        """As old as the last restart for an NVIDIA driver."""
        return f"{self.runtime}/restarted-for-driver"

    @property
    def learned(self) -> str:
        return f"{self.state}/learned.json"


FILES: Final = Files()
SOCKET: Final = FILES.socket
LAST_GOOD: Final = FILES.last_good


def credentials_directory() -> str:
    """The directory of the files that LoadCredential= names."""
    return os.environ.get("CREDENTIALS_DIRECTORY", "/run/credentials")


def resolve_secret(path: str, credentials: str) -> str:
    """Return the file's path; ``credential:NAME`` is a file in the directory ``credentials``."""
    name = path.removeprefix("credential:")
    return path if name == path else f"{credentials}/{name}"
