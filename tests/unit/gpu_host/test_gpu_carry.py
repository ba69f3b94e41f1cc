"""What gpu-proof --vllm-carry takes along: kernels of one architecture, packages that fit."""

from __future__ import annotations

import struct
import sys
import zipfile
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[3] / "scripts")]

# ruff: noqa: E402  # the folder has to be on the path first
from _gpu_proof.carried import fatbins
from _gpu_proof.carried import vllm as vllm_carry

PTX, CUBIN = 1, fatbins.CUBIN


def entry(kind: int, arch: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQIIHHI32x", kind, 0x101, 64, len(payload), 0, 0, 0, 0, arch)
    return header + payload


def fat_binary(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", fatbins.MAGIC, 1, 16, len(body)) + body


def library(section: bytes) -> bytearray:
    """An ELF64 file with that section and the one of names."""
    names = b"\0.shstrtab\0.nv_fatbin\0"
    at = 64
    headers = at + len(section) + len(names)
    elf = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf += struct.pack("<2HI3QI6H", 3, 62, 1, 0, 0, headers, 0, 64, 0, 0, 64, 3, 1)
    table = bytes(64)
    table += struct.pack("<2I4Q2I2Q", 1, 3, 0, 0, at + len(section), len(names), 0, 0, 1, 0)
    table += struct.pack("<2I4Q2I2Q", 11, 1, 0, 0, at, len(section), 0, 0, 8, 0)
    return bytearray(elf + section + names + table)


def test_other_architectures_are_zeroed_in_their_place() -> None:
    section = fat_binary(entry(CUBIN, 80, b"a" * 8), entry(CUBIN, 90, b"b" * 16))
    section += bytes(8) + fat_binary(entry(PTX, 90, b"c" * 8))
    found = library(section)
    before = bytes(found)
    assert fatbins.architectures(before) == {(CUBIN, 80): 8, (CUBIN, 90): 16, (PTX, 90): 8}
    assert fatbins.keep_only(found, 90) == (16, 16)
    assert bytes(found) == before.replace(b"a" * 8, bytes(8)).replace(b"c" * 8, bytes(8))


@pytest.mark.parametrize(
    "content",
    [
        bytearray(b"#!/bin/sh" + bytes(64)),
        library(b"no fat binary..."),
        library(struct.pack("<IHHQ", fatbins.MAGIC, 1, 16, 1 << 20)),
        library(fat_binary(struct.pack("<HHIQIIHHI32x", CUBIN, 1, 64, 1 << 20, 0, 0, 0, 0, 90))),
    ],
)
def test_what_is_not_understood_is_refused(content: bytearray) -> None:
    with pytest.raises(fatbins.BadLibraryError):
        fatbins.keep_only(content, 90)


def wheel(directory: Path, name: str, *wants: str, end: str = "\n") -> Path:
    path = directory / f"{name}-1.0-py3-none-any.whl"
    lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {each}" for each in wants)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", end.join([*lines, "", "a text"]))
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}/tests/test_it.py", "")
    return path


def test_packages_are_pinned_and_none_is_the_hosts() -> None:
    lines = vllm_carry.PACKAGES.read_text().split()
    names = [line.partition("==")[0] for line in lines]
    assert all(line.partition("==")[2] for line in lines)
    assert len(names) == len(set(names))
    assert not {"torch", "transformers", "numpy", "triton", "vllm"} & set(names)


def test_what_nobody_brings_is_found_before_the_host_misses_it(tmp_path: Path) -> None:
    """Seen on a GPU host: openai's newest asked for httpx2, which nothing brought."""
    wheels = [
        wheel(tmp_path, "openai", "httpx2>=2", "Sniffio", "numpy>9", 'mcp; extra == "tools"'),
        wheel(tmp_path, "sniffio", 'old; python_version < "3.8"', "openai>=2", end="\r\n"),
    ]
    assert vllm_carry.missing(wheels) == [
        "openai wants httpx2>=2, and there is none",
        "sniffio wants openai>=2, and there is 1.0",
    ]
    assert vllm_carry.missing([]) == []


def test_tests_and_lists_of_files_stay_behind(tmp_path: Path) -> None:
    vllm_carry.unpack([wheel(tmp_path, "pydantic")], tmp_path / "site")
    site = tmp_path / "site"
    found = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert found == {"pydantic-1.0.dist-info/METADATA", "pydantic/__init__.py"}
    assert vllm_carry.is_left_out("vllm/_moe_C.abi3.so")
    assert not vllm_carry.is_left_out("vllm/cumem_allocator.abi3.so")
