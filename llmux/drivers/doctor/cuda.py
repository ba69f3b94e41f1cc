"""Can an engine use CUDA here? Asked as an engine would: its user, without new privileges.

libcuda makes /dev/nvidia-uvm through the setuid nvidia-modprobe, which an engine cannot run: where
CUDA was never used as root since the boot, this finds what the first engine would.
"""

from __future__ import annotations

import json
import os
import sys

from llmux.config.schema import ENGINES, Config
from llmux.drivers.cuda.driver import OLDEST_DRIVER
from llmux.drivers.doctor.facts import GIB, Check, Host, Level, Needs

NAME = "CUDA per GPU"
# In a process of its own: the driver's start changes the process, and may hang.
LOOK = """
import ctypes, json, os, pwd
name, library = {user!r}, {library!r}
if os.geteuid() == 0 and name is not None:
    user = pwd.getpwnam(name)
    os.setgroups(os.getgrouplist(name, user.pw_gid))
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, as the launcher does
cuda = ctypes.CDLL(library)
def call(function, *args):
    code = getattr(cuda, function)(*args)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise SystemExit(function + ": " + (text.value or b"?").decode() + " (" + str(code) + ")")
call("cuInit", 0)
count = ctypes.c_int()
call("cuDeviceGetCount", ctypes.byref(count))
found = []
for number in range(count.value):
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cuDeviceGet", ctypes.byref(device), number)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    call("cuDevicePrimaryCtxRelease_v2", device)
    found.append((free.value, total.value))
print(json.dumps(found))
"""
LOOK_SECS = 60.0  # 2.7 s on 8 x H100, more without persistence mode
REMEDY = (
    "run `nvidia-modprobe -u -c=0` as root, or any CUDA program: engines cannot load nvidia-uvm;"
    " then see `journalctl -k` for NVRM"
)


def check_cuda(host: Host, config: Config | None) -> Check:
    """A context on each GPU, and the memory that it sees."""
    library = os.environ.get("LLMUX_LIBCUDA", "libcuda.so.1")
    needed = Needs.of(config).cuda
    name = (config.engine_user if config is not None else None) or ENGINES
    user = name if host.user_exists(name) else None
    script = LOOK.format(user=user, library=library)
    ran = host.run([sys.executable, "-I", "-c", script], LOOK_SECS)
    lines = [line.strip() for line in ran.output.splitlines() if line.strip()]
    if ran.status == 0 and lines:
        memory = next(json.loads(line) for line in lines if line.startswith("["))
        seen = ", ".join(
            f"GPU {gpu}: {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            for gpu, (free, total) in enumerate(memory)
        )
        as_whom = f"as {user}" if user is not None else "as we are"
        return Check(NAME, Level.OK, f"a context on each, {as_whom}: {seen or 'there is no GPU'}")
    words = lines[-1][:200] if lines else f"no answer within {LOOK_SECS:g} s"
    if "cannot open shared object file" in words:
        level = Level.FAIL if needed else Level.OK
        return Check(
            NAME, level, f"no {library} here", f"install an NVIDIA driver >= {OLDEST_DRIVER}"
        )
    return Check(NAME, Level.FAIL, words, REMEDY)
