"""From text to a tree with places: what is no YAML or JSON is named where it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmux.config.files.documents import MAX_DEPTH, MAX_FILE_BYTES, parse_text, read_text
from llmux.config.files.marks import Items, Kind, Node, ParseError, Scalar, Table
from llmux.config.files.sources import Candidate, Sources, read_sources

TABS = " (YAML is indented with spaces, never with tabs)"
MAPPING = " (check the indentation, and quote text that contains a colon and a space)"
DEEP = "the values are nested too deeply"
YAML = [
    ("a: b: c", "1:5", f"mapping values are not allowed here{MAPPING}"),
    ("a:\n\t- b", "2:1", rf"found character '\t' that cannot start any token{TABS}"),
    ("a: [1,\n2", "2:2", ("expected ',' or ']', but got '<stream end>', while parsing a flow"
     " sequence that starts in line 1")),
    ("a: {b", "1:6", "expected ',' or '}', but got '<stream end>'"),
    ("x: y\na: \x01", "2:4", "the character U+0001 is not allowed in YAML"),
    ("\x01", "1:1", "the character U+0001 is not allowed in YAML"),
    ('a: "\\UFFFFFFFF"', "1:7", "an escape or a number here is out of range"),
    ('a: "\\U00110000"', "1:7", "an escape or a number here is out of range"),
    ("a: 1\n---\nb: 2", "2:1", ("expected a single document in the stream, but found another"
     " document")),
    ("[" * 700, "1:1", DEEP),
    ("{1: 2]", "1:6", "expected ',' or '}', but got ']'"),
]  # fmt: skip
JSON = [
    ("[1] x", "1:5", "nothing may follow the closing bracket"),
    ("{1: 2}", "1:2", "expected a key in double quotes"),
    ('{"a" 1}', "1:6", 'expected a ":" after the key'),
    ('{"a": [1 2}', "1:10", 'expected a comma or "]"'),
    ('{"]": {"\\"": [[1], 2], "a": {} "x"', "1:32", 'expected a comma or "}"'),
    ("nul", "1:1", "expecting value"),
    ("[" * 100_000, "1:1", DEEP),
]


def problem(text: str, file: str) -> tuple[str, str]:
    with pytest.raises(ParseError) as caught:
        parse_text(text, file)
    (fault,) = caught.value.faults
    assert fault.path == ()
    return str(fault.mark), fault.message


@pytest.mark.parametrize(("text", "place", "message"), YAML)
def test_what_is_no_yaml(text: str, place: str, message: str) -> None:
    where, said = problem(text, "c.yaml")
    assert (where, said) == (f"c.yaml:{place}", f"cannot parse: {message}")


@pytest.mark.parametrize(("text", "place", "message"), JSON)
def test_what_is_no_json(text: str, place: str, message: str) -> None:
    where, said = problem(text, "c.json")
    assert (where, said.partition(": ")[0]) == (f"c.json:{place}", "cannot parse JSON")
    assert said.partition(": ")[2].removeprefix("illegal trailing comma before end") in (
        message,
        "",
    )


def values(node: Node | None) -> object:
    match node:
        case Table(entries=entries):
            return {entry.key: values(entry.value) for entry in entries}
        case Items(items=items):
            return [values(item) for item in items]
        case Scalar(kind=kind, text=text):
            return text if kind is Kind.STRING else (kind.name, text)
    return node


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ('\n {"a":\t1e5, "b": "\\ud83d\\ude00"}', {"a": ("NUMBER", "1e5"), "b": "\U0001f600"}),
        ("{a: [1.5, .5e-3, 1.e+2, '1e5', 1e, NaN, -Infinity, 0x1F]}",
         {"a": [("NUMBER", "1.5"), ("NUMBER", ".5e-3"), ("NUMBER", "1.e+2"), "1e5", "1e",
                ("NUMBER", "NaN"), ("NUMBER", "-Infinity"), ("NUMBER", "0x1F")]}),
        ("[2026-01-01, =, <<, yes, ~]",
         ["2026-01-01", "=", "<<", ("BOOLEAN", "yes"), ("NULL", "~")]),
        ("a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], z: 3}\nd: {y: 4, <<: *b}",
         {"a": {"x": ("NUMBER", "1"), "y": ("NUMBER", "1")},
          "b": {"y": ("NUMBER", "2"), "z": ("NUMBER", "2")},
          "c": {"z": ("NUMBER", "3"), "x": ("NUMBER", "1"), "y": ("NUMBER", "1")},
          "d": {"y": ("NUMBER", "4"), "z": ("NUMBER", "2")}}),
    ],
)  # fmt: skip
def test_values_as_they_were_written(text: str, expected: object) -> None:
    tree, faults = parse_text(text, "c.yaml")
    assert (values(tree), faults) == (expected, ())


def test_what_has_no_meaning_is_named_and_the_rest_is_read() -> None:
    text = (
        "a: !!binary x\n"
        "b: !own [1]\n"
        "c: !!set {x}\n"
        '"\\ud800": 1\n'
        'd: "\\ud800"\n'
        "? [1]\n: 1\n"
        "<<: [7, {e: 1}, [x]]\n"
        "f: 1\n"
        "g: 2\n"
        "f: {h: 1, h: 2}\n"
    )
    tree, faults = parse_text(text, "c.yaml")
    tag = "the YAML tag {} has no meaning here; remove it"
    word = "a key must be one word of text"
    assert [(f.mark.line, f.mark.column, f.path, f.message) for f in faults] == [
        (1, 4, ("a",), tag.format("!!binary")),
        (2, 4, ("b",), tag.format("!own")),
        (3, 4, ("c",), tag.format("!!set")),
        (4, 1, (), word),
        (5, 4, ("d",), "cannot use an unpaired surrogate escape; write the character itself"),
        (6, 3, (), word),
        (8, 6, ("<<",), '"<<" merges mappings, got the number 7'),
        (8, 17, ("<<",), '"<<" merges mappings, got a list'),
        (11, 11, ("f", "h"), 'the key "h" is here twice (first in line 11); remove one of them'),
        (11, 1, ("f",), 'the key "f" is here twice (first in line 9); remove one of them'),
    ]
    nothing, one = ("NULL", ""), ("NUMBER", "1")
    read = {"a": nothing, "b": nothing, "c": nothing, "d": nothing, "f": one, "g": ("NUMBER", "2")}
    assert values(tree) == {**read, "e": one}


def test_a_number_may_have_more_digits_than_python_takes() -> None:
    many = "1" * 5000
    tree, faults = parse_text(f'{{"port": {many}}}', "c.json")
    assert (values(tree), faults) == ({"port": ("NUMBER", many)}, ())


def test_depth_is_bounded_exactly() -> None:
    assert MAX_DEPTH == 32
    whole = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
    assert parse_text(whole, "c.yaml")[1] == ()
    _, (fault,) = parse_text(f"[{whole}]", "c.yaml")
    assert (fault.message, fault.mark.column) == (DEEP, MAX_DEPTH + 2)


@pytest.mark.parametrize(("more", "fits"), [(0, True), (1, False)])
@pytest.mark.parametrize("place", ["file", "pipe"])
def test_a_file_and_a_pipe_are_read_up_to_a_bound(
    more: int, fits: bool, place: str, tmp_path: Path
) -> None:
    """``llmux check <(program)`` reads a pipe. An open file stands for it: it is read the same."""
    file = tmp_path / "c.yaml"
    file.touch()
    os.truncate(file, MAX_FILE_BYTES + more)
    with file.open() as stream:
        path = file if place == "file" else Path(f"/dev/fd/{stream.fileno()}")
        if fits:
            assert read_text(path) == "\0" * MAX_FILE_BYTES
            return
        with pytest.raises(ParseError) as caught:
            read_text(path)
    (fault,) = caught.value.faults
    assert str(fault.mark) == f"{path}:1:1"
    assert fault.message == f"cannot read the file: larger than {MAX_FILE_BYTES} bytes"


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "/dev/stdin"])
def test_what_a_program_writes_is_read_from_its_pipe(name: str, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"port: 1")
    os.close(write)
    stdin = os.dup(0)
    os.dup2(read, 0)
    try:
        assert read_text(Path(name.format(read))) == "port: 1"
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(read)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ParseError, match="not a plain file"):
        read_text(tmp_path / "fifo")


@pytest.mark.parametrize(
    ("data", "place"),
    [(b"\xff", "1:1"), (b"a: b\nc: \xff", "2:4"), (b"\xef\xbb\xbfa\n\xff", "2:1")],
)
def test_bytes_that_are_no_text_are_named(data: bytes, place: str, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(data)
    with pytest.raises(ParseError, match="not UTF-8") as caught:
        read_text(tmp_path / "c")
    assert str(caught.value.faults[0].mark) == f"{tmp_path}/c:{place}"


def test_a_name_that_no_file_can_have_is_a_problem_as_well(tmp_path: Path) -> None:
    with pytest.raises(ParseError, match="cannot read the file: embedded null byte"):
        read_text(Path("a\0b"))
    (tmp_path / "c").write_bytes(b"\xef\xbb\xbfa")
    assert read_text(tmp_path / "c") == "a", "without the byte order mark"


# --- drop-ins -------------------------------------------------------------------------------------


@pytest.fixture
def main(tmp_path: Path) -> Path:
    files = {
        "config.yaml": "port: 1\npolicy: {a: 1, b: 1}\nmodels: {m: 1}\nwarmup: 1\n",
        "conf.d/20-b.yaml": "port: 3\npolicy:\nmodels: {n: 1, m: 2}\n",
        "conf.d/10-a.yaml": "policy: {b: 2, c: 2}\nnew: ~\nport: 2\n",
        "conf.d/.hidden.yaml": "port: 9",
        "conf.d/x.yaml.dpkg-old": "port: 9",
    }
    (tmp_path / "conf.d").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path / "config.yaml"


def messages(sources: Sources) -> list[str]:
    return [f"{fault.mark} {fault.path}: {fault.message}" for fault in sources.faults]


def test_drop_ins_are_merged_in_the_order_of_their_names(main: Path) -> None:
    read = read_sources(main, None)
    names = ["config.yaml", "conf.d/10-a.yaml", "conf.d/20-b.yaml"]
    assert read.files == tuple(str(main.parent / name) for name in names)

    def number(text: str) -> tuple[str, str]:
        return "NUMBER", text

    assert values(read.root) == {
        "port": number("3"),
        "policy": {"a": number("1"), "b": number("2"), "c": number("2")},
        "models": {"m": number("1"), "n": number("1")},
        "warmup": number("1"),
        "new": ("NULL", "~"),
    }
    assert str(read.root.mark) == f"{main}:1:1"
    assert messages(read) == [
        (
            f"{main.parent}/conf.d/20-b.yaml:3:16 ('models', 'm'): the model \"m\" is already in"
            f" {main}:3:10; keep it in one of the two files"
        )
    ]
    assert read.complete


def test_one_bad_file_does_not_hide_the_rest(main: Path) -> None:
    folder = main.parent / "conf.d"
    (folder / "10-a.yaml").write_text("a: [")
    (folder / "15.yaml").write_text("[1]")
    (folder / "16.yaml").write_text("# nothing\n")
    read = read_sources(main, None)
    assert not read.complete
    assert [message.partition(": ")[2] for message in messages(read)][1:] == [
        "expected a mapping with keys such as models, policy and port, got a list",
        'the model "m" is already in ' + f"{main}:3:10; keep it in one of the two files",
    ]
    assert values(read.root)["port"] == ("NUMBER", "3")  # type: ignore[index]  # a mapping


def test_a_candidate_takes_the_place_of_a_file_or_is_one_more(main: Path, tmp_path: Path) -> None:
    new = tmp_path / "candidate"
    new.write_text("port: 7\nbad: {x: 1, x: 2}\n")
    folder = main.parent / "conf.d"

    def read(target: Path, conf_d: Path | None = None) -> Sources:
        return read_sources(main, conf_d, Candidate(new, target))

    def port(sources: Sources) -> str:
        return values(sources.root)["port"][1]  # type: ignore[index, no-any-return]

    assert port(read(main)) == "3"
    assert port(read(folder / "20-b.yaml")) == "7"
    assert port(read(folder / "15.yaml")) == "3"
    assert port(read(folder / "30.yaml")) == "7"
    assert read(folder / "15.yaml").files[2] == str(folder / "15.yaml")
    twice = messages(read(folder / "30.yaml"))[-1]
    assert twice.startswith(f"{folder}/30.yaml:2:13 ('bad', 'x'): ")
    for target in (folder / ".x.yaml", folder / "x.yml", main.with_name("other.yaml")):
        refused = read(target)
        assert messages(refused) == [
            (
                f"{target}:1:1 (): not a file of this configuration; expected {main} or"
                f" {folder}/NAME.yaml"
            )
        ]
        assert (refused.files, refused.complete, values(refused.root)) == ((), False, {})


def test_where_drop_ins_are_looked_for(main: Path) -> None:
    other = main.with_name("other.yaml")
    other.write_text("port: 5\n")
    assert read_sources(other, None).files == (str(other),)
    assert len(read_sources(other, main.parent / "conf.d").files) == 3
    absent = read_sources(other, main.parent / "absent")
    assert not absent.complete
    assert messages(absent) == [
        f"{main.parent}/absent:1:1 (): cannot list the folder: no such file or directory"
    ]
    assert values(absent.root) == {"port": ("NUMBER", "5")}
    (message,) = messages(read_sources(other, Path("a\0b")))
    assert message.endswith("cannot list the folder: embedded null byte")
    for drop_in in (main.parent / "conf.d").iterdir():
        drop_in.unlink()
    (main.parent / "conf.d").rmdir()
    assert read_sources(main, None).files == (str(main),)
    assert read_sources(main, None).complete
