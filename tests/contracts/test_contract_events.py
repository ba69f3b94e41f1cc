"""EventStore: the rules that the file and the twin keep alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmux.drivers.event_file import EventFile
from llmux.errors import StateFileError
from llmux.ports import EventStore
from tests.twins.disk import MemoryEvents


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> EventStore:
    return MemoryEvents() if request.param == "memory" else EventFile(str(tmp_path / "events"))


class TestEventStore:
    def test_empty_at_first(self, store: EventStore) -> None:
        assert list(store.load()) == []

    def test_events_come_back_in_their_order(self, store: EventStore) -> None:
        events = [{"id": 1, "model": 'ä"\n'}, {"id": 2, "gpus": [0], "from": None}]
        for event in events:
            store.append(event)
        assert list(store.load()) == events

    def test_what_is_no_json_is_refused_and_harms_no_other(self, store: EventStore) -> None:
        store.append({"id": 1})
        with pytest.raises(StateFileError, match="cannot write"):
            store.append({"id": object()})
        store.append({"id": 3})
        assert list(store.load()) == [{"id": 1}, {"id": 3}]


class TestTheFile:
    def test_it_is_bounded_and_the_oldest_go(self, tmp_path: Path) -> None:
        store = EventFile(str(tmp_path / "events"), max_bytes=1000)
        for number in range(1, 501):
            store.append({"id": number})
        numbers = [event["id"] for event in store.load()]
        assert numbers == list(range(numbers[0], 501)) and len(numbers) > 50
        sizes = [path.stat().st_size for path in tmp_path.iterdir()]
        assert len(sizes) == 2 and max(sizes) <= 1000

    def test_the_next_process_goes_on_where_it_ended(self, tmp_path: Path) -> None:
        path = str(tmp_path / "events")
        EventFile(path).append({"id": 1})
        EventFile(path).append({"id": 2})
        assert [event["id"] for event in EventFile(path).load()] == [1, 2]

    def test_a_line_cut_short_or_damaged_is_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "events"
        path.write_bytes(b'{"id": 1}\n[]\n\xff\xfe\n' + b"[" * 20_000 + b'\n{"id": 2')
        store = EventFile(str(path))
        store.append({"id": 3})
        assert [event["id"] for event in store.load()] == [1, 3]

    @pytest.mark.parametrize(
        "damaged", ['{"id": NaN}', f'{{"id": {"9" * 4301}}}', f'{{"to": "{"m" * 65536}"}}']
    )
    def test_a_line_that_no_reader_takes_is_left_out_and_said(
        self, tmp_path: Path, damaged: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "events"
        path.write_text(f'{{"id": 1}}\n{damaged}\n{{"id": 3}}\n')
        assert [event["id"] for event in EventFile(str(path)).load()] == [1, 3]
        assert caplog.messages == [f"1 damaged lines of the events file {path} are left out"]

    def test_a_file_larger_than_allowed_is_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "events"
        path.write_bytes(b'{"id": 1}\n' * 200)
        store = EventFile(str(path), max_bytes=1000)
        store.append({"id": 2})
        assert path.read_bytes() == b'{"id":2}\n'
        assert [event["id"] for event in store.load()] == [2]

    def test_a_directory_that_is_gone_is_said_and_may_come_back(self, tmp_path: Path) -> None:
        directory = tmp_path / "run"
        store = EventFile(str(directory / "events"))
        assert list(store.load()) == []
        with pytest.raises(StateFileError, match=r"cannot write the events file .*No such file"):
            store.append({"id": 1})
        directory.mkdir()
        store.append({"id": 2})
        assert [event["id"] for event in store.load()] == [2]

    def test_a_file_that_cannot_be_read_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "events").mkdir()
        with pytest.raises(StateFileError, match="cannot read"):
            EventFile(str(tmp_path / "events")).load()

    def test_only_its_owner_may_read_it_and_no_link_is_followed(self, tmp_path: Path) -> None:
        EventFile(str(tmp_path / "events")).append({"id": 1})
        assert (tmp_path / "events").stat().st_mode & 0o777 == 0o600
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StateFileError):
            EventFile(str(tmp_path / "link")).append({"id": 1})
        assert not (tmp_path / "elsewhere").exists()
