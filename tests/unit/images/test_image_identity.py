"""What an image was made for: weights, launch and host, and the notes about what is under way."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable

import pytest

from llmux.drivers.images import identity, notes
from llmux.drivers.images.identity import HERE, Shown
from llmux.drivers.images.manifest import KeptPath, first_mismatch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# ---- the cache of the hub ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "hub"),
    [
        ({}, "/root/.cache/huggingface/hub"),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
        ({"HOME": "/h", "HF_HOME": "/hf"}, "/hf/hub"),
        ({"HF_HOME": ""}, "/root/.cache/huggingface/hub"),
        ({"HF_HOME": "/hf", "HF_HUB_CACHE": "/cache"}, "/cache"),
        ({"HF_HOME": "/hf", "HF_HUB_CACHE": ""}, "/hf/hub"),
    ],
)
def test_where_the_hubs_client_keeps_what_it_downloaded(env: dict[str, str], hub: str) -> None:
    assert identity.hub_cache(env) == hub


class Hub:
    """A cache of the hub with one model in it."""

    def __init__(self, root: pathlib.Path) -> None:
        self.env = {"HF_HOME": str(root)}
        self.folder = root / "hub" / "models--org--name"
        self.snapshot = self.folder / "snapshots" / COMMIT
        self.snapshot.mkdir(parents=True)
        (self.folder / "refs").mkdir()
        (self.folder / "blobs").mkdir()
        (self.folder / "refs" / "main").write_text(f"{COMMIT}\n")
        for name in ("config.json", "model.safetensors"):
            (self.snapshot / name).write_text("{}")

    def index(self, text: str) -> None:
        (self.snapshot / "model.safetensors.index.json").write_text(text)


@pytest.fixture
def hub(tmp_path: pathlib.Path) -> Hub:
    return Hub(tmp_path)


UNREADABLE = "its model.safetensors.index.json cannot be read"
MAP = json.dumps({"weight_map": {"a": "model.safetensors", "b": "config.json"}})
LACKS = json.dumps({"weight_map": {"a": "z", "b": "model.safetensors", "c": "b.safetensors"}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda hub: None, None),
        (lambda hub: (hub.folder / "refs" / "main").unlink(), "it is not there"),
        (lambda hub: (hub.folder / "refs" / "main").write_text("main"), "it is not there"),
        (lambda hub: (hub.folder / "blobs" / "1.incomplete").touch(),
         "its download is under way, or was broken off"),
        (lambda hub: (hub.folder / "blobs" / "incomplete").touch(), None),
        (lambda hub: (hub.folder / "blobs").rmdir(), "No such file or directory"),
        (lambda hub: (hub.snapshot / "config.json").unlink(), "it has no config.json"),
        (lambda hub: (hub.snapshot / "model.safetensors").unlink(), "it has no *.safetensors"),
        (lambda hub: hub.index(MAP), None),
        (lambda hub: hub.index(LACKS), "it lacks b.safetensors"),
        (lambda hub: hub.index("{"), UNREADABLE),
        (lambda hub: hub.index("[]"), UNREADABLE),
        (lambda hub: hub.index("{}"), UNREADABLE),
        (lambda hub: hub.index('{"weight_map": []}'), UNREADABLE),
        (lambda hub: hub.index('{"weight_map": {"a": []}}'), UNREADABLE),
        (lambda hub: (hub.snapshot / "model.safetensors.index.json").mkdir(), UNREADABLE),
    ],
)  # fmt: skip
def test_what_the_cache_lacks_of_a_model_is_said(
    hub: Hub, change: Callable[[Hub], object], said: str | None
) -> None:
    change(hub)
    found = identity.missing_of_model("org/name", hub.env)
    assert found == said or (said is not None and found is not None and found.endswith(said))
    assert identity.model_files_are_here("org/name", hub.env) is (said is None)


def test_a_directory_of_the_hosts_is_the_model(hub: Hub, tmp_path: pathlib.Path) -> None:
    assert identity.model_directory("org/name", hub.env) == str(hub.snapshot)
    assert identity.model_directory(str(tmp_path), hub.env) == str(tmp_path)
    assert identity.model_directory("org/other", hub.env) is None
    assert identity.model_files_are_here(str(tmp_path), hub.env)
    assert not identity.model_files_are_here(str(tmp_path / "gone"), hub.env)


def test_weights_are_known_by_revision_and_files(hub: Hub, tmp_path: pathlib.Path) -> None:
    def look(path: str, **options: object) -> dict[str, str]:
        return identity.model_identity(path, hub.env, **options)  # type: ignore[arg-type]

    found = look("org/name")
    assert found == {
        "model_path": "org/name",
        "revision": COMMIT,
        "file.config.json": identity.stamp(str(hub.snapshot / "config.json")),
        "file.model.safetensors": identity.stamp(str(hub.snapshot / "model.safetensors")),
    }
    assert look("org/name", revision="v2")["revision"] == "v2"
    own = tmp_path / "own"
    own.mkdir()
    assert look(str(own)) == {"model_path": str(own)}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "a.bin",
                 "model.safetensors.index.json", "x.safetensors"):  # fmt: skip
        (own / name).write_text(name)
    assert set(look(str(own))) == {
        "model_path", "file.tokenizer.json", "file.tokenizer_config.json",
        "file.generation_config.json", "file.model.safetensors.index.json", "file.x.safetensors",
    }  # fmt: skip
    assert look(str(own), shown=Shown(stamp=lambda path: None)) == {"model_path": str(own)}
    link = tmp_path / "link"
    link.symlink_to(hub.snapshot)  # of a directory that is a snapshot the commit shows
    assert look(str(link))["revision"] == COMMIT
    assert look("gone") == {"model_path": "gone"}
    hub.snapshot.rename(tmp_path / "moved")  # the cache names one that it has not
    assert look("org/name") == {"model_path": "org/name", "revision": COMMIT}


# ---- files, secrets, launch ----------------------------------------------------------------------


def test_a_file_is_known_by_its_size_and_time_here_and_by_its_content_elsewhere(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"content")
    os.utime(path, ns=(5, 7_000_000_123))
    assert identity.stamp(str(path)) == "7 bytes, 7000000123"
    assert identity.content_stamp(str(path)) == (
        f"7 bytes, sha256 {hashlib.sha256(b'content').hexdigest()[:32]}"
    )
    for look in (identity.stamp, identity.content_stamp):
        assert look(str(tmp_path / "gone")) is None
    assert identity.content_stamp(str(tmp_path)) is None
    # of a large one the ends alone
    monkeypatch.setattr(identity, "_READ_WHOLE", 9)
    monkeypatch.setattr(identity, "_END", 3)
    path.write_bytes(b"0123456789")
    ends = hashlib.sha256(b"012789").hexdigest()[:32]
    assert identity.content_stamp(str(path)) == f"10 bytes, sha256 {ends}"
    path.write_bytes(b"012345678")
    whole = hashlib.sha256(b"012345678").hexdigest()[:32]
    assert identity.content_stamp(str(path)) == f"9 bytes, sha256 {whole}"
    large = os.urandom((1 << 20) + 5)  # more than one read
    monkeypatch.undo()
    path.write_bytes(large)
    assert str(identity.content_stamp(str(path))).endswith(hashlib.sha256(large).hexdigest()[:32])


def test_a_secret_is_shown_by_a_hash_that_its_key_makes() -> None:
    assert identity.hide("a", b"1") == identity.hide("a", b"1")
    assert len({identity.hide("a", b"1"), identity.hide("b", b"1"), identity.hide("a", b"2"),
                identity.hide("a")}) == 4  # fmt: skip
    assert identity.hide("a").startswith("hash:")
    assert len(identity.hide("a")) == len("hash:") + 16
    assert identity.hide("\udcff", b"1") != identity.hide("?", b"1")
    portable = Shown.portable(b"salt")
    assert portable.hide("a") == identity.hide("a", b"salt")
    assert portable.stamp is identity.content_stamp
    assert HERE.hide("a") == identity.hide("a")
    assert HERE.stamp is identity.stamp


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--api-key", "x", "y"], "--api-key <x> y"),
        (["--api-key=x", "y"], "--api-key=<x> y"),
        (["--api-key", "--port", "x"], "--api-key --port x"),
        (["--apikey", "x", "--api-key-file", "z"], "--apikey <x> --api-key-file <z>"),
        (["--api-key="], "--api-key=<>"),
        (["--token", "x", "--hf-token=y"], "--token <x> --hf-token=<y>"),
        (["--Password", "x"], "--Password <x>"),
        (["--secret-name", "x", "secret"], "--secret-name <x> secret"),
        (["--tokens", "x", "token", "y"], "--tokens x token y"),
        ([], ""),
    ],
)
def test_secrets_of_a_command_line_are_hidden(argv: list[str], shown: str) -> None:
    assert identity.hidden_argv(argv, Shown(hide=lambda value: f"<{value}>")) == shown


def test_the_launch_is_compared_variable_by_variable() -> None:
    env = {"VLLM_API_KEY": "k", "HF_HUB_OFFLINE": "1"}
    shown = Shown(hide=lambda value: f"<{value}>")
    found = identity.launch_identity(["vllm", "--api-key", "x"], env, "u", shown)
    assert "vllm --api-key <x>" in found.values()
    assert found["user"] == "u"
    assert found["env.VLLM_API_KEY"] == "<k>"
    assert found["env.HF_HUB_OFFLINE"] == "1"
    assert identity.launch_identity([], {}, None)["user"] == "root"


def test_the_host_is_known_by_kernel_driver_and_boot(tmp_path: pathlib.Path) -> None:
    for name, text in (("boot", "b1\n"), ("driver", "NVRM  version: 1\t2\nGCC\n")):
        (tmp_path / name).write_text(text)
    found = identity.host_identity(str(tmp_path / "boot"), str(tmp_path / "driver"))
    assert found["boot_id"] == "b1"
    assert found["nvidia_driver"] == "NVRM version: 1 2"
    assert found["kernel"] == os.uname().release
    assert found["architecture"] == os.uname().machine
    models = [
        line.partition(":")[2].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    assert found.get("processor") == (models[0] if models else None)
    (tmp_path / "cpus").write_text("processor: 0\nmodel name\t: One\nmodel name\t: Two\n")
    paths = [str(tmp_path / name) for name in ("boot", "driver", "cpus")]
    assert identity.host_identity(*paths) == {**found, "processor": "One"}
    without = identity.host_identity(*(f"{path}.none" for path in paths))
    assert without.keys() == {"kernel", "architecture"}


@pytest.mark.parametrize(
    ("old", "new", "ignore", "said"),
    [
        ({"a": "1"}, {"a": "1"}, (), None),
        ({"a": "1"}, {"a": "2"}, (), 'a was "1" when the image was made and is "2" now'),
        ({"a": "1"}, {"a": "2"}, ("a",), None),
        ({"a": "1"}, {}, (), 'a was "1" when the image was made and is not known now'),
        ({}, {"b": "1", "a": "2"}, (), 'a was not known when the image was made and is "2" now'),
        ({"a": "x" * 200}, {"a": "x" * 201}, (),
         f'a was "{"x" * 200}" when the image was made and is "{"x" * 200}…" now'),
    ],
)  # fmt: skip
def test_the_first_field_that_differs_is_named(
    old: dict[str, str], new: dict[str, str], ignore: tuple[str, ...], said: str | None
) -> None:
    assert first_mismatch(old, new, frozenset(ignore)) == said


def test_a_kept_path_is_as_it_is_now(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d"
    path.mkdir()
    path.chmod(0o2751)
    assert KeptPath.look(str(path)) == KeptPath(str(path), os.geteuid(), path.stat().st_gid, 0o2751)
    assert KeptPath.look(str(tmp_path / "gone")) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "\xff", "{}" + " " * notes.MAX_BYTES])
def test_a_damaged_note_is_none(tmp_path: pathlib.Path, text: str) -> None:
    path = str(tmp_path / "note")
    notes.write_note(path, {"unit": "u", "n": 1})
    assert notes.read_note(path) == {"unit": "u", "n": 1}
    pathlib.Path(path).write_text(text, encoding="latin-1")
    assert notes.read_note(path) == {}
    os.unlink(path)
    assert notes.read_note(path) == {}


def test_a_machine_without_an_id_hides_them_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise FileNotFoundError

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", absent)
        hidden = identity.hide("a")
    assert hidden == identity.hide("a", b"llmux")
