"""An image becomes processes with the user that it names: another user's is refused before that."""

from __future__ import annotations

import pathlib

import pytest
from test_images import publish

from llmux.config.schema import ModelConfig
from llmux.drivers.engine.identity import engine_identity
from llmux.drivers.images.store import ImageStore
from llmux.image_ports import Image, NoImage
from llmux.ports import EngineUser, LaunchSpec

OURS = EngineUser("llmux-poet", 60706, 980, "/var/cache/llmux/poet", (44, 980))
OTHERS = {
    "root": None,
    "the user of another model": EngineUser("llmux-critic", 60707, 980, "/c", (44, 980)),
    "a user of the same name": EngineUser("llmux-poet", 60800, 980, OURS.home, (44, 980)),
    "the user of engine_user": EngineUser("llmux-engine", 987, 980, "/c", (44, 980)),
    "the same user in another group": EngineUser("llmux-poet", 60706, 0, OURS.home, (44, 980)),
    "the same user in more groups": EngineUser("llmux-poet", 60706, 980, OURS.home, (0, 44, 980)),
}


def identity(user: EngineUser | None) -> dict[str, str]:
    spec = LaunchSpec(
        model="poet", argv=("/bin/true", "serve"), env={}, user=user,
        stdout="/nowhere", stderr="/nowhere", runtime_dir="/nowhere",
    )  # fmt: skip
    return dict(engine_identity(ModelConfig("poet", "/nowhere"), spec))


@pytest.mark.parametrize("whose", OTHERS)
def test_another_users_image_is_refused_by_name(home: pathlib.Path, whose: str) -> None:
    store = ImageStore(str(home))
    publish(store, "poet", identity=identity(OTHERS[whose]))
    for asked, path in ((OURS, None), (OURS, f"{home}/poet/images")):
        found = store.find("poet", identity(asked), path)
        assert isinstance(found, NoImage), whose
        assert "user was " in found.reason and "60706" in found.reason, found.reason
    own = store.find("poet", identity(OTHERS[whose]))
    assert isinstance(own, Image), "nothing else keeps it from being used"


def test_another_models_image_is_refused_for_its_user_in_checkpoint_path_too(
    home: pathlib.Path,
) -> None:
    store = ImageStore(str(home))
    publish(store, "critic", identity=identity(OTHERS["the user of another model"]))
    found = store.find("poet", identity(OURS), f"{home}/critic/images")
    assert isinstance(found, NoImage)
    assert 'user was "llmux-critic (uid 60707' in found.reason, found.reason
