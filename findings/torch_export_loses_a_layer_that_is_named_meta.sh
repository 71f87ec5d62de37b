#!/usr/bin/env bash
# torch 2.13.0: a model with a layer that is named `meta` exports, and the program cannot be run or written as ONNX.
#
# torch.export takes the model and returns a program with the layer's parameters. `program.module()`, which is how it is
# run, and which torch.onnx.export calls, raises RuntimeError: the parameters would stand below `meta`, and that is the
# dictionary of notes which every GraphModule has. The same layer by another name is run and written. Models whose
# branches are named by what they read (`image`, `meta`, `graph`) train under torch.compile and then cannot be deployed:
# so it is with each name that a GraphModule has and a Module lacks, `graph`, `code` and `shape_env` among them.
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
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.name)(x)


def outcome(name: str) -> str:
    program = torch.export.export(Model(name).eval(), (torch.ones(2, 4),))
    assert set(program.state_dict) == {f"{name}.weight", f"{name}.bias"}
    try:
        return f"runs, {tuple(program.module()(torch.ones(2, 4)).shape)}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


print("torch", torch.__version__)
found = {name: outcome(name) for name in ("notes", "meta", "graph", "code", "shape_env")}
for name, said in found.items():
    print(f"a layer named {name!r}: exported; {said}")
as_found = found.pop("notes").startswith("runs") and not any(said.startswith("runs") for said in found.values())
print("as found" if as_found else "it has changed")
sys.exit(not as_found)
PYTHON
