"""The command line of the lab: each verb is a few lines over guest.py."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import secrets
import subprocess
import sys
import time

from . import host, image, state, vllm
from .guest import Guest, sweep
from .launch import SUITES, Options


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.act(arguments))
    except host.LabError as error:
        host.say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab",
        description="Throw-away Debian guests with a real systemd, and the real vLLM on the CPU.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    up = verbs.add_parser("up", help="start a guest (prints its name)")
    up.add_argument("name", nargs="?", help="default: a free one")
    up.add_argument("--suite", choices=SUITES, default="trixie")
    up.add_argument("--vm", action="store_true", help="a whole virtual machine, stock kernel")
    up.add_argument("--bind-ro", action="append", default=[], metavar="SRC[:DST]")
    up.add_argument("--bind", action="append", default=[], metavar="SRC[:DST]")
    up.add_argument("--deb", action="append", default=[], metavar="FILE", help="install this")
    up.add_argument("--vllm", action="store_true", help="with the real vLLM and two tiny models")
    up.add_argument("--owner-pid", type=int, metavar="PID", help="live no longer than this process")
    up.add_argument("--memory", type=int, default=2048, metavar="MIB", help="--vm only")
    up.add_argument("--cpus", type=int, default=1, help="--vm only")
    up.set_defaults(act=do_up)

    run = verbs.add_parser("run", help="run a command in a guest, with its exit status")
    run.add_argument("--env", action="append", default=[], metavar="K=V")
    run.add_argument("--user", metavar="USER")
    run.add_argument("--cwd", metavar="DIR")
    run.add_argument("--time", action="store_true", help="print how long it took")
    run.add_argument("name")
    run.add_argument("command", nargs=argparse.REMAINDER)
    run.set_defaults(act=do_run)

    shell = verbs.add_parser("shell", help="a login shell in a guest")
    shell.add_argument("name")
    shell.set_defaults(act=do_shell)

    down = verbs.add_parser("down", help="end guests; nothing of them is left")
    down.add_argument("name", nargs="*")
    down.add_argument("--all", action="store_true")
    down.set_defaults(act=do_down)

    listing = verbs.add_parser("list", help="the running guests")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(act=do_list)

    images = verbs.add_parser("image", help="build an image now instead of at the first 'up'")
    images.add_argument("--suite", choices=SUITES, default="trixie")
    images.add_argument("--vm", action="store_true")
    images.set_defaults(act=do_image)

    real = verbs.add_parser("vllm-env", help="build the CPU vLLM and its tiny models (JSON: where)")
    real.add_argument("--verify", action="store_true", help="start one on this host and ask it")
    real.set_defaults(act=do_vllm_env)
    return parser


def do_up(arguments: argparse.Namespace) -> int:
    options = Options(
        suite=arguments.suite,
        machine=arguments.vm,
        bind_ro=tuple(arguments.bind_ro),
        bind=tuple(arguments.bind),
        debs=tuple(arguments.deb),
        with_vllm=arguments.vllm,
        owner_pid=arguments.owner_pid,
        memory_mib=arguments.memory,
        cpus=arguments.cpus,
    )
    guest = Guest.start(arguments.name, options)
    host.say(f"{guest.name}: {options.suite} booted in {guest.facts['boot_seconds']} s")
    print(guest.name)
    return 0


def do_run(arguments: argparse.Namespace) -> int:
    command = arguments.command
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise host.LabError("run: no command given\n  next step: scripts/lab run NAME CMD…")
    pairs = [item.partition("=") for item in arguments.env]
    wrong = [key for key, equals, _ in pairs if not equals]
    if wrong:
        raise host.LabError(
            f"--env {wrong[0]}: no value\n  next step: write --env {wrong[0]}=VALUE"
        )
    guest = Guest.attach(arguments.name)
    began = time.monotonic()
    running = guest.popen(
        command,
        env={key: value for key, _, value in pairs},
        user=arguments.user,
        cwd=arguments.cwd,
        stdin=None,
        stdout=None,
        stderr=None,
    )
    try:
        status = running.process.wait()
    except KeyboardInterrupt:
        running.stop()
        status = 130
    if arguments.time:
        host.say(f"{(time.monotonic() - began) * 1000:.0f} ms")
    return status


def do_shell(arguments: argparse.Namespace) -> int:
    guest = Guest.attach(arguments.name)
    inside = guest.argv_for(
        ["/bin/bash", "--login"], unit=f"lab-shell-{secrets.token_hex(3)}", tty=sys.stdin.isatty()
    )
    return subprocess.run(inside, check=False).returncode


def do_down(arguments: argparse.Namespace) -> int:
    host.need_root("end a guest")
    names = [record.name for record in state.living()] if arguments.all else arguments.name
    if not names and not arguments.all:
        raise host.LabError("down: no guest named\n  next step: scripts/lab down NAME, or --all")
    for name in names:
        Guest.attach(name).down()
    sweep()
    return 0


def do_list(arguments: argparse.Namespace) -> int:
    swept = sweep()
    if swept:
        host.say(f"removed what was left of: {', '.join(swept)}")
    records = state.living()
    if arguments.json:
        print(json.dumps([{"name": record.name, **record.facts} for record in records], indent=1))
        return 0
    print(f"{'NAME':20} {'KIND':8} {'SUITE':9} {'AGE':>7} {'OWNER':>8} {'PID1':>8}")
    for record in records:
        facts = record.facts
        age = f"{time.time() - facts['started']:.0f}s"
        owner, pid1 = facts["owner_pid"] or "-", facts.get("pid1", "-")
        line = f"{record.name:20} {facts['kind']:8} {facts['suite']:9}"
        print(f"{line} {age:>7} {owner:>8} {pid1:>8}")
    return 0


def do_image(arguments: argparse.Namespace) -> int:
    built: pathlib.Path
    if arguments.vm:
        built = image.machine_image(arguments.suite).directory
    else:
        built = image.container_root(arguments.suite)
    print(os.fspath(built))
    return 0


def do_vllm_env(arguments: argparse.Namespace) -> int:
    built = vllm.environment()
    if arguments.verify:
        vllm.verify(built)
    print(built.as_json())
    return 0
