"""`Mixed`: `fxquant.mixed` as a recipe of `fxquant.prepare`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxquant.errors import InvalidArgument
from fxquant.prepared.override import override
from fxquant.prepared.prepare import Measured
from fxquant.probe.calibrate import calibrate
from fxquant.search.budget import check_bits, check_budget
from fxquant.search.meters import Loss, parts
from fxquant.search.mixed import mixed
from fxquant.spec.recipes import Recipe, get_recipe


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed(Measured):
    """A recipe whose weight formats are measured: the least harm to the result within a budget.

    >>> fxquant.prepare(model, (x,), recipe=fxquant.Mixed(data=batches, weight_bytes=0.6))

    `fxquant.prepare` quantizes by ``base``, sets the ranges with `fxquant.calibrate`, measures with `fxquant.mixed`,
    and applies what that found with `fxquant.override`: the plan, and with it every checkpoint, holds the formats
    themselves. The ranges stay. After an error or an interrupt the model is as it was before.

    Attributes:
        data: batches as for `fxquant.mixed`, read twice: a list or a DataLoader, no generator.
        loss, weight_bytes, integer_share, bits, progress: as for `fxquant.mixed`.
        base: the recipe that is measured against: the formats of activations, and those under ``integer_share``.

    Raises InvalidArgument for data that can be read only once, and as `fxquant.mixed` does.
    """

    data: Iterable[Any] = field(repr=False)
    weight_bytes: float | None = None
    integer_share: float | None = None
    loss: Loss | None = None
    bits: Sequence[int | None] = (4, 8, 16, None)
    base: str | Recipe = "int8"
    progress: bool = True

    def __post_init__(self) -> None:
        check_budget(self.weight_bytes, self.integer_share)
        check_bits(self.bits)
        get_recipe(self.base)
        if not isinstance(self.data, Iterable) or isinstance(self.data, Iterator):
            raise InvalidArgument(
                f"Mixed.data must be batches that can be read twice: got {type(self.data).__name__}. "
                "Give a list or a DataLoader."
            )

    def fit(self, model: nn.Module) -> None:
        """Calibrates, measures and overrides a model that was just prepared by ``base``."""
        calibrate(model, self._inputs(), progress=self.progress)
        formats = mixed(
            model,
            self.data,
            self.loss,
            weight_bytes=self.weight_bytes,
            integer_share=self.integer_share,
            bits=self.bits,
            progress=self.progress,
        )
        override(model, formats)

    def _inputs(self) -> Iterator[Any]:
        """The batches without targets."""
        for batch in self.data:
            parts(batch, self.loss)  # says what is wrong with a batch that is no pair
            yield batch if self.loss is None else batch[0]
