"""What each compile did: reports, and the log that later passes of a compile add to."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from fxquant.graph.bodies import execution_order
from fxquant.graph.meta import site_of
from fxquant.passes.base import Decline, Pass, PassResult
from fxquant.passes.joint.use_integer_backward import UseIntegerBackward
from fxquant.passes.joint.use_integer_matmul import UseIntegerMatmul
from fxquant.passes.stages import Stage

log = logging.getLogger("fxquant")


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What one call of a backend did to one graph.

    Attributes:
        digests: site lists bound in the graph; empty for an unprepared model. Layers of other models have the same.
        plans: of the prepared models of whose parameters some are inputs of the graph, by their digests.
        quantized: fake-quant nodes inserted.
        declines: what passes left alone and why.
        integer: products that are taken of integer codes; not counted where the compiled graph came from a cache.
        integer_backward: the same of products in backward.
        reused: quantized weights that are kept from call to call (``options={"reuse_weights": True}``).
        seconds: time in capture and in passes at every hook, without Inductor; a cached graph meets no later hook.
    """

    digests: tuple[str, ...]
    quantized: int
    declines: tuple[Decline, ...]
    seconds: float
    integer: int = 0
    integer_backward: int = 0
    reused: int = 0
    plans: tuple[str, ...] = ()


@dataclass
class Log:
    """The report of one compile. Its hooks hold it: those of a backward may run after other compiles."""

    report: CompileReport = CompileReport(digests=(), quantized=0, declines=(), seconds=0.0)

    def add(
        self,
        declines: Iterable[Decline],
        *,
        seconds: float = 0.0,
        integer: int = 0,
        integer_backward: int = 0,
        reused: int = 0,
    ) -> None:
        """What is said behind the report."""
        was, found = self.report, tuple(declines)
        self.report = dataclasses.replace(
            was,
            declines=(*was.declines, *found),
            seconds=was.seconds + seconds,
            integer=was.integer + integer,
            integer_backward=was.integer_backward + integer_backward,
            reused=was.reused + reused,
        )
        for decline in found:
            log.info("%s", decline)


LOGS: collections.deque[Log] = collections.deque(maxlen=256)
LOG = "fxquant_log"  # in the meta of a QAT graph: the log of its compile


def compile_reports() -> tuple[CompileReport, ...]:
    """Reports of this process's latest compiles, oldest first."""
    return tuple(each.report for each in LOGS)


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Compiles inside are no part of training: reports are put back as they were."""
    before = tuple(LOGS)
    try:
        yield
    finally:
        LOGS.clear()
        LOGS.extend(before)


def report(gm: fx.GraphModule, digests: tuple[str, ...], result: PassResult, plans: tuple[str, ...] = ()) -> None:
    count = sum(1 for node in execution_order(gm) if site_of(node) is not None)
    # A graph that only observes (calibration) has nothing for the later passes: what they say of it means nothing.
    declines = tuple(result.declines) if count or not digests else ()
    found = CompileReport(digests=digests, quantized=count, declines=(), seconds=result.seconds, plans=plans)
    told = gm.meta[LOG] = Log(found)
    told.add(declines)
    LOGS.append(told)


def log_of(gm: fx.GraphModule) -> Log:
    """What `quantize_graph` left; of a graph that it did not make, nothing is reported."""
    return gm.meta.get(LOG) or Log()


def run_after(passes: tuple[Pass, ...], gm: fx.GraphModule, told: Log, stage: Stage) -> None:
    """Runs passes that come after the report of their compile, and adds to it what they say."""
    for each in passes:
        result = each.run(gm, stage)
        integer = result.rewrites if isinstance(each, UseIntegerMatmul) else 0
        backward = result.rewrites if isinstance(each, UseIntegerBackward) else 0
        told.add(result.declines, seconds=result.seconds, integer=integer, integer_backward=backward)
