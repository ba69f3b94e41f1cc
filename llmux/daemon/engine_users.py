"""Which users the engines of an installation run as, and what each would be started with."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Final

from llmux.config.schema import Config, ModelConfig
from llmux.daemon.engine_environment import built_environment, engine_environment
from llmux.daemon.places import RUNTIME
from llmux.drivers.processes.users import ModelUsers, SharedUser
from llmux.ports import EngineUser, EngineUsers, LaunchSpec
from llmux.runtime.engines.launch import (
    engine_address,
    engine_argv,
    engine_directory,
    home_name,
)
from llmux.runtime.engines.launch import (
    engine_environment as environment_of,
)
from llmux.runtime.host import Places

CACHE: Final = "/var/cache/llmux"  # one home per model
USERS: Final = "/var/lib/llmux/engine-users.json"


def _model_users() -> ModelUsers:
    return ModelUsers(USERS, lambda model: f"{CACHE}/{home_name(model)}")


def engine_users(config: Config) -> EngineUsers | None:
    if config.engine_user == "root":
        return None
    if config.engine_user is not None:
        return SharedUser(config.engine_user, CACHE)
    return _model_users()


class _Planned:
    """EngineUsers that gives out no uid: the supervisor alone does, which keeps them in a file."""

    def __init__(self, users: ModelUsers) -> None:
        self._users = users

    def find(self, model: str) -> EngineUser:
        return self._users.plan(model)


def planned_starts(config: Config) -> Sequence[LaunchSpec]:
    """How each model's engine would be started by the service, as its first GPUs are not chosen
    yet. Raises LlmuxError without the user that the configuration asks for."""
    users = engine_users(config)
    if isinstance(users, ModelUsers):
        users = _Planned(users)
    try:
        environment = engine_environment()
    except ImportError:  # no pystemd: then there is no service either
        environment = built_environment({})
    places = Places(RUNTIME, users, config.vllm_command, environment)
    return [_start(model, places) for model in config.models.values()]


def _start(model: ModelConfig, places: Places) -> LaunchSpec:
    gpus = model.gpus if isinstance(model.gpus, tuple) else ()
    env = environment_of(model, gpus, places)
    program, *rest = engine_argv(model, engine_address(model, places), places.vllm_command)
    return LaunchSpec(
        model=model.name,
        argv=(shutil.which(program, path=env.get("PATH")) or program, *rest),
        env=env,
        user=places.users.find(model.name) if places.users is not None else None,
        stdout="/dev/null",
        stderr="/dev/null",
        runtime_dir=engine_directory(model.name, places),
    )
