"""Every check of the doctor on a made-up host: good, bad, and bad but not needed."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmux.cli.doctor import doctor
from llmux.config.schema import (
    CheckpointConfig,
    Config,
    Eviction,
    ModelConfig,
    Process,
    Weights,
)
from llmux.drivers.doctor import gpus, parking, room
from llmux.drivers.doctor import run as host_checks
from llmux.drivers.doctor.facts import GIB, Check, Host, Level, Ran, Space, run, version

GREETING = {"hello": 1, "driver_version": 12080, "missing": [], "problem": None, "code": 0}
NVRM = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\n"


def wanting(weights: Weights, process: Process, **checkpoint: Any) -> Config:
    model = ModelConfig("m", "/m", eviction=Eviction(weights, process))
    return Config(models={"m": model}, checkpoint=CheckpointConfig(**checkpoint))


CHECKPOINT = wanting(Weights.RETAIN, Process.CHECKPOINT)
SUSPEND = wanting(Weights.RETAIN, Process.CUDA_SUSPEND)
SLEEP = wanting(Weights.DISCARD, Process.KEEP_RUNNING)
STOP = wanting(Weights.RETAIN, Process.STOP)


class Programs:
    """Canned answers by the first words of a command line; the rest is not there."""

    def __init__(self, **answers: Ran) -> None:
        self.answers = {name.replace("_", " "): ran for name, ran in answers.items()}

    def __call__(self, argv: Sequence[str], seconds: float) -> Ran:
        assert 0 < seconds <= 60, "one look"
        line = " ".join([Path(argv[0]).name, *argv[1:]])
        for name, ran in self.answers.items():
            if line.startswith(name):
                return ran
        return Ran(None, f"cannot run {argv[0]}: No such file or directory")


def make(tmp_path: Path, files: dict[str, str] | None = None, **options: Any) -> Host:
    for name, text in (files or {}).items():
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    base = Host(
        root=tmp_path,
        run=Programs(),
        which=lambda name: f"/usr/bin/{name}",
        space=lambda path: Space(100 * GIB, 50 * GIB),
        memory=lambda: (64 * GIB, 0),
        user_exists=lambda name: True,
        euid=0,
        release="6.12.48-amd64",
    )
    return replace(base, **options)


def level(check: Check, words: str = "") -> Level:
    assert words in check.seen
    assert check.level is Level.OK or check.remedy or check.name == "libcuda", check
    return check.level


@pytest.mark.parametrize(
    ("number", "config", "expected"),
    [
        ("580.65.06", SUSPEND, "OK"),
        ("570.86.15", SUSPEND, "OK"),
        ("595.71.05", SUSPEND, "WARN"),
        ("595.71.05", STOP, "OK"),
        ("610.57.04", SUSPEND, "WARN"),
        ("575.57.08", SUSPEND, "OK"),  # known of the H200 only: see below
        ("550.163.01", SUSPEND, "FAIL"),
        ("550.163.01", STOP, "WARN"),
        (None, CHECKPOINT, "FAIL"),
        (None, None, "WARN"),
    ],
)
def test_driver(tmp_path: Path, number: str | None, config: Config | None, expected: str) -> None:
    files = {"/proc/driver/nvidia/version": NVRM.format(number)} if number else {}
    assert level(parking.check_driver(make(tmp_path, files), config), number or "") == expected


def test_a_driver_with_a_fault_of_one_gpu_is_named_there(tmp_path: Path) -> None:
    files = {"/proc/driver/nvidia/version": NVRM.format("575.57.08")}
    smi = Programs()
    smi.answers = {"nvidia-smi": Ran(0, "NVIDIA H200\n")}
    check = parking.check_driver(make(tmp_path, files, run=smi), SUSPEND)
    assert level(check, "cuda-checkpoint#37") is Level.WARN
    assert "580" in check.remedy


@pytest.mark.parametrize(
    ("change", "words", "expected"),
    [
        ({}, "CUDA 12.8, all checkpoint functions", "OK"),
        ({"missing": ["cuCheckpointProcessLock"]}, "lacks cuCheckpointProcessLock", "FAIL"),
        ({"problem": "cannot load libcuda.so.1"}, "cannot load", "FAIL"),
        ({"code": 100, "name": "NO_DEVICE", "text": "no device"}, "no device", "FAIL"),
    ],
)
def test_libcuda(tmp_path: Path, change: dict[str, Any], words: str, expected: str) -> None:
    said = Ran(0, json.dumps({**GREETING, **change}) + "\n")
    host = make(tmp_path, run=lambda argv, seconds: said)
    assert level(parking.check_libcuda(host, SUSPEND), words) == expected
    if expected == "FAIL":  # with the tool configured the library is not needed
        config = wanting(Weights.RETAIN, Process.CUDA_SUSPEND, cuda_checkpoint_path="/x")
        assert level(parking.check_libcuda(host, config), words) == "WARN"


def test_libcuda_with_a_helper_that_says_nothing(tmp_path: Path) -> None:
    assert level(parking.check_libcuda(make(tmp_path), SUSPEND), "the CUDA helper failed") == "FAIL"


def with_driver(tmp_path: Path, files: dict[str, str], **options: Any) -> Host:
    return make(
        tmp_path, {"/proc/driver/nvidia/version": NVRM.format("580.65.06"), **files}, **options
    )


def test_services_beside_the_driver(tmp_path: Path) -> None:
    (plain,) = gpus.check_services(with_driver(tmp_path / "a", {"/proc/7/comm": "bash\n"}), SUSPEND)
    assert level(plain, "no MPS, no NVSwitches") is Level.OK
    assert gpus.check_services(make(tmp_path / "b"), SUSPEND) == []
    mps = with_driver(tmp_path / "c", {"/proc/812/comm": "nvidia-cuda-mps\n"})
    for config, expected in ((SUSPEND, Level.FAIL), (STOP, Level.WARN)):
        (check,) = gpus.check_services(mps, config)
        assert level(check, "MPS runs (process 812)") is expected
    switch = {"/proc/driver/nvidia-nvswitch/devices/0000:05:00.0": ""}
    for said, expected in (("active\n", Level.OK), ("inactive\n", Level.FAIL)):
        programs = Programs()
        programs.answers = {"systemctl is-active": Ran(0, said)}
        (check,) = gpus.check_services(with_driver(tmp_path / "d", switch, run=programs), STOP)
        assert level(check, f"nvidia-fabricmanager is {said.strip()}") is expected


def test_memory_that_may_not_be_promised_twice(tmp_path: Path) -> None:
    host = make(tmp_path, {"/proc/sys/vm/overcommit_memory": "2\n"})
    check = room.check_memory(host, STOP)
    assert level(check, "vm.overcommit_memory is 2") is Level.WARN


def test_gpus(tmp_path: Path) -> None:
    for text, expected in (
        ("NVIDIA H200, 143771 MiB, Enabled, Disabled\n", "OK"),
        ("NVIDIA GeForce RTX 4090, 24564 MiB, Enabled, [N/A]\n", "OK"),
        ("NVIDIA H200, 143771 MiB, Disabled, Disabled\n", "WARN"),
        ("NVIDIA H200, 143771 MiB, Enabled, Enabled\n", "FAIL"),
    ):
        host = make(tmp_path, run=lambda argv, seconds, text=text: Ran(0, text))
        check = parking.check_gpus(host, SUSPEND)
        assert level(check, text.strip()) == expected
        if expected == "WARN":
            assert check.seen.startswith("persistence mode is off")
            assert "nvidia-persistenced" in check.remedy
    assert level(parking.check_gpus(make(tmp_path), STOP), "nvidia-smi") == "WARN"
    none = parking.check_gpus(make(tmp_path, run=lambda argv, seconds: Ran(0, " \n")), SUSPEND)
    assert (level(none, "nvidia-smi found none"), "NVRM" in none.remedy) == ("FAIL", True)
    gone = parking.check_gpus(make(tmp_path, which=lambda name: None), STOP)
    assert "install nvidia-smi" in gone.remedy


def test_cuda_checkpoint_tool(tmp_path: Path) -> None:
    config = wanting(Weights.RETAIN, Process.CUDA_SUSPEND, cuda_checkpoint_path="/opt/cc")
    good = make(tmp_path, run=lambda argv, seconds: Ran(0, "--action\n--toggle\n"))
    old = make(tmp_path, run=lambda argv, seconds: Ran(0, "--toggle\n"))
    gone = make(tmp_path, which=lambda name: None)
    assert level(parking.check_cuda_checkpoint(good, config)) == "OK"
    assert level(parking.check_cuda_checkpoint(old, config), "no --action") == "FAIL"
    assert level(parking.check_cuda_checkpoint(gone, config), "/opt/cc") == "FAIL"
    assert level(parking.check_cuda_checkpoint(gone, SUSPEND), "driver API") == "OK"


@pytest.mark.parametrize(
    ("number", "release", "config", "expected"),
    [
        ("4.2.1", "6.18.0", CHECKPOINT, "OK"),
        ("4.1.1", "6.12.48", CHECKPOINT, "OK"),
        ("4.1.1", "6.18.0", CHECKPOINT, "FAIL"),
        ("4.1.1", "6.18.0", STOP, "WARN"),
        ("3.17.1", "6.13.0", CHECKPOINT, "FAIL"),
        ("3.17.1", "6.1.0", CHECKPOINT, "FAIL"),
        ("3.17.1", "6.13.0", None, "WARN"),
    ],
)
def test_criu_version(
    tmp_path: Path, number: str, release: str, config: Config | None, expected: str
) -> None:
    answer = Ran(0, f"Version: {number}\nGitID: v{number}\n")
    host = make(tmp_path, run=Programs(criu=answer), release=release)
    check = parking.check_criu(host, config)
    assert level(check, number) == expected
    # no distribution is told to install what it does not have
    assert expected == "OK" or "Debian 13: 4.1.1, for kernels before 6.16" in check.remedy


def test_criu_missing(tmp_path: Path) -> None:
    host = make(tmp_path, which=lambda name: None)
    assert level(parking.check_criu(host, CHECKPOINT)) == "FAIL"
    assert level(parking.check_criu_works(host, CHECKPOINT)) == "FAIL"
    assert level(parking.check_network_lock(host, CHECKPOINT)) == "FAIL"
    assert level(parking.check_network_lock(host, STOP)) == "WARN"


def test_criu_check(tmp_path: Path) -> None:
    good = make(tmp_path, run=Programs(criu=Ran(0, "Looks good.\n")))
    assert level(parking.check_criu_works(good, CHECKPOINT), "Looks good.") == "OK"
    text = "Warn  (x.c:1): hm\nError (criu/cr-check.c:900): no PAGEMAP_SCAN\nfoo\n"
    poor = make(tmp_path, run=Programs(criu=Ran(1, text)))
    assert level(parking.check_criu_works(poor, CHECKPOINT), "no PAGEMAP_SCAN") == "FAIL"
    user = replace(good, euid=1000)
    assert level(parking.check_criu_works(user, CHECKPOINT), "root") == "WARN"
    tight = make(tmp_path, {"/proc/sys/kernel/yama/ptrace_scope": "3\n"})
    assert level(parking.check_criu_works(tight, CHECKPOINT), "ptrace_scope is 3") == "FAIL"


@pytest.mark.parametrize(
    ("number", "config", "expected"),
    [
        ("0.32.0", SLEEP, "OK"),
        ("0.17.0", SLEEP, "OK"),
        ("0.15.1", SLEEP, "FAIL"),
        ("0.15.1", STOP, "WARN"),
        ("0.14.0rc1", SLEEP, "FAIL"),
        ("0.13.0", SLEEP, "WARN"),
    ],
)
def test_vllm_version(tmp_path: Path, number: str, config: Config, expected: str) -> None:
    script = tmp_path / "vllm"
    script.write_text("#!/opt/vllm/bin/python3\nimport sys\n")
    asked: list[str] = []

    def answer(argv: Sequence[str], seconds: float) -> Ran:
        asked.append(argv[0])
        return Ran(0, number + "\n")

    host = make(tmp_path, run=answer, which=lambda name: str(script))
    (found,) = parking.check_engines(host, config)
    assert level(found, number) == expected
    assert asked == ["/opt/vllm/bin/python3"]


def test_vllm_commands_of_all_models_are_looked_at(tmp_path: Path) -> None:
    own = ModelConfig("a", "/a", vllm_command=("/opt/a/vllm",))
    config = Config(models={"a": own, "b": ModelConfig("b", "/b")})
    found = parking.check_engines(make(tmp_path, which=lambda name: None), config)
    assert [check.seen.split(":")[0] for check in found] == ["/opt/a/vllm", "vllm"]
    assert {check.level for check in found} == {Level.FAIL}


def test_cgroup(tmp_path: Path) -> None:
    assert level(host_checks.check_cgroup(make(tmp_path), None)) == "FAIL"
    files = {"/sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n"}
    files["/sys/fs/cgroup/system.slice/cgroup.freeze"] = "0"
    assert level(host_checks.check_cgroup(make(tmp_path, files), None), "cgroup.kill") == "FAIL"
    files["/sys/fs/cgroup/system.slice/cgroup.kill"] = ""
    assert level(host_checks.check_cgroup(make(tmp_path, files), None), "unified") == "OK"
    files["/sys/fs/cgroup/cgroup.controllers"] = "\n"
    assert level(host_checks.check_cgroup(make(tmp_path, files), None), "MemoryMax") == "WARN"


def test_systemd(tmp_path: Path) -> None:
    assert level(host_checks.check_systemd(make(tmp_path), None), "PID 1") == "FAIL"
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    for text, expected in (
        ("systemd 257 (257.13-1)\n+PAM", "OK"),
        ("systemd 249 (249.11)", "FAIL"),
    ):
        host = make(tmp_path, run=Programs(systemctl=Ran(0, text)))
        assert level(host_checks.check_systemd(host, None)) == expected


def test_kernel_root_and_io_uring(tmp_path: Path) -> None:
    assert level(host_checks.check_kernel(make(tmp_path), None)) == "OK"
    old = make(tmp_path, release="5.10.0-8-amd64")
    assert level(host_checks.check_kernel(old, None), "cgroup.kill") == "FAIL"
    assert level(host_checks.check_root(make(tmp_path), None)) == "OK"
    assert level(host_checks.check_root(make(tmp_path, euid=7), None), "uid 7") == "WARN"
    off = make(tmp_path, {"/proc/sys/kernel/io_uring_disabled": "2\n"})
    assert level(host_checks.check_io_uring(off, None), "disabled") == "OK"


def test_journal(tmp_path: Path) -> None:
    assert level(host_checks.check_journal(make(tmp_path), None)) == "WARN"
    directory = tmp_path / "run/systemd/journal"
    directory.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(directory / "socket"))
        assert level(host_checks.check_journal(make(tmp_path), None)) == "OK"


def test_engine_user(tmp_path: Path) -> None:
    nobody = make(tmp_path, user_exists=lambda name: False)
    assert level(host_checks.check_user(nobody, STOP), "llmux-engine") == "FAIL"
    assert level(host_checks.check_user(make(tmp_path), STOP)) == "OK"
    root = replace(STOP, engine_user="root")
    assert level(host_checks.check_user(make(tmp_path), root), "as root") == "WARN"


def test_images_directory(tmp_path: Path) -> None:
    assert level(room.check_images(make(tmp_path), CHECKPOINT), "50 GiB free") == "OK"
    full = make(tmp_path, space=lambda path: Space(100 * GIB, GIB))
    assert level(room.check_images(full, CHECKPOINT)) == "WARN"
    assert level(room.check_images(full, STOP)) == "OK"
    large = wanting(Weights.RETAIN, Process.CHECKPOINT, max_bytes=200 * GIB)
    assert level(room.check_images(make(tmp_path), large), "max_bytes") == "WARN"
    directory = tmp_path / "var/lib/llmux/checkpoints"
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    assert level(room.check_images(make(tmp_path), CHECKPOINT), "0755") == "FAIL"


def test_shm_and_memory(tmp_path: Path) -> None:
    assert level(host_checks.check_shm(make(tmp_path), None), "not there") == "FAIL"
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert level(host_checks.check_shm(make(tmp_path), None)) == "OK"
    small = make(tmp_path, space=lambda path: Space(64 << 20, 64 << 20))
    assert level(host_checks.check_shm(small, None), "0.1 GiB") == "WARN"
    poor = make(tmp_path, memory=lambda: (1 << 20, 0))
    assert level(room.check_memory(poor, SUSPEND)) == "WARN"
    assert level(room.check_memory(poor, STOP)) == "OK"


def test_a_port_of_the_gateways_that_another_process_has(tmp_path: Path) -> None:
    row = "0: 00000000:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000 1000 0 4242 1"
    files = {"/proc/self/net/tcp": f"sl local_address\n{row}\n", "/proc/77/comm": "nc\n"}
    host = make(tmp_path, files)
    (tmp_path / "proc/77/fd").mkdir()
    (tmp_path / "proc/77/fd/3").symlink_to("socket:[4242]")
    assert level(host_checks.check_ports(host, STOP), "process 77 (nc) has port 3000") == "FAIL"
    other = replace(STOP, port=3001)
    assert level(host_checks.check_ports(host, other), "3001, 9090: the gateway's") == "OK"
    group = "/sys/fs/cgroup/llmux.slice/llmux-gateway.service/cgroup.procs"
    assert level(host_checks.check_ports(make(tmp_path, {group: "77\n"}), STOP)) == "OK"


def test_an_unreadable_host_hides_no_other_check(tmp_path: Path) -> None:
    def broken(path: Path) -> Space:
        raise PermissionError(13, "Permission denied")

    found = host_checks.run_checks(CHECKPOINT, make(tmp_path, space=broken))
    names = [check.name for check in found]
    assert names[:3] == ["privilege", "kernel", "systemd"]
    images = found[names.index("images directory")]
    assert images.level is Level.WARN
    assert "Permission denied" in images.seen


@pytest.mark.parametrize("worst", [Level.OK, Level.WARN, Level.FAIL])
def test_prints_a_table_or_json_and_fails_only_on_fail(worst: Level) -> None:
    checks = [Check("kernel", Level.OK, "6.12"), Check("CRIU", worst, "4.1", "install it")]
    for as_json in (False, True):
        out = io.StringIO()
        code = doctor(checks, as_json=as_json, out=out)
        assert code == (1 if worst is Level.FAIL else 0)
        if as_json:
            document = json.loads(out.getvalue())
            assert document["ok"] is (worst is not Level.FAIL)
            assert document["checks"][1]["level"] == worst
        else:
            assert "OK    kernel  6.12" in out.getvalue()
            assert ("→ install it" in out.getvalue()) is (worst is not Level.OK)


def test_versions_and_programs() -> None:
    assert version("systemd 257 (257.13)") == (257,)
    assert version("none") == ()
    assert run(["/bin/echo", "there"], 10.0) == Ran(0, "there")
    assert run(["/nonexistent/tool"], 10.0).status is None
