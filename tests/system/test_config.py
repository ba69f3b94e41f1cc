"""A configuration with a mistake: named with its place and the way out, and without consequence."""

from __future__ import annotations

import json

import pytest
from llmux_guest import CONFIG, STANDIN, SUPERVISOR, LlmuxGuest, model

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

FAULTY = f"""\
vllm_command: ["{STANDIN}"]
metrics_port: 0
models:
  alpha: {{model_path: lab/tiny}}
  beta:
    model_path: lab/tiny
"""
# what follows the text above, from line 7 on → place, path and remedy that must be named
MISTAKES = {
    "unknown key": (
        "    extra_arg: []\n",
        "7:5: models.beta.extra_arg: ",
        'did you mean "extra_args"?',
    ),
    "duplicate port": (
        "    port: 8001\n  gamma: {model_path: lab/tiny, port: 8001}\n",
        "8:39: models.gamma.port: ",
        f"taken by models.beta.port ({CONFIG}:7:11); give each its own",
    ),
    "wrong type": (
        "    startup_timeout_secs: soon\n",
        "7:27: models.beta.startup_timeout_secs: ",
        'such as 10 or "10s", got "soon"',
    ),
    "slash in a name": (
        "  org//gamma: {model_path: lab/tiny}\n",
        '7:3: models."org//gamma": ',
        'for example "org/gamma"',
    ),
    "dots for a name": (
        "  ..: {model_path: lab/tiny}\n",
        '7:3: models."..": ',
        "Use up to 100 letters, digits",
    ),
}


def expect_told(text: str, place: str, remedy: str) -> None:
    lines = [line for line in text.splitlines() if f"{CONFIG}:{place}" in line]
    assert lines, text
    assert remedy in lines[0]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_started(llmux: LlmuxGuest, mistake: str) -> None:
    addition, place, remedy = MISTAKES[mistake]
    llmux.end()
    llmux.write_config(FAULTY + addition)
    checked = llmux.run(["llmux", "check"], check=False)
    assert checked.returncode == 78
    expect_told(checked.stderr, place, remedy)

    cursor = llmux.cursor()
    assert llmux.run(["systemctl", "start", "llmux"], check=False).returncode != 0
    expect_told(llmux.journal("-u", SUPERVISOR, f"--after-cursor={cursor}"), place, remedy)
    facts = [llmux.show(SUPERVISOR, name) for name in ("ExecMainStatus", "NRestarts", "SubState")]
    assert facts == ["78", "0", "failed"]


def test_what_one_model_lacks_concerns_that_model(llmux: LlmuxGuest) -> None:
    llmux.begin({"alpha": model()})
    llmux.end()
    text = llmux.run(["cat", CONFIG]).stdout
    entry = json.loads(text)
    entry["models"]["beta"] = {**model(), "vllm_command": ["/opt/absent/vllm"]}
    llmux.write_config(json.dumps(entry))
    checked = llmux.run(["llmux", "check"], check=False)
    assert checked.returncode == 78
    assert "/opt/absent/vllm: no such file" in checked.stderr
    llmux.run(["systemctl", "start", "llmux", "llmux-gateway"])
    assert llmux.ask("alpha")["error"] == ""
    assert "/opt/absent/vllm" in llmux.ask("beta")["error"]
    assert llmux.ask("alpha")["error"] == ""


def test_an_absent_configuration_is_one_too(llmux: LlmuxGuest) -> None:
    llmux.end()
    llmux.run(["rm", "-f", CONFIG])
    checked = llmux.run(["llmux", "check"], check=False)
    assert checked.returncode == 78
    assert f"{CONFIG}:1:1: " in checked.stderr
    assert llmux.run(["systemctl", "start", "llmux"], check=False).returncode != 0
    assert llmux.show(SUPERVISOR, "ExecMainStatus") == "78"
    assert llmux.show(SUPERVISOR, "NRestarts") == "0"


@pytest.mark.parametrize("mistake", ["unknown key", "slash in a name"])
def test_a_reload_of_a_mistake_leaves_the_running_configuration(
    llmux: LlmuxGuest, mistake: str
) -> None:
    addition, place, remedy = MISTAKES[mistake]
    llmux.begin({"alpha": model(), "beta": model()})
    assert llmux.ask("alpha")["error"] == ""
    before, cursor = llmux.pids(), llmux.cursor()
    llmux.write_config(FAULTY + addition)
    assert llmux.reload() != 0
    text = llmux.journal("-u", SUPERVISOR, f"--after-cursor={cursor}")
    expect_told(text, place, remedy)
    assert "the former one stays in force" in text
    llmux.load("look", "until-status", "configuration not reloaded")
    assert llmux.pids() == before
    assert llmux.ask("alpha")["error"] == ""
    assert llmux.ask("beta")["error"] == ""


def test_reloads_do_not_repeat_the_notes_of_the_start(llmux: LlmuxGuest) -> None:
    cursor = llmux.cursor()
    llmux.begin({"alpha": model()})
    for _ in range(2):
        assert llmux.reload() == 0
    text = llmux.journal("-u", SUPERVISOR, f"--after-cursor={cursor}")
    assert text.count("configuration reloaded: ") == 2, text
    assert text.count("gateway.keys_file is not set") == 1, text
    assert "good, 1 model" not in text


def test_a_reload_adds_and_removes_models_and_leaves_the_others(llmux: LlmuxGuest) -> None:
    llmux.begin({"alpha": model(), "beta": model()})
    for name in ("beta", "alpha"):
        assert llmux.ask(name)["error"] == ""
    before = llmux.pids()
    llmux.configure({"alpha": model(), "gamma": model()})
    assert llmux.reload() == 0
    llmux.load("look", "until-scopes", "alpha")  # beta's engine is stopped
    assert llmux.pids() == {"alpha": before["alpha"]}
    assert llmux.ask("gamma")["error"] == ""
    assert llmux.ask("alpha")["error"] == ""
    assert llmux.pids()["alpha"] == before["alpha"]
    gone = llmux.ask("beta")
    assert gone["status"] == 404
    listed = json.loads(llmux.run(["curl", "-s", "http://127.0.0.1:3000/v1/models"]).stdout)
    assert sorted(entry["id"] for entry in listed["data"]) == ["alpha", "gamma"]
