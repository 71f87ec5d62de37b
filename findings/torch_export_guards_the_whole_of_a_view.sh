#!/usr/bin/env bash
# torch 2.13.0: a program exported on an example that is a view, with an open batch, cannot be decomposed or lowered.
#
# torch.export on `tokens[:, :-1]`, the usual input of a language model's training, takes the tensor that the slice is a
# part of for a part of the input: `x.contiguous()` compares its strides, and the program holds a guard on
# `L['x']._base.size()[1]`. The program runs. `run_decompositions()`, which torch.onnx.export and every backend call,
# runs the guard on a tensor that is no view and raises AttributeError: 'NoneType' object has no attribute 'size'.
# With a copy of the same slice as the example there is no guard, and it decomposes.
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.10 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" 2>/dev/null
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch import nn

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(29, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x.contiguous()))


tokens = torch.arange(32 * 17).reshape(32, 17) % 29


def decomposed(example: torch.Tensor) -> str:
    program = torch.export.export(Model(), (example,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    program.module()(example)
    try:
        program.run_decompositions()
    except AttributeError as error:
        return next(line for line in str(error).splitlines() if line)
    return "decomposes"


view, copy = decomposed(tokens[:, :-1]), decomposed(tokens[:, :-1].clone())
print(f"torch {torch.__version__}: of a view, {view}; of a copy of it, it {copy}")
sys.exit(0 if "'NoneType' object has no attribute 'size'" in view and copy == "decomposes" else 1)
PYTHON
