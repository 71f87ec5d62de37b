"""`Schedule`: a quantized training in stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fxquant.capture.aside import allow_recompiles
from fxquant.errors import InvalidArgument, PlanMismatch
from fxquant.prepared.freeze import freeze_batch_norm, freeze_ranges
from fxquant.prepared.root import Root, require_plan, unwrap
from fxquant.prepared.staged import Converted, stage_sites
from fxquant.support.table import table
from fxquant.training.batch_norm import reestimate_batch_norm
from fxquant.training.callbacks import lightning_callback, trainer_callback
from fxquant.training.damping import Damping
from fxquant.training.resolved import Resolved, begins, resolved
from fxquant.training.stage import Stage

_GRAPHS = 3  # that a stage compiles of one frame: training, evaluation, and a teacher's


class Schedule:
    """Drives a prepared model through stages, by one `step` after each of the optimizer's, as rates are scheduled.

    >>> schedule = fxquant.Schedule(model, [
    ...     fxquant.Stage(at=0, weights="float", activations="float"),
    ...     fxquant.Stage(at=100, activations="observe"),
    ...     fxquant.Stage(at=200, weights=8),
    ...     fxquant.Stage(at=300, activations="quantize"),
    ...     fxquant.Stage(at=0.5, weights="quantize"),
    ...     fxquant.Stage(at=0.9, freeze_ranges=True, freeze_batch_norm=True),
    ... ], total_steps=1000)
    >>> for x, y in batches:
    ...     loss(step(x), y).backward()
    ...     optimizer.step()
    ...     schedule.step()

    The stage at 0 begins at once; before the first one, the model trains as it was prepared. Each stage that changes
    what is compiled costs one compile at the next call, and nothing between stages does. So that the compiles of all
    stages are kept, ``torch._dynamo.config.recompile_limit`` is raised where it is lower. The last stage leaves every
    site as the plan has it: what is deployed was trained.

    Where it is stands in `state_dict`; the model's own state dict holds the plan, and the bits that sites have. A new
    one on a model begins at step 0. With ``torch.distributed`` each rank makes and steps its own.

    Args:
        model: a prepared model, or what torch.compile or DistributedDataParallel made of it.
        stages: in order; see `Stage`.
        total_steps: how many steps there are, where a stage begins at a share of them.

    Raises:
        InvalidArgument: a model that is not prepared; stages that are none or out of order, name no site, or do not
            end as the plan says; shares of an unknown number of steps.
    """

    def __init__(self, model: nn.Module, stages: Iterable[Stage], *, total_steps: int | None = None) -> None:
        plan = require_plan(model, "Schedule")
        self.model = unwrap(model)
        self.stages = tuple(stages)
        self._begins = begins(self.stages, total_steps)
        self._steps = 0
        self._states = resolved(self.model, plan, self.stages)
        self._root = self.model.__dict__[Root.SLOT]
        self._damping = Damping(self.model)
        allow_recompiles(_GRAPHS * len(self.stages))
        self._made = self._hold(entering=True)
        self._begin_stage()

    @property
    def steps(self) -> int:
        """How many steps are done."""
        return self._steps

    @property
    def index(self) -> int:
        """Which stage it is, counted from 0; −1 before the first one."""
        return sum(begin <= self._steps for begin in self._begins) - 1

    @property
    def stage(self) -> Stage | None:
        """The stage, None before the first one."""
        return self.stages[self.index] if self.index >= 0 else None

    def step(self) -> None:
        """Counts a step of the optimizer, and begins the stage that comes after it, if one does."""
        self._steps, self._made = self._steps + 1, []
        overridden = self._root is not self.model.__dict__.get(Root.SLOT)
        if overridden:
            self._states = resolved(self.model, require_plan(self.model, "Schedule"), self.stages)
            self._root = self.model.__dict__[Root.SLOT]
        if overridden or self._steps in self._begins:
            self._hold(entering=True)
        self._begin_stage()

    def damping(self) -> Tensor:
        """The loss that keeps weights from oscillating between two codes, times the stage's factor; 0 without one.

        ``factor · Σ (Q(w) − clip(w))²`` over the weights that are quantized now, where ``Q(w)`` is what they are
        quantized to, without gradient, and ``clip`` holds them within the range of the codes. Add it to the loss,
        outside of what is compiled. A BatchNorm that is folded into a weight with one scale for the whole tensor is not
        seen.

        Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (2022), section 4.1.
        """
        return self._damping.loss(self._state.damped)

    @property
    def damps(self) -> bool:
        """Whether the stage damps any weight."""
        return any(self._state.damped.values())

    def state_dict(self) -> dict[str, Any]:
        """Where it is: plain values, with what each stage is and when it begins, for the user's checkpoint."""
        return {"steps": self._steps, "stages": self._described()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. The model's own state is to be loaded too, before or after.

        Raises PlanMismatch for the state of a schedule with other stages.
        """
        mine, others = self._described(), [list(line) for line in state["stages"]]
        if others != mine:
            raise PlanMismatch(
                f"schedule's state must be of the same stages: got {_shown(others)}, where this one has "
                f"{_shown(mine)}. Make the schedule that was saved, or leave its state out to begin at step 0."
            )
        self.seek(state["steps"])

    def seek(self, steps: int) -> None:
        """Goes to where ``steps`` steps are done, as `load_state_dict` does: BatchNorm and ranges are left alone."""
        if not isinstance(steps, int) or steps < 0:
            raise InvalidArgument(f"steps must be a whole number of at least 0: got {steps!r}.")
        for converted in self._made:  # of a state that was loaded before the schedule was made
            converted.undo()
        self._steps, self._made = steps, []
        self._hold(entering=False)
        self._tell()

    def trainer_callback(self) -> Any:
        """For ``transformers.Trainer(callbacks=[…])``: steps with its optimizer, adds the gradient of the damping.

        A run that is taken up goes on from the Trainer's own step. Raises MissingDependency without transformers.
        """
        return trainer_callback(self)

    def lightning_callback(self) -> Any:
        """For ``lightning.Trainer(callbacks=[…])``: steps with its optimizers, adds the gradient of the damping.

        The schedule's state is in Lightning's checkpoints. Raises MissingDependency without lightning.
        """
        return lightning_callback(self)

    @property
    def _state(self) -> Resolved:
        return self._states[self.index + 1]

    def _described(self) -> list[list[Any]]:
        return [[begin, str(stage)] for begin, stage in zip(self._begins, self.stages, strict=True)]

    def _hold(self, *, entering: bool) -> list[Converted]:
        """Has the model be as the stage says."""
        converted = stage_sites(self.model, self._state.sites, entering=entering)
        if self._state.freeze_ranges is not None:
            freeze_ranges(self.model, self._state.freeze_ranges)
        if self._state.freeze_batch_norm is not None:
            freeze_batch_norm(self.model, self._state.freeze_batch_norm)
        return converted

    def _begin_stage(self) -> None:
        """What is done once, as a stage begins."""
        if self._steps in self._begins and self.stage is not None and self.stage.batch_norm_data is not None:
            reestimate_batch_norm(self.model, self.stage.batch_norm_data, progress=False)
        self._tell()

    def _tell(self) -> None:
        what = str(self.stage) if self.stage is not None else "as prepared"
        self._root.stage = f"step {self._steps}, stage {self.index + 1} of {len(self.stages)}: {what}"

    def __str__(self) -> str:
        """A table of the stages, the present one marked."""
        rows = [
            [">" if number == self.index else "", begin, what] for number, (begin, what) in enumerate(self._described())
        ]
        return f"step {self._steps}\n{table(['', 'from step', 'stage'], rows)}"


def _shown(stages: Iterable[Iterable[Any]]) -> str:
    return "; ".join(": ".join(map(str, line)) for line in stages)
