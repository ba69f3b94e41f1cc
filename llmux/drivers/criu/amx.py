"""AMX for restored engines: CRIU forgets that a process may use it.

A process asks the kernel once for the right to use AMX tiles (arch_prctl(2): ARCH_REQ_XCOMP_PERM),
as PyTorch does on every processor since Sapphire Rapids. CRIU 4.2.1 neither dumps nor restores that
right, so a restored engine dies of SIGILL in its first matrix product (seen with vLLM on the CPU).
It is inherited by fork and cleared by exec (kernel: Documentation/arch/x86/xstate.rst); so the
right is given to the ``criu restore`` process after its exec, and the whole restored tree has it.

Run as a program in the new unit, ``python3 -I -S amx.py CRIU ARGUMENT…``: starts CRIU, makes
it ask, waits for it and ends as it ended. An engine that never asked gets the right too, which it
will not notice unless it has a signal stack below AT_MINSIGSTKSZ.
"""

from __future__ import annotations

import ctypes
import os
import sys

# <asm/prctl.h>, <sys/ptrace.h>, <sys/user.h>, kernel 5.16 and later, x86-64 only
_ARCH_PRCTL = 158
_ARCH_GET_XCOMP_SUPP = 0x1021
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18
_TRACEME, _PEEKTEXT, _POKETEXT, _SINGLESTEP, _GETREGS, _SETREGS, _DETACH = 0, 1, 4, 9, 12, 13, 17
_R_RAX, _R_RSI, _R_RDI, _R_ORIG_RAX, _R_RIP = 10, 13, 14, 15, 16
_SYSCALL = 0x050F  # the instruction, little-endian
_SIGTRAP = 5
_NO_SYSCALL = 2**64 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_Registers = ctypes.c_ulong * 27


def is_needed() -> bool:
    """Is there a right to use AMX here that could be lost?"""
    if os.uname().machine != "x86_64":
        return False
    supported = ctypes.c_ulong()
    call = (ctypes.c_long(_ARCH_PRCTL), ctypes.c_long(_ARCH_GET_XCOMP_SUPP))
    if _libc.syscall(*call, ctypes.byref(supported)) != 0:
        return False  # an older kernel, where no process may use it
    return bool(supported.value & 1 << _XFEATURE_XTILEDATA)


def wrapped(argv: list[str]) -> list[str]:
    """A command line that runs ``argv`` with the right to use AMX; all its children inherit it."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), *argv]


def _ptrace(request: int, pid: int, address: int = 0, data: object = 0) -> int:
    ctypes.set_errno(0)
    value = int(_libc.ptrace(request, pid, address, data))
    if number := ctypes.get_errno():
        raise OSError(number, f"ptrace request {request}: {os.strerror(number)}")
    return value


def _ask_for(pid: int) -> None:
    """Make a process that stands at the first instruction of its program ask the kernel."""
    saved, changed = _Registers(), _Registers()
    _ptrace(_GETREGS, pid, 0, ctypes.addressof(saved))
    here = saved[_R_RIP]
    text = _ptrace(_PEEKTEXT, pid, here)
    changed[:] = list(saved)
    changed[_R_RAX], changed[_R_ORIG_RAX] = _ARCH_PRCTL, _NO_SYSCALL
    changed[_R_RDI], changed[_R_RSI] = _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA
    _ptrace(_POKETEXT, pid, here, text & ~0xFFFF | _SYSCALL)
    _ptrace(_SETREGS, pid, 0, ctypes.addressof(changed))
    _ptrace(_SINGLESTEP, pid)
    os.waitpid(pid, 0)
    _ptrace(_GETREGS, pid, 0, ctypes.addressof(changed))
    _ptrace(_POKETEXT, pid, here, text)
    _ptrace(_SETREGS, pid, 0, ctypes.addressof(saved))
    if answer := ctypes.c_long(changed[_R_RAX]).value:
        sys.stderr.write(f"AMX was not permitted: {os.strerror(-answer)}\n")


def main(argv: list[str]) -> None:
    child = os.fork()
    if child == 0:
        try:
            _ptrace(_TRACEME, 0)
            os.execv(argv[0], argv)  # noqa: S606  # stops with SIGTRAP when it is done
        except OSError as error:
            sys.stderr.write(f"{argv[0]}: {error}\n")
        os._exit(127)
    _, status = os.waitpid(child, 0)
    if os.WIFSTOPPED(status):
        if os.WSTOPSIG(status) == _SIGTRAP:
            try:
                _ask_for(child)
            except OSError as error:
                sys.stderr.write(f"AMX could not be asked for: {error}\n")
        _ptrace(_DETACH, child)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main(sys.argv[1:])
