"""Files to be timed: written to a folder, and run in turns, as many at once as fit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.onnx.pools import means_by_axis, pool_floats
from fxquant.onnx.tuning.choose import Set
from fxquant.onnx.tuning.floating import with_floats
from fxquant.onnx.tuning.graph import QdqGraph
from fxquant.onnx.tuning.layers import LayerClass, Layers
from fxquant.onnx.tuning.measure import Compared
from fxquant.onnx.write import move_into_place
from fxquant.support.require import require
from fxquant.targets.document import Feeds, ModelPath

if TYPE_CHECKING:
    import onnx

Clock = Callable[[Mapping[str, tuple[ModelPath, Feeds]], int], Mapping[str, Sequence[float]]]
"""Files with their inputs, and the number of rounds → seconds of each round, interleaved."""

_EXTERNAL_BYTES = 1_800_000_000  # protocol buffers end at 2 GiB
_SMALL = 256  # bytes of constants that stay in the file all the same
_MOST_FILES, _MOST_BYTES = 12, 1_000_000_000  # that run in turns; the reference is one of them


def write(model: onnx.ModelProto, path: Path) -> None:
    """Saves a model; its weights beside it, where it is too large for one file. It is not to be used afterwards.

    Written beside and moved into place, whole or not at all, as `fxquant.onnx.write.save` does.
    """
    onnx = require("onnx")
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".fxquant-") as folder:
        temporary = Path(folder) / path.name
        if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _EXTERNAL_BYTES:
            location = f"{path.name}.data"
            onnx.save(model, temporary, save_as_external_data=True, location=location, size_threshold=_SMALL)
        else:
            onnx.save(model, temporary)
        move_into_place(Path(folder), path)


class Files:
    """Variants of a file, by the classes that are float in them."""

    def __init__(
        self,
        graph: QdqGraph,
        classes: Sequence[LayerClass],
        feeds: Feeds,
        folder: Path,
        clock: Clock,
        rounds: int,
        step: Callable[[str], None],
    ) -> None:
        self.graph, self.classes, self.feeds, self.folder = graph, classes, feeds, folder
        self.clock, self.rounds, self.step = clock, rounds, step
        self._number = 0

    def variant(self, floats: Set) -> onnx.ModelProto:
        """The model with these classes float, and its pools as an export of it has them."""
        found = with_floats(self.graph, [key for number in floats for key in self.classes[number].keys])
        return _pooled(found) if floats and self.graph.needs_output else found

    def alone(self, layers: Layers, arrays: Feeds) -> dict[int, Compared]:
        """Each class by itself: float beside integer."""
        found = {}
        for number, kind in enumerate(self.classes):
            self.step(f"layer {number + 1} of {len(self.classes)}")
            cases = {}
            for form, (model, feeds) in layers.models(kind, arrays).items():
                path = self.folder / f"{form}.onnx"
                write(model, path)
                cases[form] = (path, feeds)
            times = self.clock(cases, self.rounds)
            found[number] = Compared.of(times["integer"], times["float"])
            self._clear()
        return found

    def against(self, reference: Set, others: Sequence[Set], *, times: int = 1) -> Mapping[Set, Compared]:
        """As `fxquant.onnx.tuning.choose.Against`."""
        found: dict[Set, Compared] = {}
        for batch in self._batches(reference, others):
            seconds = self.clock(
                {_name(floats): (path, self.feeds) for floats, path in batch.items()}, times * self.rounds
            )
            for floats in batch:
                if floats != reference:
                    found[floats] = Compared.of(seconds[_name(reference)], seconds[_name(floats)])
            self._clear()
        return found

    def _batches(self, reference: Set, others: Sequence[Set]) -> Iterator[dict[Set, Path]]:
        """Written files, the reference in each batch."""
        waiting = list(others)
        while waiting:
            batch, size = {reference: self._written(reference)}, 0
            while waiting and (len(batch) == 1 or (len(batch) < _MOST_FILES and size < _MOST_BYTES)):
                batch[waiting[0]] = self._written(waiting[0])
                size = sum(file.stat().st_size for file in self.folder.iterdir())
                waiting.pop(0)
            self.step(f"files of {len(batch) - 1} variants, {len(waiting)} to go")
            yield batch

    def _written(self, floats: Set) -> Path:
        self._number += 1
        path = self.folder / f"{self._number}.onnx"
        write(self.variant(floats), path)
        return path

    def _clear(self) -> None:
        for file in self.folder.iterdir():
            file.unlink()


def _pooled(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the forms of `fxquant.onnx.pools`, which depend on what is float before a pool."""
    if not any(node.op_type in ("MaxPool", "ReduceMean") for node in model.graph.node):
        return model
    ir = require("onnx_ir")
    found = ir.serde.deserialize_model(model)
    pool_floats(found.graph)
    means_by_axis(found.graph)
    return ir.serde.serialize_model(found)


def _name(floats: Set) -> str:
    return ",".join(map(str, sorted(floats))) or "given"
