"""Can an engine run its program, read its weights, write its caches and compile kernels here?

Asked as the engine itself: through the launcher, as its user, with its environment. What root can
do says nothing: an environment below /root, a Python that uv put there, weights in somebody's home
are closed to an engine, which then ends with "Permission denied".
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llmux.config.schema import Config
from llmux.drivers.doctor.facts import Check, Host, Level
from llmux.drivers.doctor.parking import interpreter_of
from llmux.drivers.images.identity import hub_cache, missing_of_model, model_directory
from llmux.ports import LaunchSpec

NAME: Final = "engine access"
DIRECTORIES: Final = "engine directories"
IMPORTS: Final = "engine imports"
HUB: Final = "models of the hub"
COMPILERS: Final = "compilers"
LOOK: Final = Path(__file__).with_name("look_as_engine.py")
# An engine's user may be kept from llmux's own interpreter, in an environment of its developers.
PYTHON: Final = "/usr/bin/python3"
IMPORT_SECS: Final = 180.0  # from a slow disk; 5 to 20 s from a warm one
LOOK_SECS: Final = 120.0  # for the rest
ROOT: Final = {"HOME": "/root"}  # the environment of whoever tried vLLM by hand
SHOWN: Final = 3  # engines of which nothing bad is to be said
_OWN_VARIABLE: Final = "VLLM_RPC_BASE_PATH"
_HUB_NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
REMEDY: Final = (
    "install vLLM and put the weights where every user may read them (/opt/vllm, /srv/models), with"
    " `uv venv --python` of a Python outside /root; see README, *Weights and environment*"
)
IMPORTS_REMEDY: Final = (
    "install vLLM into its environment again; `{} -c 'import {}'` in an engine's environment"
    " (README, *Weights and environment*) shows the whole error"
)
DIRECTORIES_REMEDY: Final = (
    "make it writable for that user, or set the variable that moves it (HOME, TMPDIR, HF_HOME,"
    " XDG_CACHE_HOME) in the unit's Environment= or in the model's `env`"
)
HUB_REMEDY: Final = (
    "`HF_HOME=/srv/huggingface hf download {}` where all engines may read it, with HF_HOME set as"
    " in README, *Weights and environment*{}"
)
PATH_REMEDY: Final = "write its absolute path into vllm_command, e.g. /opt/vllm/bin/vllm"
COMPILERS_REMEDY: Final = (
    "apt install ninja-build gcc python3-dev (or `pip install ninja` into vLLM's environment), and"
    " NVIDIA's cuda-nvcc or flashinfer-jit-cache: without them kernels that are compiled at first"
    " use end the engine or are left out"
)


def check_access(host: Host, config: Config | None) -> list[Check]:
    """Nothing for embedded engines, which run as whoever starts them."""
    if config is None or host.euid != 0:
        return []
    starts = host.planned(config)
    groups: dict[tuple[Any, ...], list[LaunchSpec]] = {}
    for spec in starts:
        groups.setdefault(_kind(spec), []).append(spec)
    checks: list[Check] = []
    known: dict[str, Mapping[str, bool]] = {}
    for specs in groups.values():
        program = host.which(specs[0].argv[0])
        if program is not None and "/" not in specs[0].argv[0]:
            seen = f"{program} is on your PATH, and not on that of engines"
            checks.append(Check(NAME, Level.FAIL, seen, PATH_REMEDY))
        elif program is not None:  # else it is said where programs are looked at
            checks += _look(host, config, specs, program, known)
    return [*_merged(checks), *_hub(host, config, starts)]


def _kind(spec: LaunchSpec) -> tuple[Any, ...]:
    """Equal for engines of which one look is enough."""
    env = sorted((name, value) for name, value in spec.env.items() if name != _OWN_VARIABLE)
    return spec.argv[0], spec.user, tuple(env)


def _merged(checks: Sequence[Check]) -> Iterator[Check]:
    """What is good of several is said once; what is not, of each."""
    for name in dict.fromkeys(check.name for check in checks):
        ones = [check for check in checks if check.name == name]
        bad = {check.seen: check for check in ones if check.level is not Level.OK}
        good = list(dict.fromkeys(check.seen for check in ones))
        more = f"; and {len(good) - SHOWN} more" if len(good) > SHOWN else ""
        yield from bad.values() or [Check(name, Level.OK, "; ".join(good[:SHOWN]) + more)]


def _look(
    host: Host,
    config: Config,
    specs: Sequence[LaunchSpec],
    program: str,
    known: dict[str, Mapping[str, bool]],
) -> list[Check]:
    """``known``: what interpreters said, which are run once: the users of all engines have the same
    groups, and a first run reads gigabytes from the disk."""
    first = specs[0]
    whom = first.user.name if first.user is not None else "root"
    interpreter = interpreter_of(host, program)
    engine = config.models[first.model].engine_type
    new = interpreter not in known
    modules = engine.modules if new and _is_environment(host, interpreter) else ()
    if modules:
        imports = f"importing {' and '.join(modules)} as {program} does, as {whom}"
        host.tell(f"{imports} (up to {IMPORT_SECS:g} s from a cold disk)")
    else:
        host.tell(f"looking at {program} as {whom}")
    asked = {
        "program": program,
        "interpreter": interpreter.split() if interpreter and new else [],
        "modules": modules,
        "import_secs": IMPORT_SECS,
        "models": dict(_readable(host, config, specs)),
        "directories": {**_directories(first.env), **engine.caches(first.env)},
    }
    python = PYTHON if os.path.exists(PYTHON) else sys.executable
    argv = (python, "-I", "-c", LOOK.read_text(), json.dumps(asked))
    spec = LaunchSpec(first.model, argv, first.env, first.user, "", "", first.runtime_dir)
    if interpreter is not None:
        known.setdefault(interpreter, {})  # also when it does not answer: that took long enough
    ran = host.as_engine(spec, LOOK_SECS + (IMPORT_SECS if modules else 0))
    try:
        said: dict[str, Any] = json.loads(ran.output.splitlines()[-1])
        problems = said["problems"]
    except (ValueError, IndexError, LookupError, TypeError):
        words = ran.output.strip().splitlines()[-1:] or ["no answer"]
        return [Check(NAME, Level.WARN, f"could not be looked at as {whom}: {words[0]}", REMEDY)]
    if interpreter is not None:
        said["found"] = known[interpreter] = {**known[interpreter], **said["found"]}
    return list(_judged(host, program, whom, said, problems, modules))


def _judged(
    host: Host,
    program: str,
    whom: str,
    said: Mapping[str, Any],
    problems: Sequence[str],
    modules: Sequence[str],
) -> Iterator[Check]:
    if problems:
        yield Check(NAME, Level.FAIL, f"{whom} {'; '.join(problems)}", REMEDY)
    else:
        files = said["files"]
        read = f"{files} file{'' if files == 1 else 's'} of models can be read"
        yield Check(NAME, Level.OK, f"as {whom}: {program} can be executed, {read}")
    if said["imports"] is not None:
        remedy = IMPORTS_REMEDY.format(said["imports"].partition(" ")[0], modules[-1])
        yield Check(IMPORTS, Level.FAIL, f"as {whom}: {said['imports']}", remedy)
    elif modules and not problems:
        yield Check(IMPORTS, Level.OK, f"{program}: {', '.join(modules)}")
    if said["closed"]:
        seen = "; ".join(f"{_and(what)} ({why})" for why, what in said["closed"].items())
        yield Check(DIRECTORIES, Level.FAIL, f"{whom} cannot write {seen}", DIRECTORIES_REMEDY)
    else:
        yield Check(DIRECTORIES, Level.OK, "HOME, TMPDIR and caches can be written")
    if host.read("/proc/driver/nvidia/version") is not None and not problems:
        yield _compilers(program, said["found"])


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _is_environment(host: Host, interpreter: str | None) -> bool:
    """Whether it is the Python of a virtual environment: another one has no vLLM to import."""
    if interpreter is None:
        return False
    prefix = os.path.dirname(os.path.dirname(interpreter.split()[0]))
    return host.path(f"{prefix}/pyvenv.cfg").exists()


def _directories(env: Mapping[str, str]) -> dict[str, str]:
    temporary = env.get("TMPDIR") or "/tmp"  # noqa: S108  # looked at, not used
    return {"HOME": env["HOME"], "TMPDIR": temporary, "the Hugging Face cache": hub_cache(env)}


def _readable(host: Host, config: Config, specs: Sequence[LaunchSpec]) -> Iterator[tuple[str, str]]:
    for spec in specs:
        path = config.models[spec.model].model_path
        if path.startswith("/"):
            if host.path(path).exists():
                yield spec.model, path
        elif missing_of_model(path, spec.env) is None and (
            directory := model_directory(path, spec.env)
        ):
            yield spec.model, directory


def _hub(host: Host, config: Config, starts: Sequence[LaunchSpec]) -> Iterator[Check]:
    """Models whose files are not complete on this host."""
    good = []
    for spec in starts:
        path = config.models[spec.model].model_path
        if not _HUB_NAME.fullmatch(path) or host.path(f"/{path}").exists():
            continue
        missing = missing_of_model(path, spec.env)
        if missing is None:
            good.append(path)
            continue
        offline = spec.env.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        seen = f"{path} of {spec.model} is not complete in {hub_cache(spec.env)}: {missing}"
        then = "" if offline else "; else its engine downloads it at its first start"
        if offline:
            seen += ", and HF_HUB_OFFLINE forbids its download"
        elif missing_of_model(path, ROOT) is None:
            seen += f"; {hub_cache(ROOT)} has it, which engines cannot read"
        level = Level.FAIL if offline else Level.WARN
        yield Check(HUB, level, seen, HUB_REMEDY.format(path, then))
    if good:
        yield Check(HUB, Level.OK, f"complete on this host: {', '.join(dict.fromkeys(good))}")


def _compilers(program: str, found: Mapping[str, bool]) -> Check:
    missing = [name for name in ("ninja", "cc", "Python.h") if found.get(name) is False]
    if not found.get("nvcc") and not found.get("flashinfer-jit-cache"):
        missing.append("nvcc or flashinfer-jit-cache")
    if missing:
        seen = f"{program} finds no {', no '.join(missing)}"
        return Check(COMPILERS, Level.WARN, seen, COMPILERS_REMEDY)
    return Check(COMPILERS, Level.OK, f"all that {program} may need")
