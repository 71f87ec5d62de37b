"""`Range`: how the scale of a quantizer is found, and all that fxquant asks of it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.errors import InvalidArgument
from fxquant.ops.qparams import NOTHING_SEEN, affine_qparams
from fxquant.spec.mode import Mode
from fxquant.spec.ranges.site_graph import Format, Qparams, SiteGraph

State = Mapping[str, Tensor]
UNSET = "unset"
"""What tables say of a state that holds no range yet."""


@dataclass(frozen=True, kw_only=True)
class Range(abc.ABC):
    """How a scale is found: a frozen dataclass whose fields are its options, known in checkpoints by ``kind``.

    A new kind is a subclass in a file of its own; nothing else in fxquant names the kinds that there are. It must say
    what its nodes are (`qparams`), and may have state, which stands on the quantizer and comes into graphs as inputs.

    Attributes:
        kind: its name in plans and checkpoints, one for each class.
        state_names: the tensors that it keeps between steps. A name that another kind has too stands for the same:
            `fxquant.override` carries its value over.
        roles: what it may be used for.
        per_group: whether it may be used for weights with a scale per group.
        takes_ends: whether a minimum and maximum that were found elsewhere can be its state, see `set_ends`.
        trained: whether there are parameters in its state.
    """

    kind: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[frozenset[str]] = frozenset({"activation", "output"})
    per_group: ClassVar[bool] = False
    takes_ends: ClassVar[bool] = False
    trained: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        kind = cls.__dict__.get("kind")
        if not isinstance(kind, str):
            raise InvalidArgument(f"{cls.__name__}.kind must be a name of its own: got {kind!r}. Checkpoints hold it.")
        known = RANGE_KINDS.get(kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InvalidArgument(
                f"{cls.__name__}.kind must not be another's: got {kind!r}, which is {known.__qualname__}."
            )
        RANGE_KINDS[kind] = cls

    @property
    def stateful(self) -> bool:
        """Whether something is kept between steps."""
        return bool(self.state_names)

    def names(self, format: Format) -> tuple[str, ...]:
        """`state_names`, of which a format may have no use for some."""
        return self.state_names

    def check(self, format: Format) -> None:  # noqa: B027
        """Raises InvalidArgument for a format that it cannot find scales of; by default there is none."""

    # What stands on the quantizer

    def initial_state(self, format: Format, scales: int = 1) -> dict[str, Tensor]:
        """The state of a new quantizer, by `names`: a number just below 0 for each scale, which stands for "unset".

        Finite, so that a moving average of a model's state that starts with it stays finite. A ``nn.Parameter`` is
        trained, anything else is a buffer. All keep their dtype when the model changes its own.
        """
        return {name: torch.full((scales,), -NOTHING_SEEN, dtype=torch.float32) for name in self.names(format)}

    def is_set(self, state: State) -> bool:
        """Whether the state holds a range: a look on the host."""
        return all(bool((torch.isfinite(value) & (value != -NOTHING_SEEN)).all()) for value in state.values())

    def as_written_today(self, state: State, format: Format) -> dict[str, Tensor]:
        """A state from a checkpoint of any version, in which NaN stood for "unset"."""
        new = self.initial_state(format)
        return {
            k: torch.where(v.isnan(), new[k].detach().to(v), v) if v.is_floating_point() else v
            for k, v in state.items()
        }

    def converted(self, state: State, before: Format, now: Format) -> State | None:
        """A state that was found for another format; None where it says nothing of this one. By default it does."""
        return state

    def is_degenerate(self, state: State) -> bool:
        """Whether a range that is set has seen only zeros: every positive scale is exact for those, none for more."""
        return False

    def describe(self, state: State) -> str:
        """The state in a few words, for tables: ``unset``, or the values of one element."""
        if not self.stateful:
            return ""
        if not self.is_set(state):
            return UNSET
        return ", ".join(f"{name} {value.item():.4g}" for name, value in state.items() if value.numel() == 1)

    def suffix(self) -> str:
        """What a format's short name has to say of it, as ``[0, 6]``; mostly nothing."""
        return ""

    # What it does in a graph

    def mode(self, observing: bool, resolved: bool) -> Mode:
        """What a site does outside calibration.

        Args:
            observing: training, and the range is not frozen.
            resolved: the state is known to be set, so that graphs need not look at it.
        """
        if not self.stateful:
            return Mode.STATIC
        if observing:
            return Mode.TRAIN
        return Mode.STATIC if resolved else Mode.RESOLVE

    @abc.abstractmethod
    def qparams(self, site: SiteGraph, value: fx.Node) -> Qparams | None:
        """The nodes of scale and zero point for ``value``, the tensor without its gradient.

        The state is updated or resolved first as ``site.mode`` says; None where that calibrates. Gradients reach
        parameters through the scale, if `Qparams.scale_gradient` says so.
        """

    def observe(self, site: SiteGraph, value: fx.Node) -> None:
        """The nodes of an update after use, for kinds with a mode that `Mode.updates_afterwards`."""
        raise NotImplementedError(f"{type(self).__name__} has no update afterwards, and must not ask for one.")

    # Calibration

    def start_calibration(self, state: State) -> None:
        """Forgets what was seen; graphs in a mode that `Mode.calibrates` then come, and `end_calibration`."""
        for value in state.values():
            value.fill_(-NOTHING_SEEN)

    def end_calibration(self, state: State) -> None:  # noqa: B027
        """Makes of what was seen what the sites are quantized with; by default it is that already."""

    def set_ends(self, state: State, format: Format, low: float, high: float) -> None:
        """Makes a minimum and maximum that calibration has chosen the state, for kinds that ``takes_ends``."""
        raise NotImplementedError(f"{type(self).__name__} takes no ends, and must not say so.")

    def ends(self, state: State, format: Format) -> tuple[float, float]:
        """The minimum and maximum that a state stands for, for kinds that ``takes_ends``."""
        raise NotImplementedError(f"{type(self).__name__} takes no ends, and must not say so.")

    def qparams_of_ends(self, low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """Scales and zero points of ends that hold 0, as sites have them once `set_ends` has got those."""
        codes = format.quant_min, format.quant_max, format.symmetric
        return affine_qparams(low, high, *codes, element=format.element)

    def follow(self, state: State, format: Format, low: float, high: float) -> bool:
        """Moves a range that is set with its tensor, whose ends have become ``low`` and ``high`` times what they were.

        False, and nothing done, for a kind that cannot: what scales activations leaves its sites alone.
        """
        return False

    # Plans and checkpoints

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Range:
        """Inverse of `to_dict`; InvalidArgument for a kind that this process does not know."""
        options = dict(fields)
        kind = options.pop("kind")
        if kind not in RANGE_KINDS:
            known = ", ".join(map(repr, RANGE_KINDS))
            raise InvalidArgument(
                f"kind of a range must be one of {known}: got {kind!r}. Import the module that defines it first."
            )
        return RANGE_KINDS[kind](**options)


RANGE_KINDS: dict[str, type[Range]] = {}
"""The kinds that are defined in this process, by name."""
