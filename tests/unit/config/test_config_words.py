"""Each parser by itself: what it takes, what it makes of that, and what it says of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from llmux.config import addresses, keys, parse, quantities, sections
from llmux.config.files.documents import parse_text
from llmux.config.files.marks import (
    Fault,
    Kind,
    Mark,
    Marks,
    Node,
    ParseError,
    Scalar,
    describe,
    dotted,
    quote,
)
from llmux.config.schema import Limits

LABEL = "a" * 63
LONG_HOST = ".".join([LABEL] * 3) + "." + "b" * 61  # 253 characters


def node_of(text: str) -> Node:
    node, faults = parse_text(f"x: {text}\n", "c.yaml")
    assert not faults
    assert node is not None
    return node.entries[0].value  # type: ignore[union-attr]  # a mapping


def said(parser: Any, node: Node) -> str:
    """The one problem, with its path in the value."""
    with pytest.raises(ParseError) as caught:
        parser(node)
    (fault,) = caught.value.faults
    return f"{dotted(fault.path)}: {fault.message}" if fault.path else fault.message


LISTEN, ORIGIN, NETWORK = addresses.listen_address, addresses.origin, addresses.network
SECRET, ALIAS, MODE, HOST = parse.secret_path, parse.alias, parse.file_mode, addresses.host_name
FRACTION = quantities.number(-0.5, 2)
WHOLE = quantities.integer(-(10**60), 10**60)
TEN = quantities.duration("s", 0, 10)
ENGINE, LIMITS = keys.MODEL.parsers["engine"], sections.limits

TAKEN: list[tuple[Any, str, Any]] = [
    *((LISTEN, text, text) for text in (
        "1.2.3.4:1", "1.2.3.4:65535", f"{LABEL}.x-1.org:80", "a:80", "unix:/" + "x" * 106,
    )),
    (LISTEN, "'[2001:db8::1]:00080'", "[2001:db8::1]:00080"),
    (ORIGIN, "https://Chat.Example.ORG", "https://chat.example.org"),
    (ORIGIN, f"http://{'a' * 255}", f"http://{'a' * 255}"),
    (ORIGIN, "'*'", "*"),
    (HOST, "LLM.Example.org", "llm.example.org"),
    (HOST, LONG_HOST, LONG_HOST),
    (HOST, "'*'", "*"),
    (NETWORK, "any", ("0.0.0.0/0", "::/0")),
    (NETWORK, "link-local", ("169.254.0.0/16", "fe80::/64")),
    (NETWORK, "multicast", ("224.0.0.0/4", "ff00::/8")),
    (NETWORK, "2001:db8::5/32", ("2001:db8::/32",)),
    *((parse.boolean, text, True) for text in ("true", "Yes", "ON")),
    *((parse.boolean, text, False) for text in ("false", "no", "Off")),
    (parse.text, "a b", "a b"),
    *((MODE, f"'{text}'", text) for text in ("660", "0660", "777", "0000")),
    (SECRET, "/k", "/k"),
    (SECRET, "credential:a.b_c-1", "credential:a.b_c-1"),
    (parse.executable, "vllm", "vllm"),
    (parse.executable, "/opt/v", "/opt/v"),
    (parse.command, "vllm", ("vllm",)),
    (parse.command, "[/opt/v, serve, 1]", ("/opt/v", "serve", "1")),
    (parse.argument, "0.90", "0.90"),
    (parse.argument, "''", ""),
    (parse.model_path, "a.b/~c-d", "a.b/~c-d"),
    (ALIAS, "7", "7"),
    (ALIAS, "a" * 200, "a" * 200),
    *((parse.user_name, text, text) for text in ("_a", "a" * 31, "vllm-1_x$", "a" * 31 + "$")),
    (parse.one_or_more(parse.text, "[a]"), "a", ("a",)),
    (parse.one_or_more(parse.text, "[a]"), "[a, b]", ("a", "b")),
    (parse.environment, "{A: 1, _b2: x}", {"A": "1", "_b2": "x"}),
    (parse.gpus, "2", 2),
    (parse.gpus, "[3, 0]", (3, 0)),
    (ENGINE, "vllm", "vllm"),
    (LIMITS, "{memory_max: 64MiB}", Limits(memory_max=64 * 1024**2)),
    (LIMITS, "{memory_max: 1024TiB}", Limits(memory_max=1024**5)),
    (LIMITS, "{memory_max_share: 1, tasks_max: 16}", Limits(memory_max_share=1, tasks_max=16)),
    (LIMITS, "{tasks_max: 4194304}", Limits(tasks_max=4194304)),
    (FRACTION, "-0.5", -0.5), (FRACTION, ".5", 0.5), (FRACTION, "+1.", 1.0),
    (FRACTION, "20e-1", 2.0),
    (WHOLE, "9" * 40, int("9" * 40)), (WHOLE, "-1", -1), (WHOLE, "+0", 0),
    (TEN, "10s", 10.0), (TEN, "10", 10.0), (TEN, "2.5", 2.5), (TEN, "'1500ms'", 1.5),
    (quantities.duration("ms", 0, 60_000), "1m", 60_000.0),
    (quantities.duration("ms", 0, 60_000), "0.1s", 100.0),
    (quantities.size(0, 2048), "2KiB", 2048), (quantities.size(0, 2048), "0", 0),
    (quantities.size(0, 2048), "1.5 kB", 1500), (quantities.size(0, 2048), "0.0004 kB", 0),
]  # fmt: skip


@pytest.mark.parametrize(("parser", "text", "value"), TAKEN)
def test_what_is_taken(parser: Any, text: str, value: Any) -> None:
    found = parser(node_of(text))
    assert (found, type(found)) == (value, type(found))


OFFERED = '"127.0.0.1:3000", "[::1]:3000" or "unix:/run/llmux-gateway/http.sock"'
NO_ADDRESS = f"expected an address such as {OFFERED}, got "
TOO_LONG = "cannot listen on a socket path longer than 107 bytes"
NO_ORIGIN = 'expected an origin such as "https://chat.example.org" or "*", got '
NO_HOST = 'expected a host name such as "llm.example.org" or "*", got '
ELSEWHERE = "(the service runs in another directory; start the path with /)"
REFUSED = [
    (LISTEN, "unix:/" + "x" * 107, TOO_LONG),
    (LISTEN, "unix:/" + "ü" * 54, TOO_LONG),
    (LISTEN, "1.2.3.4:123456", f'{NO_ADDRESS}"1.2.3.4:123456"'),
    (LISTEN, "1.2.3.4:65536", 'expected a port from 1 to 65535 in "1.2.3.4:65536"'),
    (LISTEN, "'[1.2.3.4]:1'", f'{NO_ADDRESS}"[1.2.3.4]:1" ("[1.2.3.4]" is not a host)'),
    (LISTEN, f"a{LABEL}:1", f'{NO_ADDRESS}"a{LABEL}:1" ("a{LABEL}" is not a host)'),
    (LISTEN, "-a:1", f'{NO_ADDRESS}"-a:1" ("-a" is not a host)'),
    (LISTEN, "a-:1", f'{NO_ADDRESS}"a-:1" ("a-" is not a host)'),
    (LISTEN, "'::]:1'", f'{NO_ADDRESS}"::]:1" ("::]" is not a host)'),
    (LISTEN, "[1]", "expected an address, got a list"),
    (ORIGIN, f"http://{'a' * 256}", f"{NO_ORIGIN}{quote('http://' + 'a' * 256)}"),
    (ORIGIN, "1", "expected an origin, got the number 1 (put it in quotes)"),
    (HOST, f"{LONG_HOST}c", f"{NO_HOST}{quote(LONG_HOST + 'c')}"),
    (HOST, "a:80", f'{NO_HOST}"a:80"'),
    (HOST, "1", "expected a host name, got the number 1 (put it in quotes)"),
    (NETWORK, "300.0.0.0/8",
     ('expected a network such as "10.0.0.0/8", or one of any, localhost, link-local, multicast,'
     ' got "300.0.0.0/8"')),
    (NETWORK, "yes", "expected a network, got the boolean yes (put it in quotes)"),
    (parse.boolean, "'False'", 'expected true or false, got the text "False" (remove the quotes)'),
    (parse.boolean, "'yes'", 'expected true or false, got the text "yes"'),
    (parse.boolean, "{}", "expected true or false, got a mapping"),
    (parse.text, "' '", "expected text, got empty text"),
    (parse.text, r'"a\tb"', r'expected text without control characters, got "a\tb"'),
    (parse.text, r'"a\x7f"', r'expected text without control characters, got "a\u007f"'),
    (parse.text, "null", "expected text, got nothing"),
    (MODE, "'66'", 'expected a mode such as "0660", got "66"'),
    (MODE, "'1660'", 'expected a mode such as "0660", got "1660"'),
    (MODE, "0660", 'expected a mode such as "0660", got the number 0660 (put it in quotes)'),
    (SECRET, "/", 'expected an absolute path or credential:NAME, got "/"'),
    (SECRET, "credential:.a", 'expected an absolute path or credential:NAME, got "credential:.a"'),
    (parse.executable, "./v",
     f'expected a bare program name or an absolute path, got "./v" {ELSEWHERE}'),
    (parse.executable, "1",
     "expected the name or the absolute path of a program, got the number 1 (put it in quotes)"),
    (parse.command, "[bin/v, x]",
     f'expected a bare program name or an absolute path, got "bin/v" {ELSEWHERE}'),
    (parse.command, "[v, null]", "[1]: expected text, got nothing"),
    (parse.argument, r'"a\0"', "cannot use a null byte in an argument"),
    (parse.model_path, "~/m",
     ("expected a Hugging Face model id such as Qwen/Qwen3-0.6B or an absolute path, got"
     ' "~/m" (start the path with /)')),
    (parse.model_path, "'-m'", 'expected a model, got the option "-m"'),
    (ALIAS, "a" * 201, f"expected a name of up to 200 characters, got {quote('a' * 201)}"),
    (ALIAS, "' a'", 'expected a name of up to 200 characters, got " a"'),
    (ALIAS, r'"a\u2028b"', r'expected a name of up to 200 characters, got "a\u2028b"'),
    (parse.user_name, "a" * 32, f'expected the name of a system user, got "{"a" * 32}"'),
    (parse.user_name, "1", "expected a user name, got the number 1 (put it in quotes)"),
    (parse.listing(parse.text, ""), "a", 'expected a list, got the text "a"'),
    (parse.listing(parse.text, "[a]"), "a", 'expected a list such as [a], got the text "a"'),
    (parse.one_or_more(parse.text, "[a]"), "{a: 1}", "expected a list such as [a], got a mapping"),
    (parse.environment, "x", 'expected a mapping of variables to text, got the text "x"'),
    (parse.gpus, "[1, MIG-1]", f"[1]: {parse.NO_MIG}"),
    (parse.gpus, "[1, 0, 1]", "[2]: GPU 1 is here twice"),
    (parse.gpus, "[1, [2]]", "[1]: expected a GPU index from 0 to 63, got a list"),
    (parse.absolute_path, "1", "expected an absolute path, got the number 1 (put it in quotes)"),
    (ENGINE, "vlm", 'unknown engine "vlm"; there are: …'),
    (ENGINE, "1", "expected one of …"),
    (FRACTION, "2.0001", "expected a number from -0.5 to 2, got 2.0001"),
    (FRACTION, "-0.51", "expected a number from -0.5 to 2, got -0.51"),
    (FRACTION, "'x'", 'expected a number from -0.5 to 2, got the text "x"'),
    (quantities.number(0, 1, above=True), "0", "expected a number above 0 and up to 1, got 0"),
    (WHOLE, "9" * 41, f"expected a whole number from -{10**60} to {10**60}, got a number of 41…"),
    (quantities.integer(1, 2, "an n"), "3", "expected an n from 1 to 2, got 3"),
    (TEN, "11s", 'expected a duration from 0 to 10s, such as 10 or "10s", got 11s'),
    (TEN, "10.5", 'expected a duration from 0 to 10s, such as 10 or "10s", got 10.5'),
    (TEN, "1w", 'expected a duration from 0 to 10s, such as 10 or "10s", got "1w" (units: ms…'),
    (quantities.size(0, 2048), "'1'",
     ('expected a size from 0B to 2KiB, in bytes or with a unit, such as "20GiB", got the text "1"'
     " (remove the quotes, or add a unit inside them)")),
    (quantities.size(0, 2048), "1.5",
     ('expected a size from 0B to 2KiB, in bytes or with a unit, such as "20GiB", got 1.5'
     " (write whole bytes, or a unit)")),
    (quantities.size(0, 2048), "3kB",
     'expected a size from 0B to 2KiB, in bytes or with a unit, such as "20GiB", got 3kB'),
    (sections.eviction, "stopp", "expected {weights: ..., process: ...} or text such as…"),
    (sections.eviction, "retain+stopp", 'unknown word "stopp"; allowed: keep_running…'),
    (sections.eviction, "ofload+stop", 'unknown word "ofload"; allowed: …'),
    (sections.eviction, "7", "expected {weights: ..., process: ...} or text such as…"),
    (sections.eviction, "{weights: retain}", "process: missing key…"),
    (sections.ladder, "[]", "expected {weights: ..., process: ...} or text such as…"),
    (sections.ladder, "[retain+freeze, discard+freeze]",
     "discard+freeze takes the processes no further than retain+freeze; the order is …"),
    (LIMITS, "{memory_max: 67108863}", "memory_max: expected a size from 64MiB to 1024TiB,…"),
    (LIMITS, "{memory_max: 1125899906842625}", "memory_max: expected a size from 64MiB to…"),
    (LIMITS, "{memory_max_share: 0}", "memory_max_share: expected a number above 0 and up to 1…"),
    (LIMITS, "{memory_max_share: 1.01}", "memory_max_share: expected a number above 0 and…"),
    (LIMITS, "{tasks_max: 15}", "tasks_max: expected a whole number from 16 to 4194304, got 15"),
    (LIMITS, "{tasks_max: 4194305}", "tasks_max: expected a whole number from 16 to 4194304, g…"),
    (LIMITS, "7", "expected a mapping such as {memory_max: 64GiB, …"),
]  # fmt: skip


@pytest.mark.parametrize(("parser", "text", "message"), REFUSED)
def test_what_is_refused_and_why(parser: Any, text: str, message: str) -> None:
    found = said(parser, node_of(text))
    shown = message.removesuffix("…")
    assert found == shown if shown == message else found.startswith(shown)


def test_a_list_tells_of_each_wrong_item() -> None:
    with pytest.raises(ParseError) as caught:
        parse.listing(parse.text, "")(node_of("[1, a, 2]"))
    assert [fault.path for fault in caught.value.faults] == [(0,), (2,)]
    assert str(caught.value) == "; ".join(
        f"expected text, got the number {n} (put it in quotes)" for n in (1, 2)
    )
    with pytest.raises(ParseError) as caught:
        parse.environment(node_of("{1a: x, B: null, C: x, D: []}"))
    assert [fault.path for fault in caught.value.faults] == [("1a",), ("B",), ("D",)]


POLICIES = "fair, fifo, cost_aware, time_slice"


@pytest.mark.parametrize(
    ("word", "hint"), [("Fifo", ' (did you mean "fifo"?)'), ("round_robin", "")]
)
def test_a_word_that_is_nearly_right_is_guessed(word: str, hint: str) -> None:
    found = said(keys.POLICY.parsers["policy_type"], node_of(word))
    assert found == f"unknown word {quote(word)}; allowed: {POLICIES}{hint}"


@pytest.mark.parametrize(
    ("address", "parts"),
    [("[::1]:3000", ("::1", 3000)), ("a.b:1", ("a.b", 1)), ("unix:/run/x:1", None)],
)
def test_an_address_is_split_at_its_port(address: str, parts: tuple[str, int] | None) -> None:
    assert addresses.split_address(address) == parts


def test_networks_are_written_once_each() -> None:
    networks = "[localhost, 127.0.0.0/8, 10.0.0.1/8]"
    found = sections.limits(node_of(f"{{ip_address_deny: {networks}, ip_address_allow: any}}"))
    assert found.ip_address_deny == ("127.0.0.0/8", "::1/128", "10.0.0.0/8")
    assert found.ip_address_allow == ("0.0.0.0/0", "::/0")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("models", "qwen3-0.6b", "extra_args", 2), "models.qwen3-0.6b.extra_args[2]"),
        ((0, "a"), "[0].a"),
        (("a b", "-x", "é"), '"a b".-x."é"'),
        (("a..b", "org/m"), '"a..b"."org/m"'),
    ],
)
def test_paths_are_written_as_one_reads_them(path: tuple[str | int, ...], text: str) -> None:
    assert dotted(path) == text


def test_long_and_odd_texts_are_shown_in_one_short_line() -> None:
    assert quote("a" * 80) == f'"{"a" * 80}"'
    assert quote("a" * 81) == f'"{"a" * 77}..."'
    assert quote("é\n") == r'"\u00e9\n"'
    assert quote("é") == '"é"'

    def number(text: str) -> str:
        return describe(Scalar(Mark("c"), Kind.NUMBER, text))

    assert number("1" * 40) == f"the number {'1' * 40}"
    assert number("1" * 41) == f"the number {'1' * 37}..."
    assert describe(Scalar(Mark("c"), Kind.BOOLEAN, "yes")) == "the boolean yes"
    assert [describe(node_of(text)) for text in ("{}", "[]", "~", "x")] == [
        "a mapping", "a list", "nothing", 'the text "x"',
    ]  # fmt: skip


def test_a_problem_has_the_nearest_place_that_is_known() -> None:
    marks = Marks({("a",): Mark("c", 2, 3), ("a", "b", 0): Mark("c", 4, 5)}, Mark("c"))
    places = [marks.at(path) for path in (("a", "b", 0, "x"), ("a", "b"), ("a",), ("z", 1), ())]
    assert [(at.line, at.column) for at in places] == [(4, 5), (2, 3), (2, 3), (1, 1), (1, 1)]
    problem = Fault(Mark("c", 2, 3), ("b",), "no").under("a", 1).problem()
    assert str(problem) == "c:2:3: a[1].b: no"


GONE = [
    (keys.MODEL, "sleep_level", "3",
     ("write eviction: retain+cuda_suspend (or eviction: retain+stop, if the file was made for 0.3"
     " or older)")),
    (keys.MODEL, "sleep_level", "4", "write eviction: discard+checkpoint"),
    (keys.POLICY, "sleep_level", "[4]",
     ("write eviction: WEIGHTS+PROCESS (1 = offload+keep_running, 2 = discard+keep_running, 3 ="
     " retain+cuda_suspend, 4 = discard+checkpoint, 5 = retain+stop)")),
    (keys.MODEL, "gpu_memory_utilization", "0.7", "write gpu_memory: 0.7"),
    (keys.MODEL, "gpu_memory_utilization", "", "write gpu_memory: 0.9"),
    (keys.MODEL, "gpu_memory_utilization", "[1]", "write gpu_memory: 0.9"),
    (keys.MODEL, "dtype", "half", 'pass it to vLLM: extra_args: ["--dtype", "half"]'),
    (keys.MODEL, "dtype", "", "remove it (auto is the default), or pass --dtype in extra_args"),
    (keys.MODEL, "dtype", "[1]", "remove it (auto is the default), or pass --dtype in extra_args"),
    (keys.MODEL, "tensor_parallel_size", "1",
     "remove it (1 is the default), or pass --tensor-parallel-size in extra_args"),
    (keys.TOP, "admin_port", "1", "remove it: the control API is on the gateway's address"),
    (keys.TOP, "vllm_logging", "1",
     "remove it: vLLM's output always goes to the journal (llmux logs MODEL)"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "key", "value", "remedy"), GONE)
def test_a_key_of_an_earlier_version_says_what_to_write(
    spec: sections.Spec, key: str, value: str, remedy: str
) -> None:
    assert spec.gone[key](node_of(value)) == f"this key is gone; {remedy}"
