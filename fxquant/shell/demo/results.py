"""One row of ``results.json`` and how it is written: all of it, or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one net under one recipe. Accuracies are shares of the held-out digits, 0 to 1.

    Attributes:
        float_acc: the trained float net.
        ptq_acc: after calibration alone.
        qat_acc: after fine-tuning with quantization in the loop.
        onnx_acc: the exported file in the runtime.
        differing_codes: integer codes of the file's quantizers that are not the ones of PyTorch.
        compared_codes: how many were compared.
        cascaded_codes: how many differ when each side goes on from its own codes.
        same_class: the share of held-out digits that the file and `fxquant_eager` read alike.
        integer_share: the share of the runtime's arithmetic nodes that ran on integers, 0 to 1.
        latency_ratio: as `fxquant.verify_onnx` measures it; the one number here that is timed.
    """

    net: str
    recipe: str
    float_acc: float
    ptq_acc: float
    qat_acc: float
    onnx_acc: float
    differing_codes: int
    compared_codes: int
    integer_share: float
    latency_ratio: float
    cascaded_codes: int
    same_class: float


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path that takes ``path``'s place when the block succeeds, and vanishes when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(results: Sequence[Result], path: Path) -> None:
    """Write the results as a JSON list of objects; an interrupted write leaves what was there before."""
    text = json.dumps([asdict(result) for result in results], indent=2, allow_nan=False)
    with replaced(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
