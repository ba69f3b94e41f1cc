"""A full /run costs the notes, never the service."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from runtime_harness import begin_life, config_of, in_virtual_time, model

from llmux.core.states import ModelState
from llmux.errors import StateFileError
from llmux.runtime.loop import SAVE_AGAIN_SECS
from llmux.runtime.notes import models_in
from tests.twins.disk import MemoryStore
from tests.twins.world import World


class FullStore(MemoryStore):
    """A store on a disk that can be full."""

    full = False

    def save(self, document: Mapping[str, Any]) -> None:
        if self.full:
            raise StateFileError("cannot write the state file: No space left on device")
        super().save(document)


@in_virtual_time
async def test_the_supervisor_goes_on_and_writes_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FullStore()
    life = await begin_life(config_of(model("a"), model("b")), World(), str(tmp_path), store)
    caplog.set_level(logging.INFO)
    store.full = True
    for name in ("a", "b", "a"):
        life.demand(name, waiting=1)
        await life.until_state(name, ModelState.SERVING)
    said = [r for r in caplog.records if "No space left" in r.getMessage()]
    assert len(said) == 1, "said once"
    assert models_in(store.load()) == {}, "nothing was written"
    store.full = False
    with pytest.raises(TimeoutError):
        await life.loop.wait_for(lambda _: False, SAVE_AGAIN_SECS + 1)
    assert models_in(store.load())["a"]["state"] == "serving"
    assert "the state file is written again" in caplog.text
    assert life.running is not None
    assert not life.running.done()
    await life.drop()
