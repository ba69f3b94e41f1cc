"""``llmux images``: the state of an image in a few words, and what is removed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmux.cli.images import keeping as image_keeping
from llmux.cli.images.keeping import in_words
from llmux.cli.main import main

ROW: dict[str, Any] = {
    "model": "a",
    "path": "/images/a/images",
    "eviction": "discard+checkpoint",
    "apparent_bytes": 3 * 2**30,
    "disk_bytes": 2**30,
    "age_secs": 3 * 86400,
    "dump_secs": 1.25,
    "managed": True,
    "state": 'the image in /images/a/images does not fit: boot_id was "ee" when the image was made'
    ' and is "ff" now',
}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("valid", "valid"),
        (ROW["state"], "stale: the host was rebooted"),
        ('the image in /x does not fit: env.PATH was "a" …', "stale: another environment"),
        ('the image in /x does not fit: file.config.json was "a"', "stale: the model has changed"),
        ('the image in /x does not fit: lib.torch was "1"', "stale: lib.torch changed"),
        ("the image in /x cannot be used: its checksums differ", "damaged"),
        ("/x failed before: criu died", "damaged"),
        (
            "the image in /x cannot be used: /x/m does not exist: the image was never completed",
            "missing or incomplete",
        ),
        ("the model is not configured", "the model is not configured"),
        ("x" * 50, "x" * 39 + "…"),
    ],
)
def test_a_state_in_words(state: str, words: str) -> None:
    assert in_words(state) == words


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def answer(_path: str, verb: str, *args: Any) -> Any:
        asked.append((verb, *args))
        return {
            "images": {"images": [ROW]},
            "image_remove": {"message": "The image of a is removed", "freed_bytes": 7},
            "image_prune": {"message": "removed 1 image", "removed": [ROW], "freed_bytes": 2**30},
        }[verb]

    monkeypatch.setattr(image_keeping, "ask", answer)
    return asked


def test_images_are_listed_in_one_line_each(
    asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["images", "ls"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["MODEL", "EVICTION"]
    assert "1.00 GiB" in row
    assert "3d" in row
    assert "stale: the host was rebooted" in row
    assert main(["images", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [ROW]


def test_images_are_removed_by_name_and_pruned(
    asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["images", "rm", "a", "b"]) == 0
    assert asked == [("image_remove", {"model": "a"}), ("image_remove", {"model": "b"})]
    assert capsys.readouterr().out.splitlines() == ["The image of a is removed"] * 2
    assert main(["images", "prune"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: stale: the host was rebooted, 1.00 GiB freed",
        "removed 1 image",
    ]
