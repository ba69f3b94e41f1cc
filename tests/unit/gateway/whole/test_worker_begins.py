"""What a worker knows before the supervisor has said a word: its configuration, and its share."""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import Any

import pytest
from gateway_desk import FakeLink

from llmux.config.keyfile import hash_key
from llmux.config.schema import Config, GatewayConfig, Key, ModelConfig, PolicyConfig
from llmux.gateway.http.request import Incoming
from llmux.gateway.http.request_head import HeadReader
from llmux.gateway.worker import Worker

ALPHA = ModelConfig(
    "alpha", "/m/alpha", aliases=("alef",), extra_args=("--lora-modules", "lora=/l")
)
FORM = b'--B\r\ncontent-disposition: form-data; name="model"\r\n\r\n%b\r\n--B--\r\n'


def a_worker(**gateway: Any) -> Worker[Any]:
    async def make() -> Worker[Any]:
        config = Config(
            models=MappingProxyType({"alpha": ALPHA}),
            policy=PolicyConfig(request_timeout_secs=7.0, min_active_secs=3.0),
            gateway=GatewayConfig(**gateway),
        )
        link: Any = FakeLink()
        keys = (Key("k", hash_key("s"), models=frozenset({"alef"})),)
        return Worker(config, link, name="w1", keys=lambda: keys)

    return asyncio.run(make())


def test_its_models_and_their_names_are_those_of_the_configuration() -> None:
    worker = a_worker(fallback_model="alpha")
    (info,) = worker.models.values()
    assert (info.name, info.state, info.aliases, info.adapters) == (
        "alpha", "unknown", ["alef"], ["lora"],
    )  # fmt: skip
    assert worker.names == {"alpha": "alpha", "alef": "alpha", "lora": "alpha"}
    assert [worker.model_of(name) for name in ("lora", "gamma")] == ["alpha", "alpha"]
    assert a_worker().model_of("gamma") is None
    assert worker.guard is not None
    use = worker.guard.identify(b"/v1/models", b"s", None)
    assert use is not None and use.models == frozenset({"alpha"})
    assert (worker.draining, worker.closing, worker.supervisor_lost) == (False, False, False)
    assert (worker.admission.wait_secs, worker.switches.min_active_secs) == (7.0, 3.0)


@pytest.mark.parametrize(("workers", "most"), [(1, 10), (4, 3)])
def test_what_has_a_limit_is_shared_among_the_workers(workers: int, most: int) -> None:
    worker = a_worker(
        workers=workers, max_connections=10, max_buffered_bytes=10, max_waiting=10,
        max_in_flight=10,
    )  # fmt: skip
    admission = worker.admission
    assert (worker.max_connections, worker.bodies.limit) == (most, most)
    assert (admission._max_waiting, admission._max_in_flight) == (most, most)
    assert admission._deaths._alone == (1 if workers == 1 else 2)


@pytest.mark.parametrize("told", [True, False])
def test_a_chat_is_told_in_words_where_that_is_configured(told: bool) -> None:
    assert (a_worker(loading_text=told).standing is not None) is told


@pytest.mark.parametrize(
    ("public", "host", "known"),
    [(True, b"a.b", True), (False, b"a.b", False), (False, b"c.d", True), (True, b"c.d", True)],
)
def test_without_keys_hosts_are_known_or_all_are_taken(
    public: bool, host: bytes, known: bool
) -> None:
    worker = a_worker(allow_public_without_keys=public, allowed_hosts=("c.d",))
    assert worker.hosts[host] is known
    assert worker.cors is None
    cors = a_worker(cors_origins=("http://x",)).cors
    assert cors is not None and cors.allows(b"http://x")


@pytest.mark.parametrize(
    ("in_body", "in_path", "written"),
    [("alef", "alpha", "alpha"), ("alpha", "alef", "alpha"), ("lora", "alef", "lora"),
     ("alef", "alef", "alpha")],
)  # fmt: skip
def test_a_form_below_a_models_path_gets_the_models_own_name(
    in_body: str, in_path: str, written: str
) -> None:
    request = Incoming()
    request.method = b"POST"
    request.target = b"/upstream/%b/v1/audio/transcriptions" % in_path.encode()
    request.headers = [
        (b"host", b"x"), (b"content-type", b"multipart/form-data; boundary=B"),
    ]  # fmt: skip
    request.read_head("1.1", HeadReader())
    request.find_route()
    request.begin_form()
    assert request.add_upload(FORM % in_body.encode()) == in_path
    assert (request.model(), request.name_in_body()) == (in_path, in_body)
    request.replace_alias("alef", "alpha")
    assert request.upload is not None
    expected = FORM % written.encode()
    body = b"".join(request.upload.read(at, 1) for at in range(request.upload.size))
    assert body == expected
