from __future__ import annotations

from typing import Any

import pytest

from fxquant.targets import onnxruntime_rows
from fxquant.targets import session as runtime


@pytest.fixture
def plain_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's optimizer must not see these graphs: it takes some of them wrong.

    But for the rows of `verify_onnx` on each level, which say so.
    """
    built = runtime.session

    def session(*args: Any, optimize: bool, **kwargs: Any) -> Any:
        assert not optimize or kwargs.get("level") is not None
        return built(*args, optimize=optimize, **kwargs)

    for module in (runtime, onnxruntime_rows):
        monkeypatch.setattr(module, "session", session)
