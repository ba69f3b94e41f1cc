"""StateStore: the rules that the file and the twin keep alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llmux.drivers.store import VERSION, FileStateStore
from llmux.errors import StateFileError
from llmux.ports import StateStore
from tests.twins.disk import MemoryStore


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    return MemoryStore() if request.param == "memory" else FileStateStore(str(tmp_path / "state"))


class TestStateStore:
    def test_empty_at_first(self, store: StateStore) -> None:
        assert store.load() == {}

    def test_the_last_document_wins(self, store: StateStore) -> None:
        store.save({"models": {"alpha": {"pid": 7}}, "n": 1})
        store.save({"models": {}})
        assert store.load() == {"models": {}}

    def test_what_cannot_be_used_is_put_aside_and_said(self, store: StateStore) -> None:
        store.save({"n": 1})
        said = store.put_aside("n is odd")
        assert re.match(r"cannot read the state file .*: n is odd", str(said))
        assert store.load() == {}
        store.save({"n": 2})
        assert store.load() == {"n": 2}


class TestTheFile:
    @pytest.mark.parametrize(
        ("content", "cause"),
        [
            ("", "Expecting value"),
            ("{", "Expecting"),
            ("[]", "not a state file"),
            ('{"version": "1"}', "not a state file"),
            ('{"version": 1}', "holds no state"),
            (json.dumps({"version": VERSION + 1, "state": {}}), "newer llmux"),
        ],
    )
    def test_one_that_cannot_be_used_says_why(
        self, tmp_path: Path, content: str, cause: str
    ) -> None:
        path = tmp_path / "state"
        path.write_text(content)
        with pytest.raises(StateFileError, match=cause):
            FileStateStore(str(path)).load()

    def test_a_failed_save_leaves_the_old_document_whole(self, tmp_path: Path) -> None:
        store = FileStateStore(str(tmp_path / "state"))
        store.save({"n": 1})
        with pytest.raises(StateFileError, match="cannot write"):
            store.save({"n": object()})
        assert store.load() == {"n": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["state"]

    def test_only_its_owner_may_read_it(self, tmp_path: Path) -> None:
        FileStateStore(str(tmp_path / "state")).save({})
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600
