"""``llmux doctor --cuda``: can CUDA state leave each GPU and come back, bytes equal?

The one check that tries what llmux is for. It is made in a process of its own, ``trip.py``, since a
call into a driver that hangs does not return.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from llmux.config.schema import ENGINES, CheckpointConfig, Config
from llmux.drivers.cuda.driver import LIBRARY
from llmux.drivers.doctor.facts import Check, Host, Level, Needs, bad
from llmux.drivers.doctor.trip import SIZE, Ask, Trip, summary
from llmux.drivers.gpu import LEDGER_VARIABLE, LIBRARY_VARIABLE

NAME = "CUDA round trip"
NO_GPU = "not measured: no GPU"
COUNT = """
import ctypes, os
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
cuda = ctypes.CDLL({library!r})
code = cuda.cuInit(0)
count = ctypes.c_int()
if code == 0:
    code = cuda.cuDeviceGetCount(ctypes.byref(count))
if code == 100:  # CUDA_ERROR_NO_DEVICE
    code = 0
print(f"cuInit: CUDA error {{code}}" if code else count.value)
"""
TRAVEL = """
import os, sys
sys.path[:0] = {path!r}
os.environ.update({variables!r})
from llmux.drivers.doctor.trip import main
main({asked!r})
"""
COUNT_SECS = 60.0  # 2.7 s on 8 x H100, more without persistence mode
TRAVEL_SECS = 300.0  # all GPUs; one takes about ten
# The trip bounds its own steps; a little more, so that it can say what went wrong.
GRACE_SECS = 240.0
REMEDY = "see `journalctl -k` for NVRM; models can be parked with `process: stop` meanwhile"
STEPS_WITHOUT_CRIU = "only suspend and resume were tried"


def check_round_trip(host: Host, config: Config | None) -> Check:
    """A throw-away context on each GPU: suspended, dumped, restored, resumed, compared."""
    needed = Needs.of(config)
    library = os.environ.get("LLMUX_LIBCUDA", LIBRARY)
    script = COUNT.format(library=library)
    ran = host.run([sys.executable, "-I", "-c", script], COUNT_SECS)
    words = _last_line(ran.output)
    if "cannot open shared object file" in words or words == "0":
        remedy = "run it where there is a GPU, with an NVIDIA driver that supports CUDA checkpoints"
        return Check(NAME, Level.FAIL if needed.cuda else Level.OK, NO_GPU, remedy)
    if ran.status != 0 or not words.isdigit():
        words = words or f"no answer within {COUNT_SECS:g} s"
        return Check(NAME, bad(needed.cuda), words, REMEDY)
    ran = host.run(
        [sys.executable, "-I", "-c", _travel(host, config, library, int(words))],
        TRAVEL_SECS + GRACE_SECS,
    )
    try:
        trips = [Trip(**row) for row in json.loads(ran.output.splitlines()[0])]
    except (ValueError, IndexError, TypeError):
        words = _last_line(ran.output) or f"no answer within {TRAVEL_SECS + GRACE_SECS:g} s"
        return Check(NAME, Level.FAIL, words, REMEDY)
    return _judge(trips, needed)


def _travel(host: Host, config: Config | None, library: str, gpus: int) -> str:
    checkpoint = config.checkpoint if config is not None else CheckpointConfig()
    name = (config.engine_user if config is not None else None) or ENGINES
    own = host.euid != 0 or name == "root" or not host.user_exists(name)
    tool = checkpoint.cuda_checkpoint_path
    asked = Ask(
        gpus=gpus,
        library=library,
        tool=tool if tool is not None and os.path.exists(tool) else None,
        criu=checkpoint.criu_path,
        user=None if own else name,
        seconds=TRAVEL_SECS,
        size=SIZE,
    )
    variables = {n: os.environ[n] for n in (LEDGER_VARIABLE, LIBRARY_VARIABLE) if n in os.environ}
    return TRAVEL.format(path=sys.path, variables=variables, asked=asdict(asked))


def _judge(trips: list[Trip], needed: Needs) -> Check:
    measured = {
        f"gpu{trip.gpu}_{step}_seconds": seconds
        for trip in trips
        for step, seconds in trip.seconds.items()
    }
    seen = summary(trips)
    for trip in trips:
        if trip.failed is not None:
            return Check(NAME, Level.FAIL, seen, trip.remedy or REMEDY, measured)
    undumped = next((trip.undumped for trip in trips if trip.undumped), None)
    if undumped is not None:
        seen = f"{seen}; {STEPS_WITHOUT_CRIU}: {undumped}"
        remedy = "install CRIU 4.1 or later, or park without `process: checkpoint`"
        return Check(NAME, bad(needed.criu), seen, remedy, measured)
    return Check(NAME, Level.OK, seen, "", measured)


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
