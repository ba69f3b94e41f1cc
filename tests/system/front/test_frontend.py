"""Debian's HAProxy as the role llmux_frontend has it, in front of three llmux with stand-ins."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from front_rig import SECONDS, Host, Proxy, certificates, get, hosts, patience, proxy, until
from front_trace import CLIENTS, LARGEST, REQUESTS, Asked, Outcome, best_possible, send, trace

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

MODELS = [f"m{number}" for number in range(10)]
PLACES = 2  # on each host
MODEL = {"extra_args": ["--gpu-memory-utilization", "0.4", "--standin-tokens-per-sec", "100"]}
POLICY = {"min_active_secs": 0.2, "request_timeout_secs": 110}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    directory = tmp_path_factory.mktemp("front")
    with hosts(directory, 3, MODELS, model=MODEL, policy=POLICY,
               aliases={"m1": ["org/one"]}) as running:  # fmt: skip
        yield running


@pytest.fixture
def front(fleet: list[Host], tmp_path: Path) -> Iterator[Proxy]:
    with proxy(tmp_path, fleet) as running:
        yield running


def post(port: int, body: bytes, *, path: str = "/v1/completions", **headers: str) -> Any:
    """(status, the host that answered, the answer)"""
    given = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request("POST", path, body, given)
    answer = connection.getresponse()
    host, payload = answer.headers.get("x-llmux-host"), answer.read()
    connection.close()
    return answer.status, host, payload


# ---- the name is found, wherever it is -----------------------------------------------------------


def form(model: str, size: int) -> tuple[bytes, str]:
    file = b'--nope\r\nContent-Disposition: form-data; name="model"\r\n\r\nwrong\r\n' * (size // 68)
    parts = [
        (b'name="file"; filename="a.wav"\r\nContent-Type: audio/wav', file),
        (b'name="model"', model.encode()),
    ]
    body = b"".join(
        b"--a.boundary\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + value + b"\r\n"
        for head, value in parts
    )
    return body + b"--a.boundary--\r\n", 'multipart/form-data; boundary="a.boundary"'


def deep(levels: int) -> bytes:
    return (
        b'{"tools":'
        + b'{"a":' * levels
        + b"1"
        + b"}" * levels
        + b',"max_tokens":1,"prompt":"p","model":"m1"}'
    )


BODIES = {
    "small, model first": (Asked("m1", 100, True).body(), {}),
    "small, model last": (Asked("m1", 100, False).body(), {}),
    "just over HAProxy's usual buffer, model last": (Asked("m1", 17_000, False).body(), {}),
    "at the limit, model first": (Asked("m1", LARGEST, True).body(), {}),
    "at the limit, model last": (Asked("m1", LARGEST, False).body(), {}),
    "at the limit, token ids": (
        b'{"prompt":"p","ids":[1'
        + b",12345" * (LARGEST // 6 - 20)
        + b'],"max_tokens":1,"model":"m1"}',
        {},
    ),
    "an alias with an escaped slash": (b'{"prompt":"p","max_tokens":1,"model":"org\\/one"}', {}),
    "a key with escapes": (b'{"prompt":"p","max_tokens":1,"mod\\u0065l":"m\\u0031"}', {}),
    "behind a deep schema": (deep(100), {}),
    "the path says it": (
        b'{"prompt":"p","max_tokens":1}',
        {"path": "/upstream/org%2Fone/v1/completions"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Away:
    """m1 is awake on one host only, which is not its home: there it is found by its name alone."""

    front: Proxy
    host: str


@pytest.fixture(scope="module")
def elsewhere(fleet: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with proxy(tmp_path_factory.mktemp("away"), fleet) as front:
        yield front


@pytest.fixture
def away(fleet: list[Host], elsewhere: Proxy) -> Away:
    """For each test once more: the tests before it may have woken m1 at its home."""
    homes = until(lambda: elsewhere.weights().get("m1"), "the proxy hears of m1")
    other = next(host for host in fleet if host.name != next(iter(homes)))
    for host in fleet:
        if host is not other and host.states()["m1"] not in ("parked", "stopped"):
            host.unload()
    other.load("m1")
    elsewhere.until_awake("m1", other.name)
    return Away(elsewhere, other.name)


@pytest.mark.parametrize("case", BODIES)
def test_a_request_reaches_the_host_where_its_model_is_awake(case: str, away: Away) -> None:
    body, more = BODIES[case]
    status, host, answer = post(away.front.port, body, **more)
    assert (status, host) == (200, away.host), answer[:300]


@pytest.mark.parametrize("size", [1000, LARGEST - 1000])
def test_a_form_reaches_the_host_where_its_model_is_awake(size: int, away: Away) -> None:
    body, kind = form("m1", size)
    status, host, answer = post(
        away.front.port, body, path="/v1/audio/transcriptions", Content_Type=kind
    )
    assert (status, host) == (200, away.host), answer[:300]


def test_a_body_in_chunks_reaches_the_host_where_its_model_is_awake(away: Away) -> None:
    body = Asked("m1", 1_000_000, False).body()
    pieces = (body[at : at + 50_000] for at in range(0, len(body), 50_000))
    connection = http.client.HTTPConnection("127.0.0.1", away.front.port, timeout=SECONDS)
    connection.request(
        "POST", "/v1/completions", pieces, {"Content-Type": "application/json"}, encode_chunked=True
    )
    answer = connection.getresponse()
    assert (answer.status, answer.headers["x-llmux-host"]) == (200, away.host), answer.read()[:300]
    connection.close()


# ---- a trace -------------------------------------------------------------------------------------


def in_turns(config: str) -> str:
    """The configuration of a proxy that knows nothing of models."""
    lines = [
        line.replace("balance hash var(txn.model)", "balance roundrobin")
        for line in config.splitlines()
        if "lua.llmux_host" not in line and "hash-type" not in line
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Run:
    outcome: Outcome
    switches: dict[str, int]

    def row(self, name: str, seconds: float) -> str:
        by_host = ", ".join(f"{host} {count}" for host, count in sorted(self.switches.items()))
        return f"{name}: {self.outcome.share():.1%} awake; switches {by_host}; {seconds:.0f} s"


def run(directory: Path, fleet: list[Host], asked: list[Asked], **more: Any) -> Run:
    for host in fleet:
        host.unload()
    until(lambda: not any("serving" in host.states().values() for host in fleet), "all asleep")
    before = {host.name: host.count("llmux_switches_total") for host in fleet}
    began = time.monotonic()
    with proxy(directory, fleet, **patience(directory), **more) as front:
        outcome = send(front.port, asked)
    switches = {
        host.name: int(host.count("llmux_switches_total") - before[host.name]) for host in fleet
    }
    result = Run(outcome, switches)
    print(result.row(directory.name, time.monotonic() - began))
    assert outcome.statuses == {200: len(asked)} and not outcome.wrong, outcome
    return result


def test_more_requests_find_their_model_awake_than_in_turns(
    fleet: list[Host], tmp_path_factory: pytest.TempPathFactory
) -> None:
    asked = trace(MODELS, REQUESTS)
    blind = run(tmp_path_factory.mktemp("in-turns"), fleet, asked, edit=in_turns)
    seeing = run(tmp_path_factory.mktemp("by-model"), fleet, asked)
    best = best_possible(asked, PLACES * len(fleet))
    least = round((1 - best) * len(asked))
    print(f"best possible of {len(asked)} requests: {best:.1%} awake; {least} switches")
    assert blind.outcome.share() < seeing.outcome.share() <= 1
    assert sum(seeing.switches.values()) < sum(blind.switches.values())
    # Nothing woke a model in two places: each has one home.
    assert {len(hosts) for hosts in seeing.outcome.hosts_of.values()} == {1}


@pytest.mark.fleet
def test_a_host_that_dies_amid_the_trace_takes_only_what_it_had(tmp_path: Path) -> None:
    asked = trace(MODELS, REQUESTS)
    half = len(asked) // 2

    def killing(lost: Host) -> Iterator[Asked]:
        yield from asked[:half]
        lost.kill()
        yield from asked[half:]

    with (
        hosts(tmp_path, 3, MODELS, model=MODEL, policy=POLICY) as fleet,
        proxy(tmp_path, fleet) as front,
    ):
        outcome = send(front.port, killing(fleet[0]))
        switches = {host.name: int(host.count("llmux_switches_total")) for host in fleet[1:]}
    print(
        f"{outcome.share():.1%} awake; {dict(outcome.statuses)}; by host {dict(outcome.hosts)};"
        f" switches of the others {switches}; killed at {half}, broken {sorted(outcome.broken)}"
    )
    assert outcome.statuses.total() == len(asked) and not outcome.wrong
    # Each client had one request under way at most.
    assert len(outcome.broken) <= CLIENTS
    assert all(number < half + CLIENTS for number in outcome.broken)


# ---- streams -------------------------------------------------------------------------------------


class Stream:
    """A stream that has its first token and lasts longer than any test, read in the background."""

    def __init__(self, port: int, model: str, tokens: int = 3500) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        body = {
            "model": model,
            "prompt": "p",
            "stream": True,
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        self.connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        self.answer = self.connection.getresponse()
        self.host = self.answer.headers.get("x-llmux-host", "")
        self.text = self.answer.readline()
        assert self.answer.status == 200 and self.text.startswith(b"data: "), self.text
        self.over = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            for line in self.answer:
                self.text += line
        except (OSError, http.client.HTTPException):
            pass
        self.over = True

    def goes_on(self) -> bool:
        """Whether more of it comes; then its client leaves."""
        so_far = len(self.text)
        until(lambda: self.over or len(self.text) > so_far, "more of a stream, or its end")
        going = not self.over
        if self.connection.sock is not None:
            self.connection.sock.shutdown(socket.SHUT_RDWR)
        self._reader.join(SECONDS)
        self.connection.close()
        return going


def test_when_a_host_dies_only_its_running_streams_break(tmp_path: Path) -> None:
    with (
        hosts(tmp_path, 3, MODELS, model=MODEL, policy=POLICY) as fleet,
        proxy(tmp_path, fleet) as front,
    ):
        homes = {model: next(iter(at)) for model, at in front.weights().items()}
        two_each = [
            [model for model, home in homes.items() if home == host.name][:PLACES] for host in fleet
        ]
        streams = [Stream(front.port, model) for models in two_each for model in models * 5]
        lost = fleet[1]
        assert len({stream.host for stream in streams}) == 3
        assert all(stream.host == homes_of(homes, stream) for stream in streams)
        lost.kill()
        for stream in streams:
            assert stream.goes_on() == (stream.host != lost.name), stream.host
        asked = [Asked(model, 200, False) for model in MODELS * 3]
        outcome = send(front.port, asked)
        assert outcome.statuses == {200: len(asked)}, outcome
        until(lambda: front.status()[lost.name].startswith("DOWN"), "the proxy sees the death")
        lost.start()
        until(lambda: lost.name in front.usable(), "the proxy sees it come back")


def homes_of(homes: dict[str, str], stream: Stream) -> str:
    return homes[json.loads(stream.text.split(b"\n")[0][6:])["model"]]


def test_a_drain_and_reloads_cut_no_stream(front: Proxy, fleet: list[Host]) -> None:
    stream = Stream(front.port, "m2")
    drained = stream.host
    front.order(f"set server llmux/{drained} state drain")
    until(lambda: drained not in front.usable(), "the drain")
    assert post(front.port, Asked("m2", 100, True).body())[1] != drained
    old = front.workers()
    front.reload()
    assert front.status()[drained].startswith("DRAIN"), front.status()
    assert post(front.port, Asked("m2", 100, True).body())[1] != drained
    assert stream.goes_on()
    until(lambda: not front.workers() & old, "the former worker ends with its last stream")
    front.order(f"set server llmux/{drained} state ready")
    until(lambda: drained in front.usable(), "the host is back")


# ---- everything else -----------------------------------------------------------------------------


def test_a_kept_response_is_found_on_whichever_host_has_it(front: Proxy) -> None:
    found = []
    for model in MODELS[:4]:
        body = json.dumps({"model": model, "input": "hi", "max_output_tokens": 3}).encode()
        status, host, answer = post(front.port, body, path="/v1/responses")
        assert status == 200, answer
        found.append((json.loads(answer)["id"], host))
    assert len({host for _, host in found}) > 1
    for name, host in found * 2:
        connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=SECONDS)
        connection.request("GET", f"/v1/responses/{name}")
        answer = connection.getresponse()
        assert (answer.status, answer.headers["x-llmux-host"]) == (200, host), answer.read()
        connection.close()
    assert get(front.port, "/v1/responses/resp_none")[0] == 404


def test_questions_to_one_host_are_not_passed_on_and_metrics_are_there(front: Proxy) -> None:
    for path in ("/control/status", "/metrics", "/logs/m1", "/events", "/health/weights"):
        assert get(front.port, path)[0] == 404, path
    assert get(front.port, "/v1/models")[0] == 200
    series = get(front.metrics_port, "/metrics")[1].decode()
    assert 'haproxy_server_status{proxy="llmux",server="gpu1",state="UP"} 1' in series


def test_clients_and_hosts_may_speak_tls_and_hosts_may_ask_for_keys(tmp_path: Path) -> None:
    authority = tmp_path / "authority"
    certificate, key = certificates(authority)
    pem = tmp_path / "front.pem"
    pem.write_text(certificate.read_text() + key.read_text())
    (tmp_path / "key.map").write_text("key sk-front\n")
    hashed = hashlib.sha256(b"sk-front").hexdigest()
    (tmp_path / "keys.yaml").write_text(f"- {{name: front, sha256: {hashed}}}\n")
    (tmp_path / "keys.yaml").chmod(0o600)
    secured = {
        "tls_certificate": str(certificate), "tls_key": str(key),
        "keys_file": str(tmp_path / "keys.yaml"),
    }  # fmt: skip
    with (
        hosts(
            tmp_path, 2, ["m0"], model=MODEL, policy=POLICY, gateway=secured,
            certificate=certificate, key="sk-front",
        ) as fleet,
        proxy(
            tmp_path, fleet,
            llmux_frontend_server_options=f"ssl verify required ca-file {certificate}",
            llmux_frontend_tls_certificate=str(pem),
            llmux_frontend_key_src="given", llmux_frontend_key_map=str(tmp_path / "key.map"),
        ) as front,
    ):  # fmt: skip
        context = ssl.create_default_context(cafile=str(certificate))
        url = f"https://localhost:{front.port}/v1/completions"
        body = Asked("m0", 1_000_000, False).body()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-front"}
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, context=context, timeout=SECONDS) as answer:
            assert answer.status == 200
        until(lambda: "100" in front.weights()["m0"].values(), "the proxy hears weights")
