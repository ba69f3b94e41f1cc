"""The command line's checkpoint, restore and validate, with and without a running supervisor."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from llmux_guest import CONFIG, GATEWAY, GPU, SUPERVISOR, LlmuxGuest
from parking_lab import AS_ROOT, CUDA, ParkingLab, small

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

# What the service's environment says, for the command line that stands in for it.
ALONE = {
    "LLMUX_GPU_LEDGER": f"{GPU}/ledger.json",
    "STANDIN_LEDGER": f"{GPU}/ledger.json",
    "LLMUX_LIBCUDA": f"{CUDA}/libcuda.so.1",
    "STANDIN_CUDA": CUDA,
}


@pytest.fixture(scope="module")
def lab(llmux: LlmuxGuest) -> Iterator[ParkingLab]:
    lab = ParkingLab(llmux)
    yield lab
    lab.end()


def test_the_running_supervisor_makes_an_image_and_shows_it(lab: ParkingLab) -> None:
    lab.begin({"alpha": small("discard+checkpoint"), "beta": small("offload+keep_running")})
    done = lab.run(["llmux", "checkpoint", "alpha"])
    print(done.stdout, done.stderr)
    path = "/var/lib/llmux/checkpoints/alpha/images"
    assert f'checkpoint_path: "{path}"' in done.stdout
    for words in ("starting the engine", "inference", "CRIU dump", "checksums"):
        assert f"alpha: {words}" in done.stderr
    again = lab.cli("checkpoint", "alpha")
    assert again["reused"]
    (row,) = lab.cli("checkpoint")
    assert (row["model"], row["eviction"], row["state"]) == ("alpha", "discard+checkpoint", "valid")
    print(lab.run(["llmux", "checkpoint", "--list"]).stdout)
    lab.good("alpha")
    assert lab.said("Restoring alpha from checkpoint")
    told = lab.cli("checkpoint", "beta", "--eviction", "retain+checkpoint", code=3)
    assert told["error"]["code"] == "invalid_request"  # its engine is started otherwise


def test_the_order_of_the_page_makes_an_image_that_is_restored(lab: ParkingLab) -> None:
    """The page's button posts to this route; root on a unix socket needs no key for it."""
    socket = "/run/llmux-gateway/http.sock"
    listen = [f"unix:{socket}", "127.0.0.1:3000"]
    lab.begin({"alpha": small("discard+checkpoint")}, gateway={"listen": listen})
    lab.good("alpha")
    words = ["curl", "-sS", "--unix-socket", socket, "-H", "content-type: application/json"]
    url = "http://localhost/control/checkpoint"
    said = json.loads(lab.run([*words, "-d", '{"model": "alpha"}', url]).stdout)
    assert said["message"].startswith("Model alpha has an image in /var/lib/llmux/"), said
    assert list(lab.images()) == ["alpha"]
    lab.good("alpha")
    assert lab.said("Restoring alpha from checkpoint")


def test_an_image_that_fits_no_more_says_why(lab: ParkingLab) -> None:
    lab.begin({"alpha": small("discard+checkpoint")})
    lab.cli("checkpoint", "alpha", "--no-warmup")
    lab.llmux.configure(
        {"alpha": small("discard+checkpoint", extra_args=["--max-num-seqs", "7"])}, **AS_ROOT
    )
    lab.run(["systemctl", "reload", "llmux"])
    (row,) = lab.cli("checkpoint")
    print(row["state"])
    assert "does not fit" in row["state"]
    assert "arg" in row["state"]


def test_without_a_supervisor_the_command_does_it_all(lab: ParkingLab) -> None:
    """As in the guide: make it ahead of time, name it in the configuration, restore from it."""
    lab.begin({"alpha": small("discard+checkpoint"), "beta": small("discard+checkpoint")})
    lab.run(["systemctl", "stop", SUPERVISOR, GATEWAY])
    words = ["llmux", "--config", CONFIG, "--checkpoint", "alpha", "--no-warmup"]
    done = lab.run([*words, "--eviction", "offload+checkpoint"], env=ALONE)
    print(done.stdout, done.stderr)
    assert "offload+checkpoint" in done.stdout
    assert lab.llmux.pids() == {}, "the engine is gone"
    assert lab.witness("held") == {}
    listed = json.loads(lab.run(["llmux", "checkpoint", "--json"], env=ALONE).stdout)
    assert [row["state"] for row in listed] == ["valid"]

    words = ["llmux", "--config", CONFIG, "--restore-detached", "alpha"]
    done = lab.run(words, env=ALONE)
    print(done.stdout, done.stderr)
    pids = lab.llmux.pids()["alpha"]
    assert pids, "it goes on without us"
    lab.run(["systemctl", "start", SUPERVISOR])
    lab.good("alpha")
    assert lab.llmux.pids()["alpha"] == pids, "the supervisor took it over"
    assert lab.said("found alpha: healthy")
    lab.good("beta")


def test_the_service_restores_an_image_that_was_made_by_hand_from_another_shell(
    lab: ParkingLab,
) -> None:
    """Another directory, umask and environment make no difference."""
    lab.begin({"alpha": small("discard+checkpoint"), "beta": small("discard+checkpoint")})
    lab.run(["systemctl", "stop", SUPERVISOR, GATEWAY])
    lab.run(["sh", "-c", "rm -rf /var/lib/llmux/checkpoints"])
    shell = {"EDITOR": "vi", "SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22", "HOME": "/var/tmp"}
    command = f"umask 022; cd /var/tmp; exec llmux --config {CONFIG} --checkpoint alpha"
    done = lab.run(["sh", "-c", command], env={**ALONE, **shell, "LANG": "de_DE.UTF-8"})
    print(done.stdout, done.stderr)
    lab.run(["systemctl", "start", SUPERVISOR])
    lab.good("alpha")
    assert lab.said("Restoring alpha from checkpoint")
    assert not lab.said("does not fit")


def test_what_cannot_be_restored_is_said_and_nothing_stays(lab: ParkingLab) -> None:
    lab.begin({"alpha": small("discard+checkpoint")})
    done = lab.run(["llmux", "restore", "alpha", "--detached"], check=False)
    assert done.returncode == 3
    assert "no checkpoint available" in done.stderr
    assert lab.llmux.pids() == {}


@pytest.mark.parametrize("alone", [False, True], ids=["supervisor", "alone"])
def test_ways_of_parking_are_validated(lab: ParkingLab, alone: bool) -> None:
    lab.begin({"alpha": small("retain+stop", 16), "beta": small("retain+stop")})
    if alone:
        lab.run(["systemctl", "stop", SUPERVISOR, GATEWAY])
    ways = "offload+keep_running,discard+keep_running,retain+cuda_suspend,discard+checkpoint"
    done = lab.run(
        ["llmux", "--config", CONFIG, "--validate", "alpha", "--policies", ways],
        env=ALONE,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, lab.llmux.journal()
    assert "Result: ALL PASSED" in done.stdout
    assert done.stdout.count(" match ") == 4


def test_memory_that_is_not_freed_fails_the_validation(lab: ParkingLab) -> None:
    faults = {"STANDIN_FAULTS": f"{GPU}/alpha.faults"}
    lab.begin({"alpha": small("offload+keep_running", env=faults), "beta": small("retain+stop")})
    lab.llmux.guest.write(f"{GPU}/alpha.faults", '{"leak_on_sleep": true}')
    result = lab.cli("validate", "alpha", "--policies", "offload+keep_running", code=1)
    (row,) = result["policies"]
    print(row)
    assert not row["passed"]
    assert "still held" in row["problems"][0]
    lab.llmux.guest.write(f"{GPU}/alpha.faults", '{"wrong_after_wake": true}')
    lab.good("alpha")
    result = lab.cli("validate", "alpha", code=1)
    print(result["policies"])
    assert [row["response"] for row in result["policies"]] == ["MISMATCH", "MISMATCH"]
    lab.run(["rm", f"{GPU}/alpha.faults"])
    assert lab.cli("validate", "alpha")["passed"]
    lab.good("beta")
    refused = lab.run(["llmux", "validate", "alpha"], check=False)
    assert refused.returncode == 3
    assert "llmux unload beta" in refused.stderr
    lab.good("alpha")


def test_the_doctor_looks_at_this_host(lab: ParkingLab) -> None:
    lab.llmux.configure({"alpha": small("discard+checkpoint")}, **AS_ROOT)
    report = lab.run(["llmux", "doctor", "--json"], check=False)
    checks = {check["name"]: check["level"] for check in json.loads(report.stdout)["checks"]}
    print(checks)
    assert (checks["CRIU"], checks["systemd"], checks["pystemd"]) == ("OK", "OK", "OK")
    assert checks["criu check"] == "OK"
