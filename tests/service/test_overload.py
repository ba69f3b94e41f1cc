"""More than can be served: who is accepted is served, who leaves is no reason for a switch."""

from __future__ import annotations

import http.client
import json
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from daemon_harness import Answer, Daemon, Start, UnixConnection, chat_body

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

PLACES, WAITING = 4, 16
LEAVERS = 1000


def switches(daemon: Daemon) -> int:
    """All that were ever made."""
    text = daemon.request("GET", "/metrics").body.decode()
    lines = [line for line in text.splitlines() if line.startswith("llmux_switches_total{")]
    return int(sum(float(line.rpartition(" ")[2]) for line in lines))


def test_a_thousand_clients_that_leave_cause_no_switch(start_daemon: Start) -> None:
    daemon = start_daemon({"alpha": {}, "beta": {}}, top={"gateway": {"max_waiting": LEAVERS}})
    daemon.load("beta")
    daemon.load("alpha")
    daemon.order("alpha", tokens_per_sec=20)
    before = switches(daemon)
    body = json.dumps(chat_body("beta", "never mind")).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with daemon.stream("alpha", max_tokens=1000, min_tokens=1000) as stream:
        stream.wait_for_token()
        crowd = []
        for _ in range(LEAVERS):
            connection = UnixConnection(daemon.http)
            connection.connect()
            connection.sock.sendall(head.encode() + body)
            crowd.append(connection)
        daemon.until(lambda: daemon.model("beta")["queue_depth"] == LEAVERS)
        assert daemon.model("alpha")["state"] == "draining"
        for connection in crowd:
            leave(connection)
        daemon.until(lambda: daemon.model("beta")["queue_depth"] == 0)
        daemon.until(lambda: daemon.model("alpha")["state"] == "serving")
        daemon.order("alpha", tokens_per_sec=0)
        stream.rest()
    assert stream.done
    assert daemon.chat("alpha").status == 200
    assert switches(daemon) == before
    assert daemon.model("beta")["state"] == "parked"


def leave(connection: http.client.HTTPConnection) -> None:
    """As a client that is killed does it: without a word."""
    assert isinstance(connection.sock, socket.socket)
    connection.sock.close()


def test_five_times_the_capacity_all_accepted_finish_and_all_others_are_told_when_to_return(
    start_daemon: Start,
) -> None:
    limits = {"max_in_flight": PLACES, "max_waiting": WAITING}
    daemon = start_daemon({"alpha": {}}, top={"gateway": limits})
    daemon.load("alpha")
    count = 5 * (PLACES + WAITING)
    daemon.order("alpha", hang=True)
    with ThreadPoolExecutor(count) as threads:
        futures = [threads.submit(daemon.chat, "alpha", f"{at}") for at in range(count)]
        told = Counter[int]()

        def turned_away() -> bool:
            done = [future for future in futures if future.done()]
            return len(done) == count - PLACES - WAITING

        daemon.until(turned_away)
        daemon.order("alpha", hang=False)
        answers: list[Answer] = [future.result() for future in futures]
    for answer in answers:
        told[answer.status] += 1
        if answer.status == 200:
            assert answer.text.startswith("alpha:")
        else:
            assert answer.code == "model_overloaded"
            assert int(answer.headers["retry-after"]) >= 1
    assert told == {200: PLACES + WAITING, 429: count - PLACES - WAITING}
    daemon.until(lambda: daemon.model("alpha")["in_flight"] == 0)
