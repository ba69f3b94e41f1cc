"""Where scripts/lab enters; Python runs it isolated (-I), so the import path is set here."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from _lab.cli import main

sys.exit(main())
