"""What the doctor's checks of ``access.py`` run as an engine's user. Imports nothing of llmux.

It is handed to Python as text, since that user need not be able to read this file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

# Under the interpreter of the engine's environment.
ASK = """
import importlib.util, json, os, sysconfig
print(json.dumps({
    "Python.h": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    "flashinfer-jit-cache": importlib.util.find_spec("flashinfer_jit_cache") is not None,
}))
"""
IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    sys.__stdout__.write("imported " + name + "\\n")
    sys.__stdout__.flush()
"""
ASK_SECS = 30.0


def closed(path: str) -> str:
    """Which directory on the way to the file, itself or where it leads, keeps us out."""
    for way in (path, os.path.realpath(path)):
        parts = way.split("/")
        for end in range(2, len(parts)):
            if not os.access("/".join(parts[:end]), os.X_OK):
                return "/".join(parts[:end]) + " is closed to it"
    if not os.path.exists(path):
        return "it is not there"
    return "its mode is " + oct(os.stat(path).st_mode & 0o7777)


def last_line(text: bytes | None) -> str:
    lines = (text or b"").decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def program_problem(program: str, interpreter: list[str], found: dict[str, Any]) -> str | None:
    """Fills ``found`` with what the interpreter says."""
    if not os.access(program, os.X_OK):
        return f"cannot execute {program}: {closed(program)}"
    if not interpreter:
        return None
    first = f"cannot execute {interpreter[0]}: "
    try:
        ran = subprocess.run(  # what the operator configured
            [*interpreter, "-c", ASK], capture_output=True, timeout=ASK_SECS, check=False
        )
        if ran.returncode:
            return first + last_line(ran.stderr)
        found.update(json.loads(ran.stdout.splitlines()[-1]))
    except PermissionError:
        return first + closed(interpreter[0])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return first + str(error)
    return None


def import_problem(interpreter: list[str], modules: list[str], seconds: float) -> str | None:
    """The first module that cannot be imported, and why."""
    argv = [*interpreter, "-c", IMPORT, *modules]
    try:
        ran = subprocess.run(argv, capture_output=True, timeout=seconds, check=False)
        said, failed = ran.stdout, ran.returncode != 0
        why = last_line(ran.stderr) if failed else ""
        if ran.returncode < 0:
            why = f"killed by signal {-ran.returncode}"
    except subprocess.TimeoutExpired as error:
        said, failed, why = error.stdout or b"", True, f"not done after {seconds:g} s"
    if not failed:
        return None
    done = [
        line[9:] for line in said.decode(errors="replace").splitlines() if line[:9] == "imported "
    ]
    missed = [name for name in modules if name not in done]
    return f"{interpreter[0]} cannot import {missed[0] if missed else modules[-1]}: {why}"


def write_problem(path: str) -> str | None:
    """Why no file can be made in a directory, or the directory not be made."""
    place = path
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        made, name = tempfile.mkstemp(dir=place)
        try:
            os.write(made, bytes(4096))  # a full disk still makes empty files
        finally:
            os.close(made)
            os.unlink(name)
    except OSError as error:
        return f"{place}: {error.strerror}"
    return None


def read_problem(name: str, path: str, files: list[str]) -> str | None:
    """Adds the model's files to ``files``."""
    bad: list[str] = []
    names = [path]
    if not os.path.isfile(path):
        names = []
        walk = os.walk(path, onerror=lambda error: bad.append(str(error.filename)))
        for top, folders, ones in walk:
            folders[:] = [one for one in folders if not one.startswith(".")]
            names += [os.path.join(top, one) for one in ones if not one.startswith(".")]
    if not os.path.exists(path):
        bad.append(path)
    bad += [one for one in names if not os.access(one, os.R_OK)]
    files += names
    return f"cannot read {bad[0]} of {name}: {closed(bad[0])}" if bad else None


def main() -> None:
    asked = json.loads(sys.argv[1])
    interpreter = asked["interpreter"]
    found: dict[str, Any] = {}
    files: list[str] = []
    problems = [program_problem(asked["program"], interpreter, found)]
    problems += [read_problem(name, path, files) for name, path in asked["models"].items()]
    imports = None
    if interpreter and asked["modules"] and problems[0] is None:
        imports = import_problem(interpreter, asked["modules"], asked["import_secs"])
    closed_places: dict[str, list[str]] = {}
    for what, path in asked["directories"].items():
        why = write_problem(path)
        if why is not None:
            closed_places.setdefault(why, []).append(what)
    found.update({tool: shutil.which(tool) is not None for tool in ("ninja", "cc", "nvcc")})
    said = {
        "problems": [problem for problem in problems if problem is not None],
        "imports": imports,
        "closed": closed_places,
        "files": len(files),
        "found": found,
    }
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
