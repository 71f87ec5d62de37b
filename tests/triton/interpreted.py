"""``python -m tests.triton.interpreted float32 …``: compares every operator's kernels with its own arithmetic.

Prints one JSON object: case and dtype → what differs, nothing where all is well. With TRITON_INTERPRET=1 only.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from tests.ops.oracle import assert_same_bits
from tests.triton.cases import CASES, operator
from tests.triton.harness import exact, generated
from tests.triton.interpret import run


def difference(name: str, dtype: torch.dtype) -> str:
    """Why the kernels' results are not the operator's; empty where they are."""
    case = operator(CASES[name], dtype)
    expected = case.function(*case.inputs)
    (written,) = generated(case.function, case.inputs, exact())
    found = run(written, [tensor.clone() for tensor in case.inputs])
    try:
        assert len(found) == len(expected)
        for k, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            _compare(mine, theirs.detach(), exactly=k < case.exact)
    except AssertionError as error:
        return str(error).strip() or "zeros of another sign"
    return ""


def _compare(found: Tensor, expected: Tensor, *, exactly: bool) -> None:
    if not expected.is_floating_point():
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif exactly:
        assert_same_bits(found, expected)
    else:  # a sum, whose order a device chooses
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def main(dtypes: list[str]) -> None:
    found = {}
    for dtype in (getattr(torch, each) for each in dtypes):
        for name, case in CASES.items():
            if dtype in case.dtypes:
                found[f"{name} ({dtype})"] = difference(name, dtype)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
