"""What the backends' options are where they are left out."""

from __future__ import annotations

import pytest

from fxquant.backend import options
from fxquant.backend.options import Options


@pytest.mark.parametrize("reason", ["", "no dot products"], ids=["dot products", "none"])
def test_products_take_integers_by_default_where_a_cpu_can_be_faster(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(options, "never_faster", lambda device: reason)
    left_out = Options.read({})
    assert (left_out.integers, left_out.by_default) == (False if reason else "auto", True)
    assert Options.read({"reuse_weights": True}).integers is False, "which excludes them"
    for asked in (True, False, "auto"):
        found = Options.read({"integer_matmul": asked})
        assert (found.integers, found.by_default) == (asked, False)
    assert left_out.joint["by_default"] is True and not left_out.integer_backward.mode
