"""Every way to an engine: uploads, aliases, responses by id, /upstream, Anthropic's errors."""

from __future__ import annotations

import json

import pytest
from gateway_harness import (
    ADMIN,
    ADMINS,
    EngineRequest,
    FakeSupervisor,
    a_config,
    in_loop,
    soon,
    stage,
    until,
)

from llmux.gateway.http import multipart as forms
from llmux.protocol import (
    Answer,
    Ask,
    Catalog,
    KeepAliveHint,
    ModelInfo,
    ResponseOwners,
    Revoke,
    Watch,
)


def form(*parts: tuple[str, bytes], boundary: str = "XX") -> tuple[bytes, str]:
    body = b""
    for name, value in parts:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        body += head.encode() + value + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), (
        f"Content-Type: multipart/form-data; boundary={boundary}"
    )


async def size(request: EngineRequest) -> None:
    request.json({"size": len(request.body)})


@in_loop
async def test_an_upload_larger_than_memory_arrives_byte_for_byte() -> None:
    async with stage() as s:
        engine = await s.engine(size)
        s.supervisor.grant(engine)
        client = await s.client()
        big = bytes(range(256)) * 12_000  # 3 MB: more than is kept in memory
        for parts in (
            (("model", b"alpha"), ("file", big)),
            (("file", big), ("model", b"alpha")),
            (("file", b""), ("model", b"alpha")),
        ):
            body, content_type = form(*parts)
            client.send("/v1/audio/transcriptions", body=body, headers=(content_type,))
            assert (await client.answer()).json() == {"size": len(body)}
            assert engine.requests[-1].body == body
        assert engine.accepted == 1


@in_loop
async def test_an_upload_survives_the_death_of_its_engine() -> None:
    async def die(request: EngineRequest) -> None:
        request.die()

    async with stage() as s:
        engine = await s.engine(die)
        s.supervisor.grant(engine)
        client = await s.client()
        body, content_type = form(("model", b"alpha"), ("file", b"x" * forms.MEMORY_BYTES * 2))
        client.send("/v1/audio/translations", body=body, headers=(content_type,))
        await engine.next_request(1)
        s.supervisor.say(Revoke("alpha", "e1", dead=True))
        await until(lambda: s.waiting() == 1)
        other = await s.engine(size, name="other")
        s.supervisor.grant(other, epoch="e2")
        assert (await client.answer()).json() == {"size": len(body)}
        assert other.requests[0].body == body


@in_loop
async def test_uploads_that_are_refused() -> None:
    async with stage(a_config(max_body_bytes=1 << 20)) as s:
        for body, content_type, status in (
            (form(("file", b"x"))[0], form()[1], 400),
            (form(("model", b""))[0], form()[1], 400),
            (form(("model", b"nobody"))[0], form()[1], 404),
            (b"{}", "Content-Type: application/json", 400),
            (form(("model", b"alpha"), ("model", b"beta"))[0], form()[1], 400),
            (form(("file", b"x" * (1 << 20)))[0], form()[1], 413),
        ):
            client = await s.client()
            client.send("/v1/audio/transcriptions", body=body, headers=(content_type,))
            answer = await client.answer()
            assert answer.status == status, answer
        assert s.waiting() == 0


@in_loop
async def test_an_upload_for_a_model_that_is_not_there_ends_early() -> None:
    async with stage() as s:
        client = await s.client()
        body, content_type = form(("model", b"nobody"), ("file", b"x" * 100_000))
        head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\n"
        head += f"{content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        client.writer.write(head.encode() + body[:1000])
        assert (await client.answer()).code == "model_not_found"


# ---- aliases ------------------------------------------------------------------------------------


@in_loop
async def test_the_client_reads_the_name_it_sent() -> None:
    quoted = json.dumps('"model":"alpha"')

    async def answer(request: EngineRequest) -> None:
        if json.loads(request.body).get("stream"):
            request.start_stream()
            for number in range(3):
                request.event(json.dumps({"model": "alpha", "n": number}))
                await request.writer.drain()
            request.end_stream()
        else:
            body = f'{{"id":"x","model": "alpha","text":{quoted}}}'.encode()
            request.writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
            for at in range(0, len(body), 5):
                request.writer.write(body[at : at + 5])
                await request.writer.drain()

    async with stage() as s:
        engine = await s.engine(answer)
        s.supervisor.grant(engine)
        client = await s.client()
        await until(lambda: s.gateway.names.get("org/alpha") == "alpha")
        for name in ("org/alpha", "alef", "alpha"):
            client.chat(name)
            plain = (await client.answer()).json()
            assert plain == {"id": "x", "model": name, "text": '"model":"alpha"'}
            assert json.loads(engine.requests[-1].body)["model"] == "alpha", "engines know one name"
            client.chat(name, stream=True)
            events = (await client.answer()).body.decode().split("\n\n")
            assert [json.loads(e[6:])["model"] for e in events[:3]] == [name] * 3
            assert events[3] == "data: [DONE]"
        client.send(payload={"model": "alef"}, version="1.0")
        assert json.loads((await client.answer()).body)["model"] == "alef"
        other = await s.client()
        other.send("/v1/models/org/alpha", method="GET")
        listed = (await other.answer()).json()
        assert (listed["id"], listed["root"]) == ("org/alpha", "alpha")


@in_loop
async def test_an_adapter_is_a_model_of_its_own_and_passes_unchanged() -> None:
    async def echo(request: EngineRequest) -> None:
        request.json({"model": json.loads(request.body)["model"], "id": "x"})

    async with stage() as s:
        engine = await s.engine(echo)
        s.supervisor.grant(engine)
        client = await s.client()
        infos = [ModelInfo("alpha", "serving", aliases=["alef"], adapters=["sql", "org/two"])]
        s.supervisor.say(Catalog.of(infos))
        await until(lambda: s.gateway.names.get("sql") == "alpha")
        for name in ("sql", "org/two"):
            client.chat(name)
            assert (await client.answer()).json()["model"] == name
            assert json.loads(engine.requests[-1].body)["model"] == name
        client.chat("alef")
        assert (await client.answer()).json()["model"] == "alef"
        assert json.loads(engine.requests[-1].body)["model"] == "alpha"
        for body in (b'{"n": 1}', b'{"model": "alef", "n": 1}', b'{"model": "alpha", "n": 1}'):
            client.send("/upstream/org/two/v1/completions", body=body)
            assert (await client.answer()).json()["model"] == "org/two"
            assert json.loads(engine.requests[-1].body) == {"model": "org/two", "n": 1}
        client.send("/v1/models", method="GET")
        listed = {entry["id"]: entry for entry in (await client.answer()).json()["data"]}
        assert set(listed) == {"alpha", "sql", "org/two"}
        assert (listed["sql"]["parent"], listed["sql"]["aliases"]) == ("alpha", [])


@in_loop
async def test_below_upstream_the_body_may_say_any_of_the_models_names() -> None:
    async def echo(request: EngineRequest) -> None:
        request.json({"model": "alpha", "asked": request.body.decode()})

    async with stage() as s:
        engine = await s.engine(echo)
        s.supervisor.grant(engine)
        client = await s.client()
        await until(lambda: s.gateway.names.get("org/alpha") == "alpha")
        for path, body, answered, asked in (
            ("alpha", '{"model": "alef"}', "alef", '{"model": "alpha"}'),
            ("org%2Falpha", '{"model": "alef"}', "alef", '{"model": "alpha"}'),
            ("alef", '{"model": "alpha"}', "alpha", '{"model": "alpha"}'),
            ("alef", '{"n": 1}', "alef", '{"n": 1}'),
            ("alpha", '{"model": "beta"}', "alpha", '{"model": "beta"}'),  # the engine's affair
            ("alef", "not JSON", "alef", "not JSON"),
        ):
            client.send(f"/upstream/{path}/v1/completions", body=body.encode())
            assert (await client.answer()).json() == {"model": answered, "asked": asked}


@in_loop
async def test_an_upload_under_an_alias_names_the_model_and_is_otherwise_the_same() -> None:
    async with stage() as s:
        engine = await s.engine(size)
        s.supervisor.grant(engine)
        client = await s.client()
        await until(lambda: s.gateway.names.get("org/alpha") == "alpha")
        for big in (b"", b"x" * 1000, bytes(range(256)) * 3000):
            for name in (b"org/alpha", b"alef"):
                for order in (1, -1):
                    parts = [("model", name), ("file", big)][::order]
                    body, content_type = form(*parts)
                    client.send("/v1/audio/transcriptions", body=body, headers=(content_type,))
                    assert (await client.answer()).status == 200
                    parts = [("model", b"alpha"), ("file", big)][::order]
                    assert engine.requests[-1].body == form(*parts)[0]


@in_loop
async def test_an_alias_will_do_wherever_a_model_is_named() -> None:
    async with stage(keys=lambda: ADMINS) as s:
        s.supervisor.answer = lambda _ask: {"ok": True, "result": {"lines": ["one"]}}
        await until(lambda: s.gateway.names.get("org/alpha") == "alpha")
        client = await s.client()
        for path, method, payload in (
            ("/control/pin", "POST", {"model": "org/alpha"}),
            ("/control/eviction", "POST", {"model": "alef", "eviction": "retain+stop"}),
            ("/unload", "POST", {"model": "org/alpha"}),
            ("/unload?model=alef", "GET", None),
            ("/logs?model=org/alpha", "GET", None),
            ("/logs/org%2Falpha?lines=3", "GET", None),
            ("/logs/org/alpha", "GET", None),
            ("/logs/stream/org%2Falpha", "GET", None),
        ):
            client.send(path, payload, method=method, headers=(ADMIN,))
            head = await client.head()
            assert head.status == 200, path
            ask = await s.supervisor.hear(Ask)
            assert ask.args["model"] == "alpha", path
            if "stream" not in path:
                await client.reader.readexactly(int(head.headers["content-length"]))
        assert Watch("logs", "alpha") in s.supervisor.heard
        client.leave()
        other = await s.client()
        other.send("/control/pin", {"model": "nobody"}, headers=(ADMIN,))
        await other.answer()
        assert (await s.supervisor.hear(Ask)).args == {"model": "nobody", "by": "key admin"}


# ---- responses by id, /upstream, Anthropic ------------------------------------------------------


@in_loop
async def test_responses_go_to_the_engine_that_keeps_them() -> None:
    async def keep(request: EngineRequest) -> None:
        if request.line.startswith("POST /v1/responses "):
            request.json({"id": "resp_7", "model": "beta"})
        else:
            request.json({"line": request.line})

    async with stage() as s:
        alpha, beta = await s.engine(name="a"), await s.engine(keep, name="b")
        s.supervisor.grant(alpha)
        s.supervisor.grant(beta, "beta", "b1")
        client = await s.client()
        client.send("/v1/responses/resp_7", method="GET")
        answer = await client.answer()
        assert (answer.status, answer.code) == (404, "not_found")
        client.send("/v1/responses", {"model": "beta", "input": "x"})
        await client.answer()
        client.send("/v1/responses/resp_7?include=x", method="GET")
        assert (await client.answer()).json() == {
            "line": "GET /v1/responses/resp_7?include=x HTTP/1.1"
        }
        client.send("/responses/resp_7/cancel")
        assert (await client.answer()).json()["line"].startswith("POST /v1/responses/resp_7/cancel")
        assert not alpha.requests


@in_loop
async def test_a_response_that_another_worker_passed_on_is_found_through_the_supervisor() -> None:
    async def line(request: EngineRequest) -> None:
        request.json({"line": request.line})

    known = {"resp_far": "beta", "resp_old": "gone"}
    async with stage() as s:
        engine = await s.engine(line)
        s.supervisor.grant(engine, "beta", "b1")
        s.supervisor.answer = lambda ask: {
            "ok": True, "result": {"model": known.get(ask.args["id"])},
        }  # fmt: skip
        client = await s.client()
        for path, method in (("resp_far", "GET"), ("resp_far/cancel", "POST")):
            client.send(f"/v1/responses/{path}", method=method)
            assert (await client.answer()).json()["line"] == (
                f"{method} /v1/responses/{path} HTTP/1.1"
            )
        asks = [message for message in s.supervisor.heard if message.kind == "ask"]
        assert len(asks) == 1, "once found it is known"
        for path in ("resp_none", "resp_old"):  # of a model that is configured no longer
            client.send(f"/v1/responses/{path}", method="GET")
            assert (await client.answer()).status == 404
        await s.supervisor.stop()
        client.send("/v1/responses/resp_else", method="GET")
        answer = await client.answer()
        assert (answer.status, answer.code) == (503, "supervisor_unreachable")
        assert "retry-after" in answer.headers
        client.send("/v1/responses/resp_far", method="GET")
        assert (await client.answer()).status == 200


@in_loop
async def test_who_leaves_while_a_response_is_looked_for_costs_nothing() -> None:
    async with stage() as s:
        engine = await s.engine()
        s.supervisor.grant(engine)
        s.supervisor.answers = False
        client = await s.client()
        client.send("/v1/responses/resp_1", method="GET")
        ask = await s.supervisor.hear(Ask)
        client.leave()
        await until(lambda: s.gateway.clients == 0)
        s.supervisor.say(Answer(ask.id, True, {"model": "alpha"}))
        other = await s.client()
        other.chat()
        assert (await other.answer()).status == 200
        assert len(engine.requests) == 1 and s.in_flight() == 0


@in_loop
async def test_the_supervisor_is_told_of_responses_that_are_kept_and_of_nothing_else() -> None:
    async def keep(request: EngineRequest) -> None:
        request.start_stream()
        request.event(json.dumps({"response": {"id": f"id_{len(engine.requests)}"}}))
        request.end_stream()

    async with stage(a_config(keep_alive_comment_secs=60)) as s:
        engine = await s.engine(keep)
        s.supervisor.grant(engine)
        client = await s.client()
        client.chat(stream=True)
        await client.answer()
        client.send("/v1/responses", {"model": "alpha", "stream": True})
        await client.answer()
        assert await s.supervisor.hear(ResponseOwners) == ResponseOwners({"id_2": "alpha"})
        await s.supervisor.stop()
        again = FakeSupervisor(s.supervisor.path)
        await again.start()
        try:
            assert await again.hear(ResponseOwners) == ResponseOwners({"id_2": "alpha"})
        finally:
            await again.stop()


@in_loop
async def test_upstream_says_which_model_whatever_the_body_says() -> None:
    async def line(request: EngineRequest) -> None:
        request.json({"line": request.line})

    async with stage() as s:
        engine = await s.engine(line)
        s.supervisor.grant(engine)
        client = await s.client()
        for path, method, engine_line in (
            ("/upstream/alpha/v1/completions?x=1", "POST", "POST /v1/completions?x=1 HTTP/1.1"),
            ("/upstream/alef/tokenize", "POST", "POST /tokenize HTTP/1.1"),
            ("/upstream/org%2Falpha/health", "GET", "GET /health HTTP/1.1"),
        ):
            client.send(path, method=method, body=b"not json" if method == "POST" else b"")
            assert (await client.answer()).json() == {"line": engine_line}
        client.send("/upstream/nobody/v1/models", method="GET")
        assert (await client.answer()).code == "model_not_found"


@in_loop
async def test_errors_of_anthropics_routes_have_anthropics_shape() -> None:
    async def cut(request: EngineRequest) -> None:
        request.start_stream()
        request.event("{}")
        await request.writer.drain()
        request.die()

    async with stage() as s:
        client = await s.client()
        for status, kind, request in (
            (404, "not_found_error", {"payload": {"model": "nobody"}}),
            (400, "invalid_request_error", {"body": b"{"}),
            (405, "invalid_request_error", {"method": "GET"}),
        ):
            client.send("/v1/messages", **request)
            answer = await client.answer()
            assert answer.status == status
            assert answer.json()["type"] == "error"
            assert answer.json()["error"]["type"] == kind
        engine = await s.engine(cut)
        s.supervisor.grant(engine)
        client.send("/v1/messages", {"model": "alpha", "stream": True})
        body = (await client.answer()).body
        assert b'event: error\ndata: {"type": "error", "error": {"type": "api_error"' in body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_engines_work_within_100_ms(stream: bool) -> None:
    @in_loop
    async def run() -> None:
        async def begin(request: EngineRequest) -> None:
            if stream:
                request.start_stream()
                request.event("one")
            await request.reader.read(1)

        async with stage() as s:
            engine = await s.engine(begin)
            s.supervisor.grant(engine)
            client = await s.client()
            client.chat(stream=stream)
            request = await engine.next_request(1)
            if stream:
                await client.head()
            clock = s.gateway.clock
            left = clock()
            client.leave()
            await soon(request.gone.wait())
            assert clock() - left < 0.1

    run()


async def answered(request: EngineRequest) -> None:
    body = json.loads(request.body)
    request.json({"model": body["model"], "id": "r1"})


@in_loop
async def test_the_fallback_answers_for_unknown_names_under_that_name() -> None:
    async with stage(a_config(fallback_model="alpha")) as s:
        engine = await s.engine(answered)
        s.supervisor.grant(engine)
        client = await s.client()
        client.send("/v1/chat/completions", body=b'{"model": "gpt-9", "messages": []}')
        answer = await client.answer()
        assert answer.json()["model"] == "gpt-9"
        assert json.loads(engine.requests[-1].body)["model"] == "alpha"
        client.send("/upstream/gpt-9/v1/chat/completions", body=b'{"model": "gpt-9"}')
        assert (await client.answer()).status == 404, "a path means the model that it names"


@in_loop
async def test_without_a_fallback_an_unknown_name_is_refused() -> None:
    async with stage() as s:
        client = await s.client()
        client.send("/v1/chat/completions", body=b'{"model": "gpt-9", "messages": []}')
        assert (await client.answer()).status == 404


@in_loop
async def test_a_request_says_how_long_its_model_may_stay_without_use() -> None:
    async with stage() as s:
        engine = await s.engine(answered)
        s.supervisor.grant(engine)
        client = await s.client()
        for value in ("10m", "90", "0", "-1"):
            client.send(
                "/v1/chat/completions",
                body=b'{"model": "alpha", "messages": []}',
                headers=(f"X-Llmux-Keep-Alive: {value}",),
            )
            assert (await client.answer()).status == 200
            assert "x-llmux-keep-alive" not in engine.requests[-1].headers
        hints = [one for one in s.supervisor.heard if isinstance(one, KeepAliveHint)]
        assert [(one.model, one.seconds) for one in hints] == [
            ("alpha", 600), ("alpha", 90), ("alpha", 0), ("alpha", None),
        ]  # fmt: skip
        client.send(
            "/v1/chat/completions",
            body=b'{"model": "alpha", "messages": []}',
            headers=("X-Llmux-Keep-Alive: soon",),
        )
        assert (await client.answer()).status == 400
