"""Fixtures of all tests."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from fxquant.backend import reports
from fxquant.backend.reuse import stores
from fxquant.errors import NotQuantizedWarning
from tests.one_translation_unit import compile_waiting, compiled_together
from tests.quick import all_is_quick, collect_rarely
from tests.uncompiled import kernels_write_zeros


def pytest_configure() -> None:
    """Workers share the processors: as many threads in all as there are, not as many in each, which wait in turns.

    pytest 9.2 hangs a handler on each logger that does not propagate. One of torch, once it has one, prints all graphs
    of a compile: a twentieth of the Python.
    """
    logging.getLogger("torch.__trace").propagate = True
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_finish() -> None:
    """Tests of what is let go collect by themselves."""
    collect_rarely()


@pytest.fixture(scope="session", autouse=True)
def compiles_and_exports_are_quick() -> Iterator[None]:
    with all_is_quick():
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compiled_together() -> Iterator[None]:
    """A third of the suite's processor time."""
    with compiled_together():
        yield


@pytest.fixture(autouse=True)
def all_kernels_are_compiled() -> Iterator[None]:
    """Those too that the test has not called."""
    yield
    compile_waiting()


@pytest.fixture(scope="session")
def vectors_are_known() -> None:
    """To processes of ours with a cache of their own: each would try all sorts of vectors, 8 s of g++, as one has."""
    from torch._inductor import config, cpu_vec_isa  # private; read in 2.13

    with config.patch({"cpp.vec_isa_ok": True}):
        of_the_processor = cpu_vec_isa.valid_vec_isa_list.__wrapped__()
    if cpu_vec_isa.valid_vec_isa_list() == of_the_processor:
        os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"


@pytest.fixture
def cold() -> Iterator[None]:
    """No compiled graph from before, and a part that silently stays float is an error."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotQuantizedWarning)
        yield
    torch._dynamo.reset()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """For what does not depend on values: bytes kept and moved, launches, generated code."""
    with kernels_write_zeros():
        yield


@pytest.fixture
def none_kept(cold: None) -> Iterator[None]:
    """No quantized weight is kept from before, and none stays once the graphs that keep it are gone.

    Other tests' objects need no second look: one takes 0.7 s.
    """
    if stores():
        gc.collect()
    gc.freeze()
    yield
    torch._dynamo.reset()
    gc.collect()
    assert not stores()


@pytest.fixture
def no_earlier_compiles() -> Iterator[None]:
    """Reports of other tests' compiles are put aside: models with equal plans share them."""
    with reports.unreported():
        reports.LOGS.clear()
        yield
