"""The stand-in's endpoints answer as vLLM's do."""

from __future__ import annotations

import json

import pytest
from standin_engines import Engine, Start


def test_answers_name_the_model_and_are_the_same_every_time(alpha: Engine, start: Start) -> None:
    question = [{"role": "user", "content": "who are you?"}]
    answers = [
        alpha.post("/v1/chat/completions", model="alpha", messages=question, temperature=0)
        for _ in range(2)
    ]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0].startswith("alpha:")
    assert texts[0] == texts[1]
    assert answers[0]["choices"][0]["finish_reason"] == "stop"
    assert answers[0]["usage"]["completion_tokens"] > 8
    assert alpha.say("one") != alpha.say("two")
    again = start("alpha")
    assert again.say("one") == alpha.say("one")


def test_sampling_depends_on_the_seed(alpha: Engine) -> None:
    assert alpha.say(temperature=1) != alpha.say(temperature=1)
    assert alpha.say(temperature=1, seed=7) == alpha.say(temperature=1, seed=7)


def test_chat_stream_has_vllms_chunks(alpha: Engine) -> None:
    stream = alpha.open_stream(stream_options={"include_usage": True}, max_tokens=5)
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    text = stream.read()
    assert text.startswith("alpha:")
    assert stream.done
    first, *tokens, last, counted = stream.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["object"] for event in stream.events] == ["chat.completion.chunk"] * 7
    assert all(event["choices"][0]["finish_reason"] is None for event in tokens)
    assert last["choices"][0]["finish_reason"] == "length"
    assert counted["choices"] == []
    assert counted["usage"]["completion_tokens"] == 5
    prompt = [{"role": "user", "content": "hello"}]
    whole = alpha.post("/v1/chat/completions", messages=prompt, temperature=0, max_tokens=5)
    assert whole["choices"][0]["message"]["content"] == text


def test_logprobs_in_both_dialects(alpha: Engine) -> None:
    plain = alpha.post("/v1/completions", prompt="x", temperature=0, max_tokens=3, logprobs=2)
    logprobs = plain["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == plain["choices"][0]["text"]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    assert logprobs["text_offset"][:2] == [0, len("alpha")]
    messages = [{"role": "user", "content": "x"}]
    chat = alpha.post(
        "/v1/chat/completions", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = chat["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in content] == [2, 2, 2]
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"] == "alpha"


def test_several_choices_prompts_and_stop_strings(alpha: Engine) -> None:
    many = alpha.post("/v1/completions", prompt=["a", "b"], n=2, temperature=0, max_tokens=4)
    texts = [choice["text"] for choice in many["choices"]]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    stopped = alpha.post("/v1/completions", prompt="a", temperature=0, stop=[":"])
    choice = stopped["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        "alpha",
        "stop",
        ":",
    )


def test_embeddings(alpha: Engine) -> None:
    answer = alpha.post("/v1/embeddings", model="alpha", input=["one", "two"])
    first, second = (item["embedding"] for item in answer["data"])
    assert len(first) == 64
    assert first != second
    assert sum(value * value for value in first) == pytest.approx(1)
    packed = alpha.post("/v1/embeddings", input="one", encoding_format="base64")
    assert isinstance(packed["data"][0]["embedding"], str)


def test_errors_have_vllms_shape(alpha: Engine) -> None:
    status, answer = alpha.ask("POST", "/v1/completions", {"model": "nope", "prompt": "x"})
    assert status == 404
    assert answer["error"] == {
        "message": "The model `nope` does not exist.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    for path, body, expected in (
        ("/v1/chat/completions", {}, 400),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400),
        ("/v1/completions", {"prompt": "x" * 9000}, 400),
        ("/v1/completions", {"prompt": "x", "stop": [1]}, 400),
        ("/v1/completions", {"prompt": "x", "stream_options": 7, "stream": True}, 500),
        ("/nothing", {}, 404),
        ("/health", {}, 405),
    ):
        status, answer = alpha.ask("POST", path, body)
        assert (status, answer["error"]["code"]) == (expected, expected)


def test_the_small_endpoints(alpha: Engine) -> None:
    assert alpha.get("/health") == ""
    assert alpha.get("/version")["version"].startswith("0.32")
    card = alpha.get("/v1/models")["data"][0]
    assert (card["id"], card["root"], card["max_model_len"]) == ("alpha", "/models/alpha", 1024)
    tokens = alpha.post("/tokenize", prompt="grüße")["tokens"]
    assert alpha.post("/detokenize", tokens=tokens) == {"prompt": "grüße"}
    paths = alpha.get("/openapi.json")["paths"]
    assert {"/health", "/sleep", "/wake_up", "/v1/completions"} <= set(paths)
    assert alpha.post("/reset_prefix_cache") == {"success": True}


def test_metrics_count(alpha: Engine) -> None:
    before = alpha.metric("generation_tokens_total", model_name="alpha")
    alpha.say(max_tokens=8)
    assert alpha.metric("generation_tokens_total") == before + 8
    assert alpha.metric("prompt_tokens_total") > 0
    assert alpha.metric("num_requests_running") == 0
    assert alpha.metric("engine_sleep_state", sleep_state="awake") == 1
    assert alpha.metric("time_to_first_token_seconds_count") > 0


def test_connection_is_kept_and_bodies_may_be_chunked(alpha: Engine) -> None:
    connection = alpha.connect()
    for _ in range(2):
        body = json.dumps({"prompt": "x", "temperature": 0, "max_tokens": 2}).encode()
        pieces = iter([body[:10], body[10:]])
        connection.request("POST", "/v1/completions", pieces, encode_chunked=True)
        response = connection.getresponse()
        assert json.loads(response.read())["choices"][0]["text"] == "alpha:"
        assert not response.will_close
    connection.close()


def test_dev_endpoints_need_dev_mode_and_keys_are_checked(start: Start) -> None:
    engine = start("alpha", "--api-key", "secret", VLLM_SERVER_DEV_MODE="0")
    for path in ("/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache"):
        assert engine.ask("POST", path)[0] == 404
    assert "/sleep" not in engine.get("/openapi.json")["paths"]
    assert engine.ask("GET", "/v1/models") == (401, {"error": "Unauthorized"})


def test_client_that_leaves_ends_its_generation(start: Start) -> None:
    engine = start("alpha", "--standin-tokens-per-sec", "50")
    stream = engine.open_stream(ignore_eos=True)
    stream.next()
    assert engine.metric("num_requests_running") == 1
    stream.close()
    engine.wait_metric("num_requests_running", 0)
