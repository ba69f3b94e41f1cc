"""Manual pages and shell completion, from argparse's own help, the schema and README's tables.

Usage: scripts/manual [--check]. It writes packaging/man and packaging/completions; with --check
it only says which of them differ. tests/repo/test_manual.py does the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

from llmux import __version__
from llmux.cli.main import build_parser
from llmux.config.diff import MODEL_EFFECTS, Effect, setting_effect
from llmux.config.schema import CheckpointConfig, Config, GatewayConfig, ModelConfig, PolicyConfig

ROOT = Path(__file__).resolve().parents[2]
DAEMONS = ("serve", "supervise", "gateway")  # in section 8; the other verbs are in section 1
ROW = re.compile(r"\| `([a-z_.<>]+)` \| (`?)([^|`]+)\2 \| ([^|]+) \|")
OWNERS = {
    "": Config,
    "policy": PolicyConfig,
    "checkpoint": CheckpointConfig,
    "gateway": GatewayConfig,
    "models.<name>": ModelConfig,
}
WHEN = {
    Effect.LIVE: "on reload",
    Effect.ENGINE: "when the engine is started the next time",
    Effect.GATEWAY: "on systemctl restart llmux-gateway",
    Effect.SUPERVISOR: "on systemctl restart llmux",
}
TYPES = {
    "str": "text", "int": "integer", "float": "number", "bool": "boolean", "Eviction": "eviction",
    "PolicyType": "policy",
}  # fmt: skip
# Where the default is no example.
EXAMPLES = {
    "gateway.allowed_hosts": '["llm.example.org"]',
    "models.<name>.model_path": "Qwen/Qwen3-8B",
    "models.<name>.aliases": '["gpt-4o-mini"]',
    "models.<name>.extra_args": '["--max-model-len", "16384"]',
    "models.<name>.env": "{HF_HUB_OFFLINE: '1'}",
    "models.<name>.vllm_command": "/opt/vllm/bin/vllm",
    "models.<name>.port": "8001",
    "models.<name>.eviction": "offload+keep_running",
    "models.<name>.checkpoint_path": "/srv/images/qwen3",
    "models.<name>.gpu_memory_parked": "0.05",
    "models.<name>.startup_timeout_secs": "600",
    "gateway.socket_mode": "'0660'",
    "gateway.socket_group": "www-data",
    "engine_user": "llmux-engine",
    "gateway.cors_origins": '["https://chat.example.org"]',
    "gateway.keys_file": "/etc/llmux/keys.json",
    "gateway.tls_certificate": "credential:llmux.crt",
    "gateway.tls_key": "credential:llmux.key",
    "gateway.keep_alive_comment_secs": "15",
    "checkpoint.max_bytes": "200GiB",
    "checkpoint.cuda_plugin_dir": "/usr/lib/criu",
    "checkpoint.cuda_checkpoint_path": "/usr/local/bin/cuda-checkpoint",
    "gpu_count": "4",
    "gateway.fallback_model": "qwen3-8b",
    "models.<name>.idle_timeout_secs": "30m",
    "preload": '["qwen3-8b"]',
    "policy.parked_max_bytes": "128GiB",
    "exclusive": '[["chat", "coder"]]',
}
EXIT = [
    (0, "done"), (1, "failed"), (2, "usage"), (3, "refused"),
    (4, "the supervisor cannot be reached"), (5, "the time was over"), (6, "cancelled"),
    (78, "bad configuration"), (130, "interrupted; its orders were withdrawn"),
]  # fmt: skip
FILES = [
    ("/etc/llmux/config.yaml", "the configuration; see llmux.yaml(5)"),
    ("/etc/llmux/conf.d/*.yaml", "further files, merged in the order of their names"),
    ("/var/lib/llmux/checkpoints", "checkpoint images"),
    ("/var/log/llmux/MODEL", "what its engine wrote; `llmux logs` and the journal have it, too"),
    ("/var/cache/llmux", "home of the engines' user: downloaded models"),
    ("/run/llmux/supervisor.sock", "control socket, for root and group llmux-admin"),
    ("/run/llmux/engines/MODEL/api.sock", "an engine's API"),
    ("/run/llmux/state.json", "what a next supervisor is told"),
    ("/run/llmux/events.jsonl", "events of the last hour, for the timeline of a next supervisor"),
    ("/run/llmux/last-good", "the configuration in force"),
]


# ---- troff ---------------------------------------------------------------------------------------


def escape(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.M)


def marked(text: str) -> str:
    """``code`` and *emphasis* of Markdown as bold and italic."""
    parts = re.split(r"(`[^`]+`|\*[^*]+\*)", text)
    return "".join(
        f"\\fB{escape(part[1:-1])}\\fR" if part.startswith("`")
        else f"\\fI{escape(part[1:-1])}\\fR" if part.startswith("*") and len(part) > 2
        else escape(part)
        for part in parts
    )  # fmt: skip


def page(name: str, section: int, purpose: str, *parts: str) -> str:
    head = f'.TH {name.upper()} {section} "" "llmux {__version__}" "llmux"\n'
    return f"{head}.SH NAME\n{escape(name)} \\- {escape(purpose)}\n" + "".join(parts)


def entries(pairs: list[tuple[str, str]]) -> str:
    return "".join(f".TP\n{term}\n{text}\n" for term, text in pairs)


def bold(text: str) -> str:
    return f"\\fB{escape(text)}\\fR"


# ---- verbs ---------------------------------------------------------------------------------------


@functools.cache
def verbs() -> dict[str, argparse.ArgumentParser]:
    return actions_of(build_parser())


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers below this one, by name."""
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: below for action in found for name, below in action.choices.items()}


def commands() -> dict[str, argparse.ArgumentParser]:
    """All that does something: the verbs, and in the place of a group its actions."""
    return {
        f"{name} {action}".rstrip(): below
        for name, parser in verbs().items()
        for action, below in (actions_of(parser) or {"": parser}).items()
    }


def options(
    parser: argparse.ArgumentParser, *, skip: tuple[str, ...] = ()
) -> list[tuple[str, str]]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.dest in (*skip, "help"):
            continue
        value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
        if isinstance(value, tuple):
            value = " ".join(value)
        names = ", ".join(map(bold, action.option_strings)) or f"\\fI{escape(str(value))}\\fR"
        if action.option_strings and value:
            names += f" \\fI{escape(str(value))}\\fR"
        found.append((names, escape(_help(action))))
    return found


def _help(action: argparse.Action) -> str:
    if isinstance(action, argparse._VersionAction):
        return "print the version"
    return action.help or ""


def usage(name: str, parser: argparse.ArgumentParser) -> str:
    """The verb and its own arguments on one line."""
    words = [bold(f"llmux {name}")]
    for action in parser._actions:
        if action.dest in ("help", "config", "verbose"):
            continue
        value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
        word = f"\\fI{escape(str(value))}\\fR"
        if action.option_strings:
            word = bold(action.option_strings[-1]) + (f" {word}" if value else "")
        optional = bool(action.option_strings) and not action.required
        words.append(f"[{word}]" if optional or action.nargs == "?" else word)
    return " ".join(words)


def of_verbs(names: list[str]) -> str:
    text = ""
    for name in names:
        parser = commands()[name]
        own = [(n, h) for n, h in options(parser, skip=("config", "verbose")) if h]
        text += f".SS {escape(name)}\n{usage(name, parser)}\n.PP\n"
        text += f"{escape((parser.description or '').capitalize())}.\n{entries(own)}"
    return text


def llmux_1() -> str:
    names = [name for name in commands() if name not in DAEMONS]
    codes = [(bold(str(code)), escape(meaning)) for code, meaning in EXIT]
    return page(
        "llmux", 1, "ask and order the model multiplexer",
        ".SH SYNOPSIS\n\\fBllmux\\fR [\\fIOPTIONS\\fR] \\fIVERB\\fR [\\fIARGUMENTS\\fR]\n",
        ".SH DESCRIPTION\n" + escape(build_parser().description or "") + "\n",
        ".SH OPTIONS\n" + entries(options(build_parser())),
        ".SH VERBS\n" + of_verbs(names),
        ".SH EXIT STATUS\n" + entries(codes),
        ".SH SEE ALSO\n\\fBllmux\\fR(8), \\fBllmux.yaml\\fR(5)\n",
    )  # fmt: skip


def llmux_8() -> str:
    files = [(f"\\fI{escape(path)}\\fR", escape(what)) for path, what in FILES]
    units = [
        (bold("llmux.service"), "The supervisor. Its restart leaves engines and streams running."),
        (bold("llmux-gateway.service"),
         "The OpenAI endpoint. The former gateway finishes its requests beside the next one."),
        (bold("llmux-MODEL.scope"), "An engine with all its processes."),
        (bold("llmux.slice"), "All of them. Stopping it ends everything."),
    ]  # fmt: skip
    return page(
        "llmux", 8, "model multiplexer for one GPU server",
        ".SH SYNOPSIS\n\\fBsystemctl enable \\-\\-now llmux\\fR\n",
        ".SH DESCRIPTION\n" + escape(
            "Two services and one scope per engine. A request names a model; llmux makes it"
            " resident on the GPU, parks what is in the way, and lets the request through."
        ) + "\n",
        ".SH UNITS\n" + entries(units),
        ".SH COMMANDS\n" + of_verbs(list(DAEMONS)),
        ".SH SIGNALS\n" + entries([
            (bold("SIGHUP"), "Read the configuration, keys and certificate again."),
            (bold("SIGTERM"), "Stop; engines go on."),
        ]),
        ".SH FILES\n" + entries(files),
        ".SH DIAGNOSTICS\n\\fBllmux doctor\\fR, \\fBllmux ps\\fR, \\fBllmux logs\\fR \\fIMODEL\\fR,"
        " \\fBjournalctl \\-u llmux \\-u llmux\\-gateway\\fR\n",
        ".SH SEE ALSO\n\\fBllmux\\fR(1), \\fBllmux.yaml\\fR(5),"
        " /usr/share/doc/llmux/README.md.gz\n",
    )  # fmt: skip


# ---- keys ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Key:
    path: str
    kind: str
    default: str
    text: str
    when: str
    example: str


def keys() -> list[Key]:
    """README's tables, which a test compares with the schema, in their order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"\| key \| default \| \|\n(?:\|.*\n)+", readme)
    return [
        Key(
            path,
            kind(path),
            default,
            text,
            WHEN[effect(path)],
            EXAMPLES.get(path, example(default)),
        )
        for path, _, default, text in ROW.findall("".join(tables))
    ]


def effect(path: str) -> Effect:
    section, _, name = path.rpartition(".")
    return MODEL_EFFECTS[name] if section == "models.<name>" else setting_effect(path)


def kind(path: str) -> str:
    section, _, name = path.rpartition(".")
    hints = get_type_hints(OWNERS[section])
    if name not in hints:  # policy.eviction is kept with each model
        return name
    if name.endswith(("_secs", "_ms")):
        return "duration"
    if name.endswith("_bytes"):
        return "size"
    if name == "gpus":
        return "integer or list of integers"
    return _type(hints[name])


def _type(hint: Any) -> str:
    if name := TYPES.get(getattr(hint, "__name__", "")):
        return name
    arguments = [one for one in getattr(hint, "__args__", ()) if one not in (type(None), Ellipsis)]
    origin = getattr(getattr(hint, "__origin__", None), "__name__", "")
    if origin == "tuple":
        return f"list of {_type(arguments[0])}"
    if origin == "Mapping":
        return "mapping"
    return " or ".join(dict.fromkeys(map(_type, arguments)))


def example(default: str) -> str:
    return {"none": "", "off": "0", "yes": "yes", "no": "no"}.get(default, default)


def llmux_yaml_5() -> str:
    pairs = []
    for key in keys():
        last = key.path.rpartition(".")[2]
        facts = f"Type: {key.kind}. Default: {key.default}. Takes effect {key.when}."
        shown = bold(f"{last}: {key.example}")
        text = f"{marked(key.text.strip())}\n.br\n{escape(facts)}\n.br\nExample: {shown}"
        pairs.append((bold(key.path), text))
    text = (
        "YAML 1.2 or JSON. Durations are seconds, or have a unit (ms, s, m, h); sizes are bytes, or"
        " have one (KiB, MiB, GiB). Unknown keys are errors; llmux check names every problem with"
        " its line. Examples are in /usr/share/doc/llmux/examples."
    )
    model = {"model_path": "Qwen/Qwen3-8B", "eviction": "offload+keep_running"}
    sample = json.dumps({"models": {"qwen3-8b": model}}, indent=2)
    return page(
        "llmux.yaml", 5, "configuration of llmux",
        ".SH SYNOPSIS\n\\fI/etc/llmux/config.yaml\\fR, \\fI/etc/llmux/conf.d/*.yaml\\fR\n",
        ".SH DESCRIPTION\n" + escape(text) + "\n",
        ".SH KEYS\n" + entries(pairs),
        ".SH EXAMPLE\n.nf\n" + escape(sample) + "\n.fi\n",
        ".SH SEE ALSO\n\\fBllmux\\fR(1), \\fBllmux\\fR(8)\n",
    )  # fmt: skip


# ---- completion ----------------------------------------------------------------------------------


def completion() -> str:
    takes_model, lines = [], []
    for name, parser in verbs().items():
        options = sorted(word for action in parser._actions for word in action.option_strings)
        words = [*actions_of(parser), *options]
        lines.append(f"        {name}) words={' '.join(words)!r} ;;")
        if any(action.dest == "model" and not action.option_strings for action in parser._actions):
            takes_model.append(name)
    named = "\n".join(lines)
    return f"""# shellcheck shell=bash
# bash completion for llmux(1); made by scripts/manual
_llmux() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} verb='' word words=''
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case $word in
        -*) ;;
        *)
            verb=$word
            break
            ;;
        esac
    done
    case $verb in
        '') words='{" ".join(verbs())} --config --verbose --version' ;;
{named}
    esac
    case $verb in
        {" | ".join(takes_model)})
            [[ $cur == -* ]] || words=$(llmux ps 2>/dev/null | awk 'NR > 1 {{ print $1 }}')
            ;;
        check) [[ $cur == -* ]] || words="$words $(compgen -f -- "$cur")" ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}}
complete -F _llmux llmux
"""


def documents() -> dict[Path, str]:
    return {
        ROOT / "packaging/man/llmux.1": llmux_1(),
        ROOT / "packaging/man/llmux.8": llmux_8(),
        ROOT / "packaging/man/llmux.yaml.5": llmux_yaml_5(),
        ROOT / "packaging/completions/llmux": completion(),
    }


def main() -> int:
    stale = [
        path for path, text in documents().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]  # fmt: skip
    for path in stale:
        print(path.relative_to(ROOT))
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(documents()[path], encoding="utf-8")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
