"""Each of the doctor's checks just before and just behind its bound, on a made-up host."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmux.config.schema import (
    CheckpointConfig,
    Config,
    Eviction,
    GatewayConfig,
    ModelConfig,
    Process,
    Weights,
)
from llmux.drivers.doctor import gpus, parking
from llmux.drivers.doctor import run as checks
from llmux.drivers.doctor.facts import GIB, Check, Host, Level, Needs, Ran, Space, dotted, version
from llmux.errors import LlmuxError
from llmux.ports import LaunchSpec


def wanting(weights: Weights, process: Process, **fields: Any) -> Config:
    model = ModelConfig("m", "/m", eviction=Eviction(weights, process))
    return Config(models={"m": model}, **fields)


SUSPEND = wanting(Weights.RETAIN, Process.CUDA_SUSPEND)
CHECKPOINT = wanting(Weights.RETAIN, Process.CHECKPOINT)
STOP = wanting(Weights.RETAIN, Process.STOP)


def host_of(place: Path, files: dict[str, str] | None = None, **options: Any) -> Host:
    for name, text in (files or {}).items():
        path = place / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return replace(
        Host(root=place, euid=0, release="6.12.0", which=lambda name: f"/bin/{name}"), **options
    )


def answers(**known: Ran) -> Callable[[Sequence[str], float], Ran]:
    def run(argv: Sequence[str], seconds: float) -> Ran:
        assert 0 < seconds <= 60, "one look"
        return known.get(Path(argv[0]).name, Ran(None, "not there"))

    return run


def seen(check: Check) -> tuple[str, str]:
    assert check.remedy or check.level is Level.OK
    return check.level.value, check.seen


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        (None, Needs()),
        (STOP, Needs()),
        (SUSPEND, Needs(cuda=True, freeze=True, ram=True)),
        (CHECKPOINT, Needs(cuda=True, criu=True)),
        (wanting(Weights.RETAIN, Process.FREEZE), Needs(freeze=True)),
        (wanting(Weights.DISCARD, Process.KEEP_RUNNING), Needs(sleep=True)),
        (wanting(Weights.OFFLOAD, Process.KEEP_RUNNING), Needs(sleep=True, ram=True)),
        (wanting(Weights.OFFLOAD, Process.FREEZE), Needs(sleep=True, freeze=True, ram=True)),
    ],
)
def test_what_each_way_of_parking_needs(config: Config | None, needs: Needs) -> None:
    assert Needs.of(config) == needs


@pytest.mark.parametrize(
    ("release", "level"),
    [("5.14.0", "OK"), ("5.14", "OK"), ("5.13.19", "FAIL"), ("6.1", "OK"), ("4.19", "FAIL")],
)
def test_the_oldest_kernel(tmp_path: Path, release: str, level: str) -> None:
    check = checks.check_kernel(host_of(tmp_path, release=release), None)
    assert seen(check) == (level, release if level == "OK" else f"{release}: no cgroup.kill")
    assert level == "OK" or check.remedy == "boot a kernel >= 5.14"
    assert version("a 1.2-3 4") == (1, 2) and dotted((1, 2)) == "1.2"


@pytest.mark.parametrize(
    ("ran", "said"),
    [
        (Ran(0, "systemd 252 (x)"), ("OK", "252")),
        (Ran(0, "systemd 251 (x)"), ("FAIL", "251")),
        (Ran(1, "systemd 252"), ("FAIL", "systemd 252")),
        (Ran(0, "odd"), ("FAIL", "odd")),
        (Ran(None, "x" * 200), ("FAIL", "x" * 100)),
    ],
)
def test_the_oldest_systemd(tmp_path: Path, ran: Ran, said: tuple[str, str]) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert seen(checks.check_systemd(host_of(tmp_path, run=answers(systemctl=ran)), None)) == said


def test_pystemd_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1 of {name}")
    assert seen(checks.check_pystemd(host_of(tmp_path), None)) == ("OK", "1 of pystemd")

    def fails(name: str) -> str:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", fails)
    check = checks.check_pystemd(host_of(tmp_path), None)
    assert seen(check) == ("FAIL", "cannot be imported: no pystemd")


@pytest.mark.parametrize(
    ("total", "free", "level", "remedy"),
    [
        (4 * GIB, GIB, "OK", ""),
        (4 * GIB, GIB - 1, "WARN", "ls -lS"),
        (2 * GIB + 1, GIB - 1, "WARN", "ls -lS"),
        (2 * GIB, GIB - 1, "WARN", "remount,size=50%"),
    ],
)
def test_room_in_shm(tmp_path: Path, total: int, free: int, level: str, remedy: str) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    asked: list[Path] = []

    def space(path: Path) -> Space:
        asked.append(path)
        return Space(total, free)

    check = checks.check_shm(host_of(tmp_path, space=space), None)
    assert (check.level, remedy in check.remedy) == (level, True)
    assert asked == [tmp_path / "dev/shm"]


@pytest.mark.parametrize(
    ("config", "ports"),
    [
        (Config(models={}), [3000, 9090]),
        (Config(models={}, port=5, metrics_port=0), [5]),
        (Config(models={}, port=5, gateway=GatewayConfig(listen=("127.0.0.1:7", "unix:/x"))),
         [7, 9090]),
        (Config(models={}, gateway=GatewayConfig(listen=("a:7",), metrics_listen=("[::]:6",))),
         [6, 7]),
    ],
)  # fmt: skip
def test_the_gateways_ports(config: Config, ports: list[int]) -> None:
    assert checks._gateway_ports(config) == ports


def test_users_and_uring_in_words(tmp_path: Path) -> None:
    host = host_of(tmp_path, user_exists=lambda name: name != "gone")
    for config, said in (
        (None, ("OK", "one for each model, with the groups of llmux-engine")),
        (replace(STOP, engine_user="me"), ("OK", "me")),
        (replace(STOP, engine_user="root"), ("WARN", "engines run as root")),
        (replace(STOP, engine_user="gone"), ("FAIL", "no user gone")),
    ):
        assert seen(checks.check_user(host, config)) == said
    nobody = replace(host, user_exists=lambda name: False)
    assert seen(checks.check_user(nobody, None)) == ("WARN", "no user llmux-engine")
    for text, word in (("2\n", "disabled"), ("1\n", "available"), (None, "available")):
        files = {} if text is None else {"/proc/sys/kernel/io_uring_disabled": text}
        place = tmp_path / str(text).strip()
        check = checks.check_io_uring(host_of(place, files), None)
        assert (check.level, check.seen.split()[0].rstrip(";")) == ("OK", word)


# ---- driver, CRIU, GPUs --------------------------------------------------------------------------

OLD = "no CUDA checkpoint of processes that use NVML, and PyTorch does"
H200 = "refuses CUDA checkpoints on an H200 (cuda-checkpoint#37)"
HANGS = "may hang the host when a resumed engine is killed (cuda-checkpoint#53)"
KILLS = "may kill an engine that is suspended (cuda-checkpoint#58)"
NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  x\n"


@pytest.mark.parametrize(
    ("number", "gpu", "said"),
    [
        ("570.0", "", ("OK", "570.0")),
        ("569.9", "", ("FAIL", f"569.9: {OLD}")),
        ("575.1", "NVIDIA H200", ("WARN", f"575.1: {H200}")),
        ("575.1", "NVIDIA H100", ("OK", "575.1")),
        ("595.71.05", "", ("WARN", f"595.71.05: {HANGS}")),
        ("595.71.06", "", ("OK", "595.71.06")),
        ("610.57.04", "", ("WARN", f"610.57.04: {KILLS}")),
    ],
)
def test_drivers_with_faults_are_named(
    tmp_path: Path, number: str, gpu: str, said: tuple[str, str]
) -> None:
    files = {"/proc/driver/nvidia/version": NVRM.format(number)}
    host = host_of(tmp_path, files, run=answers(**{"nvidia-smi": Ran(0, gpu)}))
    assert seen(parking.check_driver(host, SUSPEND)) == said
    failing = replace(host, run=answers(**{"nvidia-smi": Ran(1, gpu)}))
    if gpu:
        assert seen(parking.check_driver(failing, SUSPEND)) == ("OK", number)
    host_of(tmp_path, {"/proc/driver/nvidia/version": "odd"})
    assert seen(parking.check_driver(host, SUSPEND)) == ("WARN", "unreadable version: 'odd'")


@pytest.mark.parametrize(
    ("number", "release", "said"),
    [
        ("4.1", "6.15.0", ("OK", "4.1 on kernel 6.15.0")),
        ("4.1", "6.16.0", ("FAIL", "4.1 on kernel 6.16.0: fails on kernels this new")),
        ("4.2", "6.16.0", ("OK", "4.2 on kernel 6.16.0")),
        ("4.0", "6.12.9", ("FAIL", "4.0 on kernel 6.12.9: older than 4.1")),
        ("4.0", "6.13.0", ("FAIL", "4.0 on kernel 6.13.0: fails on this kernel")),
        ("4.0", "6.13-rc1", ("FAIL", "4.0 on kernel 6.13-rc1: fails on this kernel")),
        ("4.1", "6.16-rc1", ("FAIL", "4.1 on kernel 6.16-rc1: fails on kernels this new")),
    ],
)
def test_criu_versions_at_their_bounds(
    tmp_path: Path, number: str, release: str, said: tuple[str, str]
) -> None:
    ran = Ran(0, f"Version: {number}\n")
    host = host_of(tmp_path, release=release, run=answers(criu=ran, other=ran))
    assert seen(parking.check_criu(host, CHECKPOINT)) == said
    other = replace(CHECKPOINT, checkpoint=CheckpointConfig(criu_path="/x/other"))
    assert seen(parking.check_criu(host, other)) == said
    gone = host_of(tmp_path, run=answers())
    assert seen(parking.check_criu(gone, CHECKPOINT)) == ("FAIL", "not there")
    assert seen(parking.check_criu(gone, STOP)) == ("WARN", "not there")


@pytest.mark.parametrize(
    ("ran", "said"),
    [
        (Ran(0, "a\nLooks good.\n\n"), ("OK", "Looks good.")),
        (Ran(0, ""), ("OK", "good")),
        (Ran(1, "Error (a): first\nError (b): last\nWarn\n"), ("FAIL", "Error (b): last")),
        (Ran(1, "one\ntwo\n"), ("FAIL", "two")),
        (Ran(7, "\n"), ("FAIL", "status 7")),
        (Ran(1, "Error " + "x" * 300), ("FAIL", "Error " + "x" * 194)),
    ],
)
def test_what_criu_check_says(tmp_path: Path, ran: Ran, said: tuple[str, str]) -> None:
    host = host_of(tmp_path, run=answers(criu=ran))
    assert seen(parking.check_criu_works(host, CHECKPOINT)) == said


def test_what_an_engines_command_is(tmp_path: Path) -> None:
    script = tmp_path / "vllm"

    def look(first: str, ran: Ran, config: Config | None = STOP) -> tuple[str, str]:
        script.write_text(first)
        host = host_of(tmp_path, which=lambda name: str(script), run=answers(python3=ran))
        (check,) = parking.check_engines(host, config)
        return seen(check)

    good = Ran(0, "0.32.0\n")
    assert look("#!/v/bin/python3 -s\n", good) == ("OK", "vllm: 0.32.0")
    assert look("#!/bin/sh\n", good)[1].endswith("its version is not known")
    assert look("python3\n", good)[1].endswith("its version is not known")
    no = ("WARN", "vllm: no vllm in /v/bin/python3")
    assert look("#!/v/bin/python3\n", Ran(1, "0.32.0")) == no
    assert look("#!/v/bin/python3\n", Ran(0, "none")) == no
    gone = host_of(tmp_path, which=lambda name: None)
    for config, level in ((STOP, "FAIL"), (None, "WARN")):
        (check,) = parking.check_engines(gone, config)
        assert seen(check) == (level, "vllm: not there or not executable")
    assert parking.interpreter_of(gone, "vllm") is None
    assert parking.interpreter_of(replace(gone, which=lambda name: "/no/such"), "vllm") is None
    own = ModelConfig("b", "/b", vllm_command=("/z/vllm", "x"))
    two = Config(models={"a": ModelConfig("a", "/a"), "b": own, "c": replace(own, name="c")})
    assert [check.seen.split(":")[0] for check in parking.check_engines(gone, two)] == [
        "/z/vllm x", "vllm",
    ]  # fmt: skip


def test_services_are_told_by_processes_alone(tmp_path: Path) -> None:
    files = {"/proc/driver/nvidia/version": "x", "/proc/self/comm": "nvidia-cuda-mps-x"}
    host = host_of(tmp_path, files)
    (check,) = gpus.check_services(host, SUSPEND)
    assert seen(check) == ("OK", "no MPS, no NVSwitches"), "a process has a number"
    (tmp_path / "proc/5").mkdir()  # it has ended
    host_of(tmp_path, {"/proc/6/comm": "xnvidia-cuda-mps\n", "/proc/7/comm": "nvidia-cuda-mps-se"})
    (check,) = gpus.check_services(host, SUSPEND)
    assert seen(check)[1].startswith("MPS runs (process 7)")
    (tmp_path / "proc/7/comm").unlink()
    (tmp_path / "proc/driver/nvidia-nvswitch/devices").mkdir(parents=True)
    (check,) = gpus.check_services(host, SUSPEND)
    assert check.seen == "no MPS, no NVSwitches"


def nvml(used: dict[str, int], rows: list[list[int]], available: bool = True) -> Ran:
    return Ran(0, json.dumps([{"0": 80 * GIB, "1": 80 * GIB}, used, rows, available, 0.1]))


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([[0, 8, GIB // 2]], None),
        ([[0, 8, GIB // 2 + 1]], "process 8 (x) holds 0.5 GiB of GPU 0"),
        ([[0, 8, GIB // 4], [1, 9, GIB // 4 + 1]],
         "process 9 (gone) holds 0.3 GiB of GPU 1; process 8 (x) holds 0.2 GiB of GPU 0"),
        ([[0, 7, 50 * GIB]], None),
        ([[0, n, n * GIB] for n in (11, 12, 13, 14)],
         "; ".join(f"process {n} (gone) holds {n}.0 GiB of GPU 0" for n in (14, 13, 12))),
    ],
)  # fmt: skip
def test_others_on_the_gpus_are_named_largest_first(
    tmp_path: Path, rows: list[list[int]], named: str | None
) -> None:
    files = {"/proc/7/cgroup": "0::/llmux.slice/llmux-m.scope/engine", "/proc/8/comm": "x\n"}
    ran: list[float] = []

    def answer(argv: Sequence[str], seconds: float) -> Ran:
        ran.append(seconds)
        return nvml({"0": GIB, "1": 0}, rows)

    host = host_of(tmp_path, files, run=answer)
    totals = "GPU 0: 1.0 of 80.0 GiB in use, GPU 1: 0.0 of 80.0 GiB in use"
    for _ in range(2):
        check = gpus.check_memory(host, None)
        assert seen(check) == (("OK", totals) if named is None else ("WARN", f"{totals}; {named}"))
    assert ran == [gpus.LOOK_SECS], "asked once for all checks"


@pytest.mark.parametrize(
    ("claims", "rows", "short"),
    [
        (((0,), 0.95), [[0, 8, 4 * GIB]], []),
        (((0,), 0.951), [[0, 8, 4 * GIB]],
         ["m claims 76.1 GiB of GPU 0, and others leave 76.0"]),
        (((1,), 0.951), [[0, 8, 4 * GIB]], []),
        (((0, 1), 0.99), [[0, 8, 4 * GIB], [1, 8, 8 * GIB]],
         ["m claims 79.2 GiB of GPU 0, and others leave 76.0",
          "m claims 79.2 GiB of GPU 1, and others leave 72.0"]),
        (((5,), 0.99), [[0, 8, 4 * GIB]], []),
    ],
)  # fmt: skip
def test_claims_beside_others(
    tmp_path: Path, claims: tuple[tuple[int, ...], float], rows: list[list[int]], short: list[str]
) -> None:
    model = ModelConfig("m", "/m", gpus=claims[0], gpu_memory=claims[1])
    config = Config(models={"m": model})
    # less than is warned of by itself
    said = nvml({"0": 0, "1": 0}, [[gpu, pid, GIB // 8] for gpu, pid, _ in rows])
    host = host_of(tmp_path, run=lambda argv, seconds: said)
    most = Config(models={"m": replace(model, gpu_memory=0.999)})
    warned = gpus.check_memory(host, most).level is Level.WARN
    assert warned is any(row[0] in claims[0] for row in rows)
    totals = {0: 80 * GIB, 1: 80 * GIB}
    found = gpus._short(config, totals, [(a, b, c) for a, b, c in rows])
    assert list(found) == short
    assert list(gpus._short(None, totals, [(0, 8, 80 * GIB)])) == []


@pytest.mark.parametrize(
    ("tools", "config", "said"),
    [
        ("nft iptables", CHECKPOINT, ("OK", "nft, iptables")),
        ("iptables", CHECKPOINT, ("OK", "iptables")),
        ("nft", STOP, ("OK", "nft")),
        ("", CHECKPOINT, ("FAIL", "neither nft nor iptables")),
        ("", None, ("WARN", "neither nft nor iptables")),
    ],
)
def test_one_tool_is_enough_for_the_network_lock(
    tmp_path: Path, tools: str, config: Config | None, said: tuple[str, str]
) -> None:
    host = host_of(tmp_path, which=lambda name: name if name in tools.split() else None)
    check = parking.check_network_lock(host, config)
    assert (check.name, seen(check)) == ("network lock", said)


@pytest.mark.parametrize("error", [LlmuxError("no such user"), KeyError("m")])
def test_how_engines_start_is_asked_once_and_a_fault_of_ours_is_no_answer(error: Exception) -> None:
    asked: list[Config] = []

    def starts(config: Config) -> list[LaunchSpec]:
        asked.append(config)
        raise error

    host = Host(starts=starts)
    if isinstance(error, LlmuxError):
        assert [host.planned(STOP), host.planned(STOP)] == [(), ()]
        assert asked == [STOP]
    else:
        with pytest.raises(KeyError):
            host.planned(STOP)
    assert Host().planned(STOP) == ()
