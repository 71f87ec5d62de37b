"""Callbacks by which transformers' Trainer and Lightning step a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fxquant.support.require import require

_MISSING = "{} must be installed for its callback: it is not. Run `pip install {}`, or call schedule.step() yourself."


class Driven(Protocol):
    """What the callbacks need of a `fxquant.Schedule`."""

    @property
    def steps(self) -> int:
        """How many are done."""

    @property
    def damps(self) -> bool:
        """Whether there is a damping now."""

    def step(self) -> None:
        """Counts one."""

    def seek(self, steps: int) -> None:
        """Goes to one."""

    def damping(self) -> Tensor:
        """The loss."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes there."""


def trainer_callback(schedule: Driven) -> Any:
    """A ``transformers.TrainerCallback``."""
    transformers = require("transformers", _MISSING.format("transformers", "transformers"))

    class ScheduleCallback(transformers.TrainerCallback):  # type: ignore[name-defined]
        """Steps the schedule with the optimizer; a run that is taken up goes to the Trainer's own step."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if schedule.steps != state.global_step:
                schedule.seek(state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _damp(schedule)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _step_to(schedule, state.global_step)

    return ScheduleCallback()


def lightning_callback(schedule: Driven) -> Any:
    """A ``lightning.pytorch.Callback``."""
    lightning = require("lightning.pytorch", _MISSING.format("lightning", "lightning"))

    class ScheduleCallback(lightning.Callback):  # type: ignore[name-defined]
        """Steps the schedule with the optimizers; its state is in Lightning's checkpoints."""

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            _damp(schedule)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            _step_to(schedule, trainer.global_step)

        def state_dict(self) -> dict[str, Any]:
            return schedule.state_dict()

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            schedule.load_state_dict(state_dict)

    return ScheduleCallback()


def _damp(schedule: Driven) -> None:
    """Adds the gradient of the damping to those that the backward of the loss has left."""
    if schedule.damps:
        schedule.damping().backward()


def _step_to(schedule: Driven, steps: int) -> None:
    while schedule.steps < steps:
        schedule.step()
