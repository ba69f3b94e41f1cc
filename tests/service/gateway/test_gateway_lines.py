"""Entries about requests as journald gets them: real datagrams of the real handler."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_harness import EngineRequest, a_config, in_loop, stage, until

from llmux.drivers.systemd.journal import Journal, JournalHandler
from llmux.protocol import Cut, Refuse

Entry = dict[str, str]
PROMPT = "a-prompt-that-nobody-may-read"


class Journald:
    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def entries(self) -> list[Entry]:
        """Those about requests since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                entry = self._socket.recv(65536).decode()
                assert PROMPT not in entry
                lines = (line.partition("=") for line in entry.splitlines())
                found.append({key: value for key, _, value in lines})
        return [entry for entry in found if "LLMUX_REQUEST" in entry]


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    path = str(tmp_path / "journal.sock")
    logger = logging.getLogger("llmux")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.setblocking(False)
        handler = JournalHandler(Journal(path))
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield Journald(sock)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)
            handler.close()


def short(entry: Entry) -> tuple[str | None, ...]:
    return tuple(entry.get(key) for key in ("LLMUX_REQUEST", "LLMUX_MODEL", "LLMUX_REASON"))


async def cut_short(request: EngineRequest) -> None:
    request.start_stream()
    request.event("one")
    await request.writer.drain()
    request.die()


async def held(request: EngineRequest) -> None:
    request.start_stream()
    request.event("one")
    await request.reader.read(1)


def test_every_failure_of_a_request_is_a_line_with_its_id(journald: Journald) -> None:
    @in_loop
    async def run() -> None:
        async with stage(a_config(wait_secs=0.1)) as s:
            client = await s.client()

            async def asked(number: int, **more: object) -> None:
                payload = {"model": "alpha", "prompt": PROMPT} | more
                client.send(payload=payload, headers=(f"X-Request-Id: id-{number}",))

            await asked(1)
            assert (await client.answer()).status == 504
            await asked(2)
            await until(lambda: s.waiting() == 1)
            s.supervisor.say(Refuse("alpha", "model_start_failed", "it failed\nlast line"))
            assert (await client.answer()).status == 503
            first, second = journald.entries()
            assert short(first) == ("id-1", "alpha", "wait_expired")
            assert short(second) == ("id-2", "alpha", "model_start_failed")
            assert {first["PRIORITY"], second["PRIORITY"]} == {"4"}
            assert second["MESSAGE"].endswith(": it failed")
            engine = await s.engine(cut_short)
            s.supervisor.grant(engine)
            await until(lambda: s.gateway.admission.held("alpha") is not None)
            await asked(3, stream=True)
            assert b"engine_died" in (await client.answer()).body
            assert [short(entry) for entry in journald.entries()] == [
                ("id-3", "alpha", "engine_died")
            ]

    run()


def test_a_cut_names_every_stream_that_it_ended(journald: Journald) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            engine = await s.engine(held)
            s.supervisor.grant(engine)
            client = await s.client()
            client.send(payload={"model": "alpha", "stream": True}, headers=("X-Request-Id: mine",))
            await client.head()
            s.supervisor.revoke("e1")
            s.supervisor.say(Cut("alpha", "e1", "cut_by_switch", "the drain deadline passed"))
            await client.ended()
            (entry,) = journald.entries()
            assert short(entry) == ("mine", "alpha", "cut_by_switch")
            assert entry["MESSAGE"] == (
                "answer broken off, cut_by_switch: the drain deadline passed"
            )

    run()


def test_an_engine_that_dies_before_the_first_byte_is_a_line_and_then_another(
    journald: Journald,
) -> None:
    @in_loop
    async def run() -> None:
        async def die(request: EngineRequest) -> None:
            request.die()

        async with stage() as s:
            engine = await s.engine(die)
            s.supervisor.grant(engine)
            client = await s.client()
            client.send(payload={"model": "alpha"}, headers=("X-Request-Id: twice",))
            await until(lambda: s.waiting() == 1)
            s.supervisor.grant(engine, epoch="e2")
            assert (await client.answer()).status == 502
            again, refused = journald.entries()
            assert short(again) == short(refused) == ("twice", "alpha", "engine_died")
            assert (again["PRIORITY"], refused["PRIORITY"]) == ("6", "4")

    run()


def test_clients_mistakes_are_no_lines_unless_asked_for(journald: Journald) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            for verbose in (False, True):
                logging.getLogger("llmux").setLevel(logging.DEBUG if verbose else logging.INFO)
                for path, body in (
                    ("/v1/chat/completions", f'{{"model": "{PROMPT}"}}'),
                    ("/v1/chat/completions", PROMPT),
                    (f"/{PROMPT}", ""),
                ):
                    client = await s.client()
                    client.send(path, body=body.encode(), headers=("X-Request-Id: odd",))
                    assert (await client.answer()).status in (400, 404)
                assert len(journald.entries()) == (2 if verbose else 0)

    run()


def test_a_question_the_supervisor_refuses_is_a_line(journald: Journald) -> None:
    @in_loop
    async def run() -> None:
        async with stage() as s:
            s.supervisor.answer = lambda _ask: {
                "ok": False, "code": "internal_error", "message": "odd",
            }  # fmt: skip
            client = await s.client()
            client.send("/running", method="GET")
            answer = await client.answer()
            assert answer.status == 500
            (entry,) = journald.entries()
            assert short(entry) == (answer.headers["x-request-id"], None, "internal_error")

    run()
