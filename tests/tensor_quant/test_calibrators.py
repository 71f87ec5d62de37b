"""Calibrators against brute force in numpy, written from the definitions with plain loops."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.tensor_quant import HistogramCalibrator, MaxCalibrator

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def data(seed: int, *shape: int, dtype: torch.dtype = torch.float32, tail: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return (x**3 if tail else x).to(dtype)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max(dtype: torch.dtype, axis: Any) -> None:
    calibrator = MaxCalibrator(8, axis, False, track_amax=True)
    assert calibrator.compute_amax() is None
    batches = [data(seed, 3, 4, 5, dtype=dtype) for seed in range(3)]
    for x in batches:
        calibrator.collect(x)
    kept = {None: (), 0: (0,), -1: (2,)}.get(axis, axis) if not isinstance(axis, tuple) else axis
    others = tuple(d for d in range(3) if d not in kept)
    stacked = np.stack([b.float().numpy() for b in batches])
    expected = np.abs(stacked).max(0).max(axis=others, keepdims=axis is not None) if others else np.abs(stacked).max(0)
    got = calibrator.compute_amax()
    assert got.dtype == torch.float32 and np.array_equal(got.numpy(), expected)
    assert len(calibrator.amaxs) == 3 and torch.equal(calibrator.amaxs[-1], got)
    assert np.array_equal(calibrator.amaxs[0].numpy(), np.abs(stacked[0]).max(axis=others, keepdims=axis is not None))
    calibrator.reset()
    assert calibrator.compute_amax() is None and calibrator.amaxs == []


def test_max_of_one_dimension_and_of_nothing() -> None:
    vector = MaxCalibrator(8, 0, False)
    vector.collect(torch.tensor([-1.0, 2.0]))
    assert vector.compute_amax().tolist() == [1.0, 2.0]
    empty = MaxCalibrator(8, None, False)
    empty.collect(torch.empty(0, 3))
    assert empty.compute_amax() == 0
    scalar = MaxCalibrator(8, None, False)
    scalar.collect(torch.tensor(-2.0))
    assert scalar.compute_amax() == 2


@pytest.mark.parametrize("kind", [MaxCalibrator, HistogramCalibrator], ids=lambda kind: kind.__name__)
def test_errors_of_both(kind: Any) -> None:
    with pytest.raises(TypeError, match="Negative values encountered in unsigned quantization"):
        kind(8, None, True).collect(torch.tensor([-1.0, 2.0]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(InvalidArgument, match="x must be finite to be calibrated on"):
            kind(8, None, False).collect(torch.tensor([1.0, bad]))
    with pytest.raises(InvalidArgument, match="x must be a floating tensor"):
        kind(8, None, False).collect(torch.ones(3, dtype=torch.int32))


def test_other_errors() -> None:
    calibrator = MaxCalibrator(8, 0, False)
    calibrator.collect(torch.ones(3, 2))
    with pytest.raises(InvalidArgument, match=r"as many slices as before: got amax of shape \(4, 1\) after \(3, 1\)"):
        calibrator.collect(torch.ones(4, 2))
    with pytest.raises(InvalidArgument, match="axis must be from -2 to 1 for this input: got 2"):
        MaxCalibrator(8, 2, False).collect(torch.ones(3, 2))
    with pytest.raises(InvalidArgument, match="axis must be None for a histogram"):
        HistogramCalibrator(8, 0, False)
    with pytest.raises(InvalidArgument, match="num_bins must be even"):
        HistogramCalibrator(8, None, False, num_bins=3)
    with pytest.raises(InvalidArgument, match="grow_method must be"):
        HistogramCalibrator(8, None, False, grow_method="shrink")
    histogram = HistogramCalibrator(8, None, False)
    for kwargs, message in (
        ({"method": "max"}, "method must be one of"),
        ({"percentile": 101}, "percentile must be from 0 to 100"),
        ({"stride": 0}, "stride and start_bin must be at least 1"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            histogram.compute_amax(**kwargs)
    floats = HistogramCalibrator((4, 3), None, False)
    floats.collect(torch.ones(3))
    with pytest.raises(InvalidArgument, match="'percentile' or 'mse' for num_bits="):
        floats.compute_amax("entropy")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    batches=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), max_size=30), min_size=1, max_size=5),
    bins=st.sampled_from([2, 8, 64]),
    grow=st.sampled_from([None, "append", "stretch"]),
    skip=st.booleans(),
)
def test_histogram_counts_are_exact_however_it_grows(
    batches: list[list[float]], bins: int, grow: str | None, skip: bool
) -> None:
    calibrator = HistogramCalibrator(8, None, False, num_bins=bins, grow_method=grow, skip_zeros=skip)
    for batch in batches:
        calibrator.collect(torch.tensor(batch))
    every = np.abs(np.array([v for batch in batches for v in batch], dtype=np.float64))
    every = every[every != 0] if skip else every
    if not len(every):
        assert calibrator.compute_amax("percentile") is None and calibrator.counts is None
        return
    if not every.any():
        assert calibrator.compute_amax("percentile") == 0
        return
    edges, counts = calibrator.bin_edges.numpy(), calibrator.counts.numpy()
    assert edges[0] == 0 and edges[-1] >= every.max() and counts.sum() == len(every)
    # numpy's bins hold their lower edge, and the last one its upper: mirrored, they are ours.
    assert np.array_equal(counts, np.histogram(-every, bins=-edges[::-1])[0][::-1])
    if grow == "stretch":
        assert len(counts) == bins


def test_appended_bins_keep_their_width_and_an_outlier_costs_no_memory() -> None:
    calibrator = HistogramCalibrator(8, None, False, num_bins=100)
    calibrator.collect(torch.tensor([1.0, 0.5]))
    calibrator.collect(torch.tensor([2.345]))
    assert len(calibrator.counts) == 236 and calibrator.bin_edges[1] == 0.01
    calibrator.collect(torch.tensor([1e30]))
    assert len(calibrator.counts) <= 1 << 16 and calibrator.counts.sum() == 4
    calibrator.reset()
    assert calibrator.counts is None and calibrator.compute_amax("mse") is None


def test_skipped_zeros_do_not_count() -> None:
    for skip, expected in ((True, 1), (False, 101)):
        calibrator = HistogramCalibrator(8, None, False, skip_zeros=skip)
        calibrator.collect(torch.zeros(100))
        calibrator.collect(torch.tensor([3.0]))
        assert calibrator.counts.sum() == expected


def collected(bins: int, num_bits: Any = 8, unsigned: bool = False, seed: int = 0) -> HistogramCalibrator:
    calibrator = HistogramCalibrator(num_bits, None, unsigned, num_bins=bins)
    for k in range(3):
        x = data(seed + k, 2000) * (1 + k)
        calibrator.collect(x.abs() if unsigned else x)
    return calibrator


@pytest.mark.parametrize("percentile", [0, 50, 90, 99.0, 99.99, 100])
def test_percentile(percentile: float) -> None:
    calibrator = collected(512)
    counts, edges = calibrator.counts.numpy(), calibrator.bin_edges.numpy()
    below, expected = 0, None
    for count, edge in zip(counts, edges[1:], strict=True):
        below += count
        if expected is None and below >= counts.sum() * percentile / 100:
            expected = edge
    got = calibrator.compute_amax("percentile", percentile=percentile)
    assert got.shape == () and got.item() == np.float32(expected)
    every = np.abs(np.concatenate([data(k, 2000).numpy() * (1 + k) for k in range(3)]))
    assert (every <= got.item() * (1 + 1e-6)).mean() >= percentile / 100


def kl(p: np.ndarray, q: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(p / p.sum(), q / q.sum() if q.sum() else q, strict=True):
        if a > 0:
            total += a * math.log(a / b) if b > 0 else math.inf
    return total


def entropy_by_loops(counts: np.ndarray, levels: int, stride: int, start: int) -> int:
    """How many bins to keep, by TensorRT's description: clip, merge into levels, spread out again, compare."""
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    best, kept = math.inf, 0
    for i in range(start, len(bins) + 1, stride):
        p = bins[:i].copy()
        p[i - 1] += bins[i:].sum()
        sums, members = [0.0] * levels, [0] * levels
        for k in range(i):
            if bins[k]:
                sums[k * levels // i] += bins[k]
                members[k * levels // i] += 1
        q = np.array([sums[k * levels // i] / members[k * levels // i] if bins[k] else 0.0 for k in range(i)])
        divergence = kl(p, q)
        if divergence <= best + 1e-12:
            best, kept = divergence, i
    return kept


@pytest.mark.parametrize(
    ("num_bits", "unsigned", "stride", "start", "bins"),
    [
        (8, False, 1, 128, 300),
        (4, False, 1, 8, 128),
        (4, True, 3, 16, 256),
        (2, False, 1, 128, 64),
        (8, True, 7, 128, 400),
    ],
    ids=str,
)
def test_entropy(num_bits: int, unsigned: bool, stride: int, start: int, bins: int) -> None:
    calibrator = collected(bins, num_bits, unsigned)
    counts, edges = calibrator.counts.numpy(), calibrator.bin_edges.numpy()
    levels = 2 ** (num_bits - 1 + unsigned)
    kept = entropy_by_loops(counts, levels, stride, min(start, len(counts) - 1))
    got = calibrator.compute_amax("entropy", stride=stride, start_bin=start)
    assert got.item() == np.float32(edges[kept])
    assert calibrator.compute_amax(stride=stride, start_bin=start) == got  # the default method


def test_entropy_cuts_an_outlier_off() -> None:
    calibrator = HistogramCalibrator(8, None, False)
    calibrator.collect(torch.cat([data(0, 20000, tail=False), torch.tensor([60.0])]))
    assert 2 < calibrator.compute_amax("entropy", stride=8) < 20


def mse_by_loops(
    counts: np.ndarray, edges: np.ndarray, num_bits: Any, unsigned: bool, stride: int, start: int
) -> float:
    centres = (edges[1:] + edges[:-1]) / 2
    best, found = math.inf, 0.0
    for amax in centres[start::stride]:
        if isinstance(num_bits, int):
            top = 2 ** (num_bits - 1 + unsigned) - 1
            y = np.clip(np.rint(centres * (top / amax)), 0, top) / (top / amax)
        else:
            scaled = np.clip(centres * (448 / amax), 0, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
            y = scaled * (amax / 448)
        error = float((((y - centres) ** 2) * counts).sum())
        if error < best * (1 - 1e-12):
            best, found = error, amax
    return found


@pytest.mark.parametrize(
    ("num_bits", "unsigned", "stride", "start"),
    [(8, False, 1, 128), (4, False, 1, 8), (4, True, 5, 3), ((4, 3), False, 2, 128)],
    ids=str,
)
def test_mse(num_bits: Any, unsigned: bool, stride: int, start: int) -> None:
    calibrator = collected(512, num_bits, unsigned)
    counts, edges = calibrator.counts.numpy(), calibrator.bin_edges.numpy()
    expected = mse_by_loops(counts, edges, num_bits, unsigned, stride, start)
    assert calibrator.compute_amax("mse", stride=stride, start_bin=start).item() == np.float32(expected)


@pytest.mark.parametrize("method", ["entropy", "percentile", "mse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_method_takes_every_dtype_and_few_bins(dtype: torch.dtype, method: str) -> None:
    calibrator = HistogramCalibrator(8, None, False, num_bins=16)
    x = data(0, 4, 6, 8, dtype=dtype)
    calibrator.collect(x.transpose(0, 2))
    amax = calibrator.compute_amax(method)
    assert amax.dtype == torch.float32 and amax.shape == () and 0 < amax <= x.abs().max().float() * 1.001


def test_calibrators_copy_and_pickle() -> None:
    for calibrator in (collected(64), MaxCalibrator(8, 0, False)):
        if isinstance(calibrator, MaxCalibrator):
            calibrator.collect(data(0, 3, 4))
        for other in (copy.deepcopy(calibrator), pickle.loads(pickle.dumps(calibrator))):
            assert torch.equal(other.compute_amax(), calibrator.compute_amax()) and repr(other) == repr(calibrator)
