"""Can an engine run its program, read its weights and compile kernels here? Asked as its user.

What root can open says nothing: an environment below /root, a Python that uv put there, weights in
somebody's home are closed to an engine, which then ends with "Permission denied".
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from llmux.config.schema import ENGINES, Config
from llmux.drivers.doctor.facts import Check, Host, Level
from llmux.drivers.doctor.parking import interpreter_of

NAME = "engine access"
COMPILERS = "compilers"
# In a process of its own, which becomes the engine's user for good.
LOOK = """
import json, os, pwd, shutil, subprocess, sys
asked = json.loads(sys.argv[1])
user = pwd.getpwnam(asked["user"])
os.setgroups(os.getgrouplist(user.pw_name, user.pw_gid))
os.setgid(user.pw_gid)
os.setuid(user.pw_uid)
os.environ.update(PATH=asked["path"], HOME="/")
problems, found, files = [], {}, 0
def closed(path):
    ways = [path, os.path.realpath(path)]
    for way in ways:
        parts = way.split("/")
        for end in range(2, len(parts)):
            if not os.access("/".join(parts[:end]), os.X_OK):
                return "/".join(parts[:end]) + " is closed to it"
    return "its mode is " + oct(os.stat(path).st_mode & 0o7777)
program, interpreter = asked["program"], asked["interpreter"]
if not os.access(program, os.X_OK):
    problems.append("cannot execute " + program + ": " + closed(program))
elif interpreter:
    try:
        ran = subprocess.run([*interpreter, "-c", asked["ask"]], capture_output=True, timeout=30)
        if ran.returncode:
            words = ran.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
            problems.append("cannot execute " + interpreter[0] + ": " + words[-1])
        else:
            found = json.loads(ran.stdout)
    except PermissionError:
        problems.append("cannot execute " + interpreter[0] + ": " + closed(interpreter[0]))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        problems.append("cannot execute " + interpreter[0] + ": " + str(error))
for name, path in asked["models"].items():
    bad = []
    def unreadable(error):
        bad.append(error.filename)
    if os.path.isfile(path):
        names = [path]
    else:
        names = []
        for top, folders, ones in os.walk(path, onerror=unreadable):
            folders[:] = [one for one in folders if not one.startswith(".")]
            names += [os.path.join(top, one) for one in ones if not one.startswith(".")]
    if not os.path.exists(path):
        bad.append(path)
    bad += [one for one in names if not os.access(one, os.R_OK)]
    files += len(names)
    if bad:
        problems.append("cannot read " + bad[0] + " of " + name + ": " + closed(bad[0]))
found.update({tool: shutil.which(tool) is not None for tool in ("ninja", "cc", "nvcc")})
print(json.dumps({"problems": problems, "files": files, "found": found}))
"""
ASK = """
import importlib.util, json, os, sysconfig
print(json.dumps({
    "Python.h": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    "flashinfer-jit-cache": importlib.util.find_spec("flashinfer_jit_cache") is not None,
}))
"""
LOOK_SECS = 60.0
REMEDY = (
    "install vLLM and put the weights where every user may read them (/opt/vllm, /srv/models), with"
    " `uv venv --python` of a Python outside /root; see README, *Weights and environment*"
)
COMPILERS_REMEDY = (
    "apt install ninja-build gcc python3-dev (or `pip install ninja` into vLLM's environment), and"
    " NVIDIA's cuda-nvcc or flashinfer-jit-cache: without them kernels that are compiled at first"
    " use end the engine or are left out"
)


def check_access(host: Host, config: Config | None) -> list[Check]:
    """Nothing for embedded engines, which run as whoever starts them."""
    user = (config.engine_user if config is not None else None) or ENGINES
    if config is None or host.euid != 0 or user == "root" or not host.user_exists(user):
        return []
    models: dict[tuple[str, ...], dict[str, str]] = {}
    for model in config.models.values():
        command = model.vllm_command or config.vllm_command
        here = model.model_path.startswith("/") and host.path(model.model_path).exists()
        models.setdefault(command, {}).update({model.name: model.model_path} if here else {})
    checks = []
    for command, paths in sorted(models.items()):
        program = host.which(command[0])
        if program is not None:  # else it is said where programs are looked at
            checks += _as_user(host, user, program, paths)
    return checks


def _as_user(host: Host, user: str, program: str, models: Mapping[str, str]) -> list[Check]:
    interpreter = interpreter_of(host, program)
    asked = {
        "user": user,
        "program": program,
        "interpreter": interpreter.split() if interpreter else [],
        "models": models,
        "path": f"{os.path.dirname(program)}:{os.environ.get('PATH', os.defpath)}",
        "ask": ASK,
    }
    ran = host.run([sys.executable, "-I", "-c", LOOK, json.dumps(asked)], LOOK_SECS)
    try:
        said: dict[str, Any] = json.loads(ran.output.splitlines()[0])
    except (ValueError, IndexError):
        words = ran.output.strip().splitlines()[-1:] or ["no answer"]
        return [Check(NAME, Level.WARN, f"could not be looked at as {user}: {words[0]}", REMEDY)]
    if said["problems"]:
        seen = f"{user} {'; '.join(said['problems'])}"
        return [Check(NAME, Level.FAIL, seen, REMEDY)]
    seen = f"as {user}: {program} can be executed, {said['files']} files of models read"
    checks = [Check(NAME, Level.OK, seen)]
    if host.read("/proc/driver/nvidia/version") is not None:
        checks.append(_compilers(program, said["found"]))
    return checks


def _compilers(program: str, found: Mapping[str, bool]) -> Check:
    missing = [name for name in ("ninja", "cc", "Python.h") if found.get(name) is False]
    if not found.get("nvcc") and not found.get("flashinfer-jit-cache"):
        missing.append("nvcc or flashinfer-jit-cache")
    if missing:
        seen = f"{program} finds no {', no '.join(missing)}"
        return Check(COMPILERS, Level.WARN, seen, COMPILERS_REMEDY)
    return Check(COMPILERS, Level.OK, f"all that {program} may need")
