"""Where scripts/lab enters; Python runs it isolated (-I), so the import path is set here."""

import pathlib
import sys

if sys.version_info < (3, 11):
    sys.exit("lab: Python 3.11 or newer is needed; next step: apt-get install python3 (Debian 12+)")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from _lab.cli import main  # noqa: E402 (the path first)

sys.exit(main())
