"""Images as streams: what arrives is the image, this host's own, and goes on where it broke off."""

from __future__ import annotations

import io
import json
import os
import pathlib
from typing import Any

import pytest
from transfer_site import Site, quiet

from llmux.cli.images import transfer
from llmux.cli.main import main
from llmux.daemon import images
from llmux.daemon.images import ExportedImage, import_image
from llmux.drivers.images.files import SEGMENT
from llmux.drivers.images.manifest import NAME, load_manifest
from llmux.drivers.transfer.header import BadStream, Header
from llmux.drivers.transfer.stream import Import, receive_header, segments
from llmux.errors import LlmuxError, Refused
from tests.json_shape import faults, schema

OUTPUTS = schema("outputs.schema.json")["$defs"]

# ---- there and back ------------------------------------------------------------------------------


def test_an_image_arrives_as_it_was_and_is_this_hosts_own(sites: tuple[Site, Site]) -> None:
    there, here = sites
    stream = there.export()
    assert len(stream) < SEGMENT * 2 + 100_000, "holes are not sent"
    result = here.take(stream)
    assert here.asked == ["image_here", "image_adopt"]
    assert here.left() == ["images"]
    assert result["warnings"] == []
    old = load_manifest(there.store.directory("m") + "/images")
    new = load_manifest(result["path"])
    assert new.files == old.files
    assert new.identity == here.identity
    assert new.recipe["identity"] == here.identity
    for file in old.files:
        name = f"{there.store.directory('m')}/images/{file.name}"
        assert (
            pathlib.Path(result["path"], file.name).read_bytes() == pathlib.Path(name).read_bytes()
        )
    pages = os.stat(f"{result['path']}/pages-1.img")
    assert pages.st_blocks * 512 < SEGMENT, "zeros are holes here, too"


def test_a_stream_that_broke_goes_on_where_it_did(sites: tuple[Site, Site]) -> None:
    there, here = sites
    stream = there.export()
    with pytest.raises(BadStream, match=r"ended too early .*what has arrived is kept"):
        here.take(stream[: len(stream) // 2])
    home = here.store.directory("m")
    known = Import(home).received()
    assert known is not None
    assert known[1] > 0
    rest = io.BytesIO()
    ExportedImage("m", there.ask, quiet).to_stream(rest, f"{known[0]}:{known[1]}")
    assert len(rest.getvalue()) < len(stream)
    assert here.take(rest.getvalue())["path"]
    assert here.left() == ["images"]


def test_a_resumed_stream_needs_what_came_before(sites: tuple[Site, Site]) -> None:
    there, here = sites
    image = receive_header(io.BytesIO(there.export())).id
    rest = io.BytesIO()
    ExportedImage("m", there.ask, quiet).to_stream(rest, f"{image}:2")
    with pytest.raises(BadStream, match="begins with segment 2, and 0 have arrived"):
        here.take(rest.getvalue())
    whole = io.BytesIO()
    ExportedImage("m", there.ask, quiet).to_stream(whole, "0" * 32 + ":2")  # another image's
    assert here.take(whole.getvalue())["path"]


@pytest.mark.parametrize("cut", [100, 3000, 9000, SEGMENT + 9000])
def test_a_file_that_was_cut_is_completed(
    sites: tuple[Site, Site], home: pathlib.Path, cut: int
) -> None:
    there, here = sites
    image = ExportedImage("m", there.ask, quiet)
    path = pathlib.Path(image.to_directory(str(home)))
    assert path == home / "m.tar"
    path.rename(home / "m.tar.part")
    os.truncate(home / "m.tar.part", cut)
    assert image.to_directory(str(home)) == str(path)
    result = import_image(here.config, str(path), here.ask, quiet)
    assert load_manifest(result["path"]).model == "m"
    path.chmod(0o666)
    with pytest.raises(LlmuxError, match="can be written by others"):
        import_image(here.config, str(path), here.ask, quiet)


def test_every_segment_has_a_name_that_a_tar_header_holds(sites: tuple[Site, Site]) -> None:
    there, _ = sites
    header: Header = receive_header(io.BytesIO(there.export()))
    names = [segment.name for segment in segments(header.manifest)]
    assert len(names) == len(set(names))
    assert max(map(len, names)) <= 100


# ---- what the verbs print ------------------------------------------------------------------------


def test_what_the_verbs_print_is_as_described(
    sites: tuple[Site, Site],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there, here = sites

    def printed(site: Site, *words: str) -> Any:
        monkeypatch.setattr(transfer, "order", lambda _, verb, values: site.ask(verb, values))
        assert main(["images", *words, "--json", "-c", site.config]) == 0
        return json.loads(capsys.readouterr().out)

    exported = printed(there, "export", "m", "--to", str(tmp_path))
    assert faults(OUTPUTS["images_export"], exported) == []
    assert faults(OUTPUTS["images_received"], printed(here, "received", "m")) == []
    imported = printed(here, "import", exported["to"])
    assert faults(OUTPUTS["images_import"], imported) == []
    assert imported["path"] == f"{here.store.directory('m')}/images"


# ---- to another host at once ---------------------------------------------------------------------


SSH = """#!/bin/sh
case "$*" in
  *"images received m") cat {received} ;;
  *"images import") cat > {stream} ;;
  *) exit 9 ;;
esac
"""


@pytest.mark.parametrize("arrived", ["nothing", "a part", "of another image"])
def test_the_other_host_gets_what_it_lacks(
    sites: tuple[Site, Site], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, arrived: str
) -> None:
    there, here = sites
    received, stream = tmp_path / "received", tmp_path / "stream"
    program = tmp_path / "ssh"
    program.write_text(SSH.format(received=received, stream=stream))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    whole, told = there.export(), "-"
    if arrived == "a part":
        with pytest.raises(BadStream):
            here.take(whole[: len(whole) // 2])
        known = Import(here.store.directory("m")).received()
        assert known is not None
        told = f"{known[0]}:{known[1]}"
        assert images.received(here.config, "m") == told
    elif arrived == "of another image":
        told = "0123:1"
    received.write_text(told)
    ExportedImage("m", there.ask, quiet).to_host("other")
    sent = stream.read_bytes()
    assert (len(sent) < len(whole)) is (arrived == "a part")
    assert here.take(sent)["path"]
    assert images.received(here.config, "m") == "-"


def test_an_image_that_is_damaged_or_gone_is_not_exported(sites: tuple[Site, Site]) -> None:
    there, _ = sites
    home = pathlib.Path(there.store.directory("m"), "images")
    answer = there.ask("image_here", {"model": "m", "salt": "0" * 64})
    assert answer["image"] == str(home)

    def ask(*_: Any) -> Any:
        return answer

    (home / NAME).write_text("{")
    with pytest.raises(LlmuxError, match=f"cannot export {home}: "):
        ExportedImage("m", ask, quiet)
    (home / NAME).unlink()
    with pytest.raises(LlmuxError, match=f"cannot export {home}: "):
        ExportedImage("m", ask, quiet)


def test_one_import_of_a_model_runs_at_a_time(sites: tuple[Site, Site]) -> None:
    there, here = sites
    stream = there.export()

    def ask(verb: str, values: dict[str, Any]) -> Any:
        if verb == "image_adopt":
            with pytest.raises(Refused, match="cannot import the image of m: another import runs"):
                import_image(here.config, io.BytesIO(stream), here.ask, quiet)
            raise OSError(5, "Input/output error")  # of ours: no other import is named
        return here.ask(verb, values)

    with pytest.raises(OSError, match="Input/output"):
        import_image(here.config, io.BytesIO(stream), ask, quiet)
    assert here.take(stream)["path"]


def test_an_import_keeps_to_the_budget_of_this_host(sites: tuple[Site, Site]) -> None:
    there, here = sites
    there.publish(disk_bytes=2 << 20)
    document = {
        "vllm_command": ["/no/such/program"],  # of no concern here
        "models": {}, "checkpoint": {"images_dir": here.store.root, "max_bytes": 1 << 20},
    }  # fmt: skip
    pathlib.Path(here.config).write_text(json.dumps(document))
    with pytest.raises(LlmuxError, match="max_bytes"):
        here.take(there.export())
    assert here.asked == ["image_here"]
    assert images.received(here.config, "m") == "-"
