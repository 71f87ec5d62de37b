"""The demo's nets, each from float to its proven files; side by side, in a process each, where there are processors."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context

import torch

from fxquant.errors import InvalidArgument
from fxquant.shell.demo import data
from fxquant.shell.demo.console import Console
from fxquant.shell.demo.job import Budget, quantize, train_float
from fxquant.shell.demo.plot import Panel


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def panels(options: argparse.Namespace, console: Console) -> list[Panel]:
    """What became of each net, in the order of the options.

    More than one job is a process for each net, with its share of the threads, whose lines stand among each other's.
    Raises what a net raises, InvalidArgument where a process is ended from outside.
    """
    nets: Sequence[str] = list(dict.fromkeys(options.nets))
    jobs = min(options.jobs, len(nets))
    if jobs < 2:
        return [panel(net, options, console) for net in nets]
    console.stage(", ".join(nets), f"side by side, {jobs} at a time")
    threads, others = max(1, torch.get_num_threads() // jobs), set(active_children())
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        waiting = [pool.submit(panel, net, options) for net in nets]
        try:
            for done in as_completed(waiting):
                done.result()
        except BaseException as error:  # an interrupt too: nobody waits minutes for a net that is not written
            for each in waiting:
                each.cancel()
            for process in set(active_children()) - others:
                process.terminate()
                process.join()
            if isinstance(error, BrokenProcessPool):
                raise InvalidArgument(
                    f"jobs must be as many as fit in memory: got {jobs}, and one was ended from outside. Give --jobs 1."
                ) from error
            raise
    return [each.result() for each in waiting]


def panel(net: str, options: argparse.Namespace, console: Console | None = None) -> Panel:
    """One net under every recipe; prints lines where no console is given."""
    console = console or Console(bars=False)
    digits = data.load(options.seed)
    budget = Budget.quick() if options.quick else Budget.full()
    trained = train_float(net, digits, budget.floats[net], seed=options.seed, console=console)
    recipes = dict.fromkeys(options.recipes)
    runs = [
        quantize(trained, recipe, digits, budget.qat, seed=options.seed, out=options.out, console=console)
        for recipe in recipes
    ]
    return Panel(trained=trained, runs=runs)
