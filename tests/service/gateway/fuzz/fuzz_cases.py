"""What the fuzzer sends: one case is all the bytes of one connection, and how they are sent.

A case follows from (seed, lane, number) alone, whatever the timing. Every valid request carries its
case's number and place, so no two requests of a run are the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_BODY = 256 * 1024  # the gateway's limit in these tests

# Engine endpoints that no client may reach (vLLM 0.32: development, management, introspection).
FORBIDDEN = (
    b"sleep wake_up is_sleeping collective_rpc reset_prefix_cache reset_mm_cache"
    b" reset_encoder_cache server_info v1/load_lora_adapter v1/unload_lora_adapter pause resume"
    b" is_paused scale_elastic_ep is_scaling_elastic_ep start_profile stop_profile tokenizer_info"
    b" invocations ping load docs redoc metrics openapi.json inference/v1/generate update_weights"
    b" init_weight_transfer_engine get_world_size abort_requests v1/models/x"
).split()

METHODS = b"GET POST PUT DELETE PATCH HEAD OPTIONS TRACE CONNECT PROPFIND get post Post".split()

PAGES = (
    b"/health /health/live /health/ready /v1/models /models /openapi.json /metrics /running"
    b" /control/status /nothing /events /logs"
).split()

SPICE = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"\r\n\r\n", b"0\r\n\r\n",
    b"\r\nContent-Length: 5", b"\r\nTransfer-Encoding: chunked", b"\r\n ", b"HTTP/1.1",
    b"\r\nConnection: close", b"\r\nConnection: upgrade\r\nUpgrade: h2c", b"\xff", b"%2f", b"%00",
    b"POST /sleep?level=1 HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.0\r\n\r\n", b"\x0b", b"\x7f",
    b"\r\nExpect: 100-continue", b"ffffffffffffffff", b"-1", b"\xc2\xa0", b"/../", b"//",
)  # fmt: skip


# Transfer-Encoding that is not exactly "chunked", or is more than once.
CODINGS = (
    b"xchunked", b"chunked, identity", b"identity, chunked", b"\x0bchunked",
    b"chunked\x0b", b"chunked\x00", b'"chunked"', b"gzip, chunked", b"chunked;q=1",
    b"chunked\r\n chunked", b"identity", b"", b"chunked,", b",chunked",
)  # fmt: skip


def bad_chunks(body: bytes) -> list[bytes]:
    size = b"%x" % len(body)
    good = b"%b\r\n%b\r\n" % (size, body)
    return [
        b"%b\n%b\n0\n\n" % (size, body),
        b"%b\r\n%b\n0\r\n\r\n" % (size, body),
        b"0x" + good + b"0\r\n\r\n",
        b"-" + good + b"0\r\n\r\n",
        b"+" + good + b"0\r\n\r\n",
        b"fffffffffffffffff" + good,
        b"f" * 16 + b"\r\n" + body,
        b"100000000000000" + good + b"0\r\n\r\n",
        b" " + good + b"0\r\n\r\n",
        size + b";a\nb\r\n" + body + b"\r\n0\r\n\r\n",
        size + b";" + b"a" * 20_000 + b"\r\n" + body + b"\r\n0\r\n\r\n",
        b"%x\r\n%bXX0\r\n\r\n" % (len(body), body),
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) - 1, body),
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) + 2, body),
        good + b"0\r\nContent-Length: 5\r\n\r\n",
        good + b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
        good + b"0\r\nX: y\0\r\n\r\n",
        good + b"\r\n0\r\n\r\n",
        good + b"0;\n\r\n\r\n",
    ]


@dataclass
class Case:
    """``valid``: nothing but requests that must all be answered. ``pieces`` are written one after
    the other; ``leaves``: the client goes away after the last, without reading."""

    lane: str
    number: int
    kind: str
    data: bytes
    valid: bool = False
    leaves: bool = False
    pieces: list[bytes] = field(default_factory=list)


@dataclass
class Lane:
    """One model that has this name only in this lane; ``secret``: the key that is asked for."""

    model: str
    secret: bytes | None = None


class Maker:
    """Makes one case."""

    def __init__(self, lane: Lane, number: int, seed: int) -> None:
        self.lane = lane
        self.number = number
        self.random = random.Random(f"{seed}/{lane.model}/{number}")
        self._made = 0

    def case(self) -> Case:
        kinds: dict[str, tuple[int, Callable[[], bytes]]] = {
            "valid": (22, self.valid),
            "pipeline": (10, self.pipeline),
            "forbidden": (18, self.forbidden),
            "smuggle": (14, self.smuggle),
            "oversize": (3, self.oversize),
            "mutated": (26, self.mutated),
            "noise": (3, self.noise),
        }
        names = list(kinds)
        kind = self.random.choices(names, [weight for weight, _ in kinds.values()])[0]
        case = Case(self.lane.model, self.number, kind, kinds[kind][1]())
        case.valid = kind in ("valid", "pipeline")
        if self.random.random() < 0.12:
            case.leaves = True
            case.valid = False
            case.kind += ", cut"
            case.data = case.data[: self.random.randint(1, len(case.data))]
        case.pieces = self._pieces(case.data)
        return case

    def _pieces(self, data: bytes) -> list[bytes]:
        way = self.random.random()
        if way < 0.5:
            return [data]
        if way < 0.6 and len(data) < 600:
            return [data[at : at + 1] for at in range(len(data))]
        count = min(self.random.randint(2, 12), len(data))
        cuts = sorted(self.random.sample(range(1, len(data)), count - 1)) if len(data) > 1 else []
        return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]

    # ---- requests that are right ----------------------------------------------------------------

    def pick(self, *choices: bytes) -> bytes:
        return self.random.choice(choices)

    def mark(self) -> str:
        self._made += 1
        return f"{self.number}-{self._made}"

    def head(self, method: bytes, target: bytes, *headers: bytes, version: bytes = b"1.1") -> bytes:
        lines = [b"%b %b HTTP/%b" % (method, target, version), b"Host: gateway", *headers]
        if self.lane.secret is not None:
            way = self.pick(b"Authorization: Bearer ", b"x-api-key: ")
            lines.append(way + self.lane.secret)
        return b"\r\n".join([*lines, b"", b""])

    def some_headers(self) -> list[bytes]:
        some = (
            b"X-Request-Id: client-%d" % self.number, b"Accept: */*", b"X-Thing: a, b;c=\"d\"",
            b"X-Latin: caf\xe9", b"Cookie: a=b", b"TE: trailers", b"X-Empty:", b"X-Tab:\tx\ty\t",
            b"Connection: keep-alive, x-hop\r\nX-Hop: 1", b"Expect: 100-continue",
            b"Origin: http://page.example", b"X-Request-Timeout: 20", b"User-Agent: fuzz/1",
        )  # fmt: skip
        return self.random.sample(some, self.random.randint(0, 3))

    def model_name(self) -> str:
        return self.random.choice((self.lane.model, self.lane.model, f"org/{self.lane.model}"))

    def json_body(self) -> bytes:
        body: dict[str, object] = {"model": self.model_name(), "mark": self.mark()}
        if self.random.random() < 0.3:
            body["messages"] = [{"role": "user", "content": "x" * self.random.randint(0, 300)}]
        if self.random.random() < 0.3:
            body["stream"] = True
        return json.dumps(body, indent=self.random.choice((None, 1))).encode()

    def chunked(self, body: bytes) -> bytes:
        out = b""
        while body:
            size = self.random.randint(1, len(body))
            form = self.pick(b"%x", b"%X", b"%04x", b"%x;ext=1", b'%x;a="b"')
            out += form % size + b"\r\n" + body[:size] + b"\r\n"
            body = body[size:]
        return out + self.pick(b"0\r\n\r\n", b"000\r\n\r\n", b"0\r\nX-Trailer: 1\r\n\r\n")

    def post(self, *headers: bytes) -> bytes:
        path = self.pick(
            b"/v1/chat/completions", b"/v1/completions", b"/v/chat/completions", b"/v1/embeddings",
            b"/completions", b"/v1/responses", b"/v1/messages", b"/rerank", b"/tokenize",
            b"/v1/classify", b"/v1/score?x=1",
            b"/upstream/%b/v1/completions" % self.lane.model.encode(),
        )  # fmt: skip
        body = self.json_body()
        more = [*self.some_headers(), *headers]
        if self.random.random() < 0.3:
            chunked = b"Transfer-Encoding: " + self.pick(b"chunked", b"Chunked")
            return self.head(b"POST", path, *more, chunked) + self.chunked(body)
        return self.head(b"POST", path, *more, b"Content-Length: %d" % len(body)) + body

    def upload(self, *headers: bytes) -> bytes:
        size = self.random.choice((0, 10, 5000, 200_000))
        parts = [
            b'Content-Disposition: form-data; name="model"\r\n\r\n'
            + self.model_name().encode(),
            b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
            + self.mark().encode() + b"\0" * size,
        ]  # fmt: skip
        self.random.shuffle(parts)
        edge = b"edge%d" % self.number
        body = b"".join(b"--%b\r\n%b\r\n" % (edge, part) for part in parts) + b"--%b--\r\n" % edge
        form = b"Content-Type: multipart/form-data; boundary=" + edge
        path = self.pick(b"/v1/audio/transcriptions", b"/audio/translations")
        return self.head(b"POST", path, form, *headers, b"Content-Length: %d" % len(body)) + body

    def page(self, *headers: bytes) -> bytes:
        pages = [path for path in PAGES if path not in (b"/events", b"/logs")]
        method = self.pick(b"GET", b"GET", b"OPTIONS")
        return self.head(method, self.random.choice(pages), *headers)

    def read(self, *headers: bytes) -> bytes:
        own = b"/upstream/%b/" % self.lane.model.encode()
        # the mark makes it one of its kind
        path = own + self.pick(b"health", b"v1/models", b"version") + b"?m=" + self.mark().encode()
        return self.head(b"GET", path, *self.some_headers(), *headers)

    def one(self, *headers: bytes) -> bytes:
        makers = (self.post, self.upload, self.page, self.read)
        return self.random.choices(makers, (70, 8, 12, 10))[0](*headers)

    def valid(self) -> bytes:
        if self.random.random() < 0.1:
            body = self.json_body()
            length = b"Content-Length: %d" % len(body)
            return self.head(b"POST", b"/v1/completions", length, version=b"1.0") + body
        first = b"".join(self.one() for _ in range(self.random.randint(0, 2)))
        return first + self.one(b"Connection: close")

    def pipeline(self) -> bytes:
        count = self.random.randint(3, 24)
        empty = self.pick(b"", b"\r\n")
        return b"".join(self.one() + empty for _ in range(count)) + self.one(b"Connection: close")

    # ---- requests that must go nowhere ----------------------------------------------------------

    def forbidden(self) -> bytes:
        path = self.disguise(self.random.choice(FORBIDDEN))
        method = self.random.choice(METHODS)
        body = self.json_body() if self.random.random() < 0.5 else b""
        bad = self.head(method, path, *self.some_headers(), b"Content-Length: %d" % len(body))
        if self.lane.secret is not None and self.random.random() < 0.5:
            return self.thief()
        return bad + body + (self.post(b"Connection: close") if method != b"CONNECT" else b"")

    def thief(self) -> bytes:
        """A right request with a wrong key or none."""
        assert self.lane.secret is not None
        secret = self.lane.secret
        wrong = self.pick(b"", b"x", secret[:-1], secret + b"x", secret.swapcase(), b"\xe9")
        return self.post().replace(secret, wrong) + self.post().replace(secret, wrong)

    def disguise(self, name: bytes) -> bytes:
        """A path that some reader might take for the engine's endpoint ``name``."""
        own = b"/upstream/%b" % self.lane.model.encode()
        base = self.pick(b"", b"/v1", own, own + b"/v1", b"/v1/chat/completions/..", b"/v1/..",
                         b"/upstream/../" + self.lane.model.encode(),
                         own + b"/v1/completions/../..",
                         b"/upstream/" + self.encode(self.lane.model.encode()))  # fmt: skip
        slash = self.pick(b"/", b"/", b"//", b"/./", b"/%2f", b"\\", b"/;/", b"/%2e%2e/", b"/..;/")
        name = self.pick(
            name, name, self.encode(name), self.encode(self.encode(name)), name.upper()
        )
        tail = self.pick(b"", b"", b"?level=1", b"/", b"%00", b";x", b"#x", b"%20", b"%0d%0a", b".")
        path = base + slash + name + tail
        if self.random.random() < 0.15:
            path = self.pick(b"http://engine", b"http://gateway:80", b"//engine", b"unix:") + path
        return path

    def encode(self, text: bytes) -> bytes:
        out = [
            (b"%%%02x" % byte if self.random.random() < 0.5 else b"%%%02X" % byte)
            if self.random.random() < 0.5
            else bytes([byte])
            for byte in text
        ]
        return b"".join(out)

    # ---- requests that readers read differently -------------------------------------------------

    def smuggle(self) -> bytes:
        hidden = self.pick(
            b"POST /sleep?level=1 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
            self.post(),
        )
        body = self.json_body()
        size = b"%d" % len(body)
        whole, chunks = body + hidden, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        length = b"Content-Length: " + size
        variants: tuple[tuple[list[bytes], bytes], ...] = (
            ([length, b"Transfer-Encoding: chunked"], chunks + hidden),
            ([b"Transfer-Encoding: chunked", length], chunks + hidden),
            ([length, b"Content-Length: %d" % len(whole)], whole),
            ([length, length], whole),
            ([b"Content-Length: %b, %b" % (size, size)], whole),
            ([b"Content-Length: +" + size], whole),
            ([b"Content-Length: -" + size], whole),
            ([b"Content-Length: 0x%x" % len(body)], whole),
            ([b"Content-Length: %b " % size[:1] + size[1:]], whole),
            ([b"Content-Length: " + b"9" * 30], whole),
            ([b"Content-Length : " + size], whole),
            ([b"Content-Length:\x0b" + size], whole),
            ([b"Content-Length:"], whole),
            ([b" Content-Length: " + size], whole),
            ([b"X: y\r\n " + length], whole),
            ([b"X: y\n" + length], whole),
            ([b"X: y\r" + length], whole),
            ([b"X: y\0", length], whole),
            ([b"Content_Length: " + size], whole),
            ([length, b"Connection: content-length"], whole),
            ([b"Connection: transfer-encoding", b"Transfer-Encoding: chunked"], chunks + hidden),
            *(
                ([b"Transfer-Encoding: " + value], chunks + hidden)
                for value in CODINGS
            ),
            ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], chunks + hidden),
            ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"], chunks + hidden),
            ([b"Transfer-Encoding : chunked"], chunks + hidden),
            ([b"Transfer_Encoding: chunked"], chunks + hidden),
            *(([b"Transfer-Encoding: chunked"], bad + hidden) for bad in bad_chunks(body)),
        )  # fmt: skip
        headers, tail = self.random.choice(variants)
        version = self.pick(b"1.1", b"1.1", b"1.1", b"1.0")
        return self.head(b"POST", b"/v1/completions", *headers, version=version) + tail

    # ---- too much, and anything -----------------------------------------------------------------

    def oversize(self) -> bytes:
        big = b"x" * self.random.randint(15_000, 40_000)
        body = self.json_body()
        length = b"Content-Length: %d" % len(body)
        many = [b"X-%d: y" % at for at in range(self.random.choice((500, 3000)))]
        huge = b"%x\r\n" % (MAX_BODY + 1) + b" " * (MAX_BODY + 1)
        return self.random.choice(
            (
                self.head(b"POST", b"/v1/completions", b"X-Big: " + big, length) + body,
                self.head(b"POST", b"/v1/completions?" + big, length) + body,
                self.head(b"POST", b"/v1/completions", *many, length) + body,
                self.head(b"POST", b"/v1/completions", b"Content-Length: %d" % (MAX_BODY + 1)),
                self.head(b"POST", b"/v1/completions", b"Content-Length: " + b"1" + b"0" * 17),
                self.head(b"POST", b"/v1/completions", b"Transfer-Encoding: chunked") + huge,
                self.head(b"POST", b"/v1/completions", b"Content-Length: %d" % MAX_BODY)
                + b" " * MAX_BODY,
                big * 3,
                b"GET /" + big * 3,
            )
        )

    def noise(self) -> bytes:
        return self.random.choice(
            (
                self.random.randbytes(self.random.randint(1, 2000)),
                b"GET /health\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self.random.randbytes(40),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + self.random.randbytes(500),
                b"\r\n" * 200 + self.one(b"Connection: close"),
                self.head(b"GET", b"/events") + self.one(),
                self.head(b"GET", b"/logs/stream/" + self.lane.model.encode()),
                self.head(b"GET", b"*") + self.one(),
            )
        )

    def mutated(self) -> bytes:
        data = bytearray(self.random.choice((self.valid, self.pipeline, self.smuggle, self.post))())
        for _ in range(self.random.choice((1, 1, 1, 2, 3, 8))):
            # heads are where it matters: most changes fall near the beginning
            near = self.random.random() < 0.6
            at = self.random.randrange(min(len(data), 300) if near else len(data))
            to = min(len(data), at + self.random.randint(1, 12))
            match self.random.randrange(6):
                case 0:
                    data[at] ^= 1 << self.random.randrange(8)
                case 1:
                    data[at] = self.random.randrange(256)
                case 2:
                    data[at:at] = self.random.choice(SPICE)
                case 3:
                    del data[at:to]
                case 4:
                    data[at:at] = data[at:to] * self.random.randint(1, 3)
                case _:
                    other = self.random.randrange(len(data))
                    data[at:to] = data[other : other + to - at]
            if not data:
                return b"\n"
        return bytes(data)
