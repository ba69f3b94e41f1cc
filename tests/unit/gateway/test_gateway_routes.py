"""The allow-list, and the model's name in forms."""

from __future__ import annotations

import pytest

from llmux.errors import Reason, Refused
from llmux.gateway.http import multipart as forms
from llmux.gateway.http.multipart import FormError, ModelFinder, Upload, boundary_of
from llmux.gateway.http.request import Incoming
from llmux.gateway.http.routes import POSTS, Source, find, methods_of, speaks_anthropic


@pytest.mark.parametrize(
    ("path", "engine_path"),
    [
        (b"/v1/chat/completions", b"/v1/chat/completions"),
        (b"/chat/completions", b"/v1/chat/completions"),
        (b"/v/chat/completions", b"/v1/chat/completions"),
        (b"/responses", b"/v1/responses"),
        (b"/reranking", b"/v1/rerank"),
        (b"/v1/classify", b"/classify"),
        (b"/v1/messages/count_tokens", b"/v1/messages/count_tokens"),
    ],
)
def test_every_name_of_a_route_leads_to_the_engines_own(path: bytes, engine_path: bytes) -> None:
    match = find(b"POST", path)
    assert match is not None
    assert match.path == engine_path
    assert find(b"GET", path) is None


def test_engines_are_asked_for_their_own_paths_only() -> None:
    own = {match.path for match in POSTS.values()}
    assert own == {
        b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/embeddings",
        b"/v1/rerank", b"/v1/score", b"/tokenize", b"/detokenize", b"/classify", b"/pooling",
        b"/v1/audio/transcriptions", b"/v1/audio/translations", b"/v1/audio/speech",
        b"/v1/messages", b"/v1/messages/count_tokens",
    }  # fmt: skip


def test_which_routes_can_answer_with_an_event_stream() -> None:
    assert {match.path for match in POSTS.values() if match.route.streams} == {
        b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages",
        b"/v1/audio/transcriptions", b"/v1/audio/translations",
    }  # fmt: skip
    match = find(b"POST", b"/upstream/alpha/completions")
    assert match is not None
    assert match.route == POSTS[b"/v1/completions"].route


def test_which_routes_speak_anthropic_and_whose_responses_are_kept() -> None:
    routes = [match.route for match in POSTS.values()]
    anthropic = {route.path for route in routes if route.anthropic}
    assert anthropic == {b"/v1/messages", b"/v1/messages/count_tokens"}
    assert {route.path for route in routes if route.keeps} == {b"/v1/responses"}
    for method, path in (
        (b"GET", b"/v1/responses/r"), (b"POST", b"/v1/responses/r/cancel"),
        (b"GET", b"/upstream/alpha/health"), (b"GET", b"/upstream/alpha/v1/responses/r"),
    ):  # fmt: skip
        match = find(method, path)
        assert match is not None
        assert not (match.route.anthropic or match.route.keeps or match.route.streams)


def test_upstream_names_the_model_and_keeps_the_route() -> None:
    match = find(b"POST", b"/upstream/org%2Falpha/v1/messages")
    assert match is not None
    assert (match.model, match.path, match.route.anthropic) == ("org/alpha", b"/v1/messages", True)
    plain = find(b"POST", b"/upstream/org/alpha/v1/messages")
    assert plain is not None
    assert plain.model == "org/alpha"
    inside = find(b"POST", b"/upstream/org%2Fv1/completions/v1/completions")  # first such place
    assert inside is not None
    assert inside.model == "org/v1/completions"
    get = find(b"GET", b"/upstream/alpha/v1/models")
    assert get is not None
    assert (get.model, get.route.source) == ("alpha", Source.PATH)
    by_id = find(b"GET", b"/upstream/alpha/v1/responses/resp_1")
    assert by_id is not None
    assert (by_id.model, by_id.response_id) == ("alpha", "resp_1")
    for path in (b"/sleep", b"/metrics", b"", b"/", b"/v1/completions/", b"/v1/load_lora_adapter"):
        assert find(b"GET", b"/upstream/alpha" + path) is None
        assert find(b"POST", b"/upstream/alpha" + path) is None
    assert find(b"POST", b"/upstream/%ff/v1/completions") is None


def test_responses_are_found_by_their_id() -> None:
    match = find(b"GET", b"/responses/resp_1")
    assert match is not None
    assert (match.path, match.response_id) == (b"/v1/responses/resp_1", "resp_1")
    cancel = find(b"POST", b"/v1/responses/resp_1/cancel")
    assert cancel is not None
    assert cancel.path == b"/v1/responses/resp_1/cancel"
    assert methods_of(b"/v1/responses/resp_1") == ("GET",)
    assert find(b"GET", b"/v1/responses/a%2fb") is None


def test_who_speaks_anthropic() -> None:
    assert speaks_anthropic(b"/v1/messages")
    assert speaks_anthropic(b"/upstream/m/v1/messages/count_tokens")
    assert not speaks_anthropic(b"/v1/completions")


# ---- forms --------------------------------------------------------------------------------------

FORM = (
    b"--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a; name=model\"\r\n"
    b"Content-Type: audio/wav\r\n\r\n\r\n--X not yet\r\n\r\nmodel\r\n"
    b"--XX\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nalpha\r\n--XX--\r\n"
)  # fmt: skip


@pytest.mark.parametrize("step", [1, 2, 3, 7, 50, 1000])
def test_the_model_is_found_however_the_form_is_cut(step: int) -> None:
    finder = ModelFinder(b"XX")
    for at in range(0, len(FORM), step):
        finder.feed(FORM[at : at + step])
    assert finder.model == "alpha"


@pytest.mark.parametrize("step", [1, 2, 7, 10_000])
def test_where_the_models_name_stands(step: int) -> None:
    for form in (
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nname\r\n--B--\r\n',
        b"x\r\n--B\r\nContent-Disposition: form-data; name=f\r\n\r\n\r\n-\r\n--B\r\n%b--"
        % b'Content-Disposition: form-data; name="model"\r\n\r\nname\r\n--B',
    ):
        finder = ModelFinder(b"B")
        for at in range(0, len(form), step):
            finder.feed(form[at : at + step])
        assert form[slice(*finder.span)] == b"name" == (finder.model or "").encode()


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("parts", "stream"),
    [
        ([(b"stream", b"true"), (b"file", b"x")], True),
        ([(b"file", b"false"), (b"stream", b"On")], True),
        ([(b"stream", b"false")], False),
        ([(b"stream", b"")], False),
        ([(b"stream", b"true"), (b"stream", b"0")], False),
        ([(b"stream", b"0"), (b"stream", b"1")], True),
        ([(b"stream", b"true" + b" " * 100_000)], False),
        ([(b"stream", b"\xff")], False),
        ([(b"streams", b"true")], False),
        ([], False),
    ],
)
def test_a_form_asks_for_a_stream_as_vllm_reads_it(
    parts: list[tuple[bytes, bytes]], stream: bool, step: int
) -> None:
    request = Incoming()
    request.method, request.target = b"POST", b"/v1/audio/transcriptions"
    request.headers = [(b"content-type", FORM_TYPE)]
    request.find_route()
    request.begin_form()
    body = b"".join(PART % name + value + b"\r\n" for name, value in [*parts, (b"model", b"a")])
    body += b"--XX--"
    for at in range(0, len(body), step):
        request.add_upload(body[at : at + step])
    assert request.wants_stream() is stream
    assert request.model() == "a"


def test_what_is_held_of_a_forms_values_is_bounded() -> None:
    finder = ModelFinder(b"XX")
    finder.feed(PART % b"stream")
    for _ in range(100):
        finder.feed(b"y" * 1000)
    assert len(finder._value or b"") < 100


def test_a_piece_of_an_upload_is_replaced() -> None:
    for data, piece in ((b"0123456789", b"abc"), (b"0123456789", b""), (b"0123456789", b"x" * 99)):
        upload = Upload()
        upload.write(data)
        upload.replace(3, 5, piece)
        read = b""
        while part := upload.read(len(read), 4):
            read += part
        assert read == b"012" + piece + b"56789" and len(read) == upload.size


def test_a_file_is_not_held() -> None:
    finder = ModelFinder(b"XX")
    finder.feed(b'--XX\r\nContent-Disposition: form-data; name="file"\r\n\r\n')
    for _ in range(100):
        finder.feed(b"\r\n--X" * 1000)
    assert len(finder._rest) < 100
    finder.feed(b"\r\n--XX\r\nContent-Disposition: form-data; name=model\r\n\r\nm\r\n--XX--")
    assert finder.model == "m"


@pytest.mark.parametrize(
    "form",
    [
        FORM.replace(b"--XX--\r\n", b"") + FORM,
        b'--XX\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"x" * 2000,
        b'--XX\r\nContent-Disposition: form-data; name="model"\r\n\r\n\xff\r\n--XX',
        b"--XX\r\nX: " + b"y" * 20_000,
    ],
)
def test_forms_that_are_refused(form: bytes) -> None:
    finder = ModelFinder(b"XX")
    with pytest.raises(FormError):
        finder.feed(form + b"\r\n--XX--\r\n")


def test_the_boundary() -> None:
    assert boundary_of(b"multipart/form-data; boundary=abc") == b"abc"
    assert boundary_of(b'Multipart/Form-Data; charset=x; Boundary="a b\\"c"') == b'a b"c'
    for wrong in (b"", b"application/json", b"multipart/form-data", b"multipart/mixed; boundary=a"):
        with pytest.raises(FormError):
            boundary_of(wrong)


def test_a_long_upload_lies_on_disk_and_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MEMORY_BYTES", 10)
    upload = Upload()
    for piece in (b"abcde", b"fghij", b"klmno", b"p"):
        upload.write(piece)
    assert upload.size == 16
    assert upload.read(0, 100) == b"abcdefghijklmnop"
    assert upload.read(8, 4) == b"ijkl"
    assert upload.read(16, 4) == b""
    assert not upload._memory


PART = b'--XX\r\nContent-Disposition: form-data; name="%b"\r\n\r\n'
FORM_TYPE = b"multipart/form-data; boundary=XX"


@pytest.mark.parametrize(
    ("content_type", "body", "said"),
    [
        (FORM_TYPE, PART % b"model" + b"alpha\r\n--XX--\r\n", None),
        (FORM_TYPE, (PART % b"model" + b"alpha\r\n") * 2 + b"--XX--\r\n", "more than one"),
        (FORM_TYPE, PART % b"model" + b"x" * 2000 + b"\r\n--XX--\r\n", "cannot read"),
        (FORM_TYPE, PART % (b"x" * 20_000), "head is larger than"),
        (b"application/json", b"{}", "cannot read"),
        (b"multipart/form-data", b"", "cannot read"),
    ],
)
@pytest.mark.parametrize("piece", [1 << 20, 7])
def test_a_form_that_cannot_be_read_is_refused_for_its_reason(
    content_type: bytes, body: bytes, said: str | None, piece: int
) -> None:
    request = Incoming()
    request.headers = [(b"content-type", content_type)]

    def receive() -> str | None:
        request.begin_form()
        found = [request.add_upload(body[at : at + piece]) for at in range(0, len(body), piece)]
        return found[-1]

    if said is None:
        assert receive() == "alpha"
        return
    with pytest.raises(Refused, match=said) as refused:
        receive()
    assert refused.value.reason is Reason.BAD_REQUEST
