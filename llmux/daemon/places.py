"""Where the processes of an installation find each other."""

from __future__ import annotations

import os
from typing import Final

RUNTIME: Final = "/run/llmux"
SOCKET: Final = f"{RUNTIME}/supervisor.sock"
LAST_GOOD: Final = f"{RUNTIME}/last-good"


def credentials_directory() -> str:
    """The directory of the files that LoadCredential= names."""
    return os.environ.get("CREDENTIALS_DIRECTORY", "/run/credentials")


def resolve_secret(path: str, credentials: str) -> str:
    """Return the file's path; ``credential:NAME`` is a file in the directory ``credentials``."""
    name = path.removeprefix("credential:")
    return path if name == path else f"{credentials}/{name}"
