"""Owners bind their state in the thread that exports, and in no other."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import fxquant
from fxquant.prepared import bound_forward
from fxquant.prepared.bound_forward import exporting


def test_an_export_is_one_thread_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one exports, another that is done must not end it, nor see its own model bound."""
    bound: list[int] = []
    monkeypatch.setattr(bound_forward, "bind", lambda *_: bound.append(threading.get_ident()))
    x = torch.randn(2, 4)
    model = fxquant.prepare(nn.Sequential(nn.Linear(4, 4)), (x,))

    def other() -> None:
        model(x)
        with exporting():
            pass

    with exporting():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        model(x)
    model(x)
    assert bound == [threading.get_ident()] * len(bound) and len(bound) == 1
