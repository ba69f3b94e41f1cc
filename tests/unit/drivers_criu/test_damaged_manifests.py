"""Manifests that were damaged, or that another program wrote: refused at the border, by place."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.drivers.images.files import SEGMENT, FileSums
from llmux.drivers.images.manifest import (
    LARGEST_ID,
    LARGEST_PID,
    KeptPath,
    KnownFile,
    Manifest,
    ManifestError,
    ShmGroup,
    TreeProcess,
    first_mismatch,
)
from llmux.typed_json import LARGEST_INT

GOOD = Manifest(
    model="m",
    created=1.0,
    dump_seconds=2.0,
    cold_seconds=3.0,
    criu="4.1",
    identity={"boot_id": "b"},
    recipe={"eviction": "offload+checkpoint"},
    root_pid=7,
    processes=(TreeProcess(7, "vllm", (7, 8)),),
    runtime_dir=KeptPath("/run/llmux/engines/m", 0, 0, 0o750),
    append_files=(KeptPath("/images/m/stdout.log", 0, 0, 0o640),),
    unix_paths=("/run/llmux/engines/m/api.sock",),
    tcp_ports=(8000,),
    shm=(ShmGroup(("sem.x",), "shm/0", 32, 0o600, 0, 0),),
    known=(KnownFile("/usr/bin/python3", 1, 2, 0, 0o100755),),
    files=(FileSums("pages-1.img", SEGMENT + 1, (1, 2)),),
    apparent_bytes=SEGMENT + 1,
    disk_bytes=4096,
)
BODY = json.loads(GOOD.to_json())
ODD = [None, [], [None], {}, {"a": 1}, "", "x", "../x", -1, 0, 7, 1.5, 10**29, True, 2**32 - 1]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, one in items:
        yield from places(one, (*path, key))


def replaced(path: tuple[Any, ...], value: Any) -> str:
    body = copy.deepcopy(BODY)
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(body)


def test_what_was_written_is_read() -> None:
    assert Manifest.from_json(GOOD.to_json()) == GOOD


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(places(BODY))), st.sampled_from(ODD))
def test_a_damaged_field_is_an_error_or_a_value_that_can_be(
    path: tuple[Any, ...], value: Any
) -> None:
    try:
        manifest = Manifest.from_json(replaced(path, value))
    except ManifestError:
        return
    first_mismatch(manifest.identity, {"boot_id": "c"}, frozenset())
    assert all(isinstance(text, str) for text in manifest.identity.values())
    assert all(len(file.sums) == -(-file.size // SEGMENT) for file in manifest.files)
    assert json.loads(manifest.to_json())


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("identity", "boot_id"), 1.5, "identity.boot_id: expected a string"),
        (("identity",), [None], "identity: expected an object"),
        (("files", 0, "sums"), [1], "1 checksums for"),
        (("shm", 0, "gid"), 10**18, "gid: 1000000000000000000 is out of range"),
        (("shm", 0, "gid"), 2**32 - 1, "gid: 4294967295 is out of range"),
        (("append_files", 0, "gid"), 10**29, "append_files[0].gid: the number is out of range"),
        (("files", 0, "name"), "../../etc/shadow", "outside of the image"),
        (("root_pid",), 0, "root_pid: 0 is out of range"),
    ],
)
def test_the_error_names_the_place(path: tuple[Any, ...], value: Any, words: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_json(replaced(path, value))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("path", "least", "most"),
    [
        (("root_pid",), 1, LARGEST_PID),
        (("processes", 0, "pid"), 1, LARGEST_PID),
        (("processes", 0, "tids", 1), 1, LARGEST_PID),
        (("runtime_dir", "uid"), 0, LARGEST_ID),
        (("append_files", 0, "gid"), 0, LARGEST_ID),
        (("shm", 0, "uid"), 0, LARGEST_ID),
        (("known", 0, "uid"), 0, LARGEST_ID),
        (("known", 0, "mode"), 0, 0o177777),
        (("tcp_ports", 0), 1, 65535),
        (("shm", 0, "size"), 0, LARGEST_INT),
        (("disk_bytes",), 0, LARGEST_INT),
    ],
)
def test_a_number_may_be_all_that_it_can_be_and_nothing_beyond(
    path: tuple[Any, ...], least: int, most: int
) -> None:
    for value in (least, most):
        assert Manifest.from_json(replaced(path, value))
    for value in (least - 1, most + 1):
        with pytest.raises(ManifestError, match="out of range"):
            Manifest.from_json(replaced(path, value))
