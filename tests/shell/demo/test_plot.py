"""``curves.png``: which panels it has, what each line and point shows, and how it is written."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxquant.shell.demo import plot
from tests.shell.demo.made import of_runs, panel, run

KEPT = {"a.quantizers.weight": 40.0, "a.quantizers.relu": 20.0, "b.quantizers.weight": 30.0}


@pytest.fixture(autouse=True)
def matplotlib() -> Iterator[Any]:
    yield pytest.importorskip("matplotlib")


def series(axis: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The labelled lines of an axis."""
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def points(axis: Any) -> dict[str, list[tuple[float, float]]]:
    """The labelled points of an axis."""
    return {each.get_label(): [tuple(xy) for xy in each.get_offsets().tolist()] for each in axis.collections}


# --- the file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("panels", [[panel("cnn")], [panel("cnn"), panel("vit", sites=0)]])
def test_plot_is_written_and_nothing_else(panels: list[plot.Panel], tmp_path: Path) -> None:
    plot.draw(panels, tmp_path / "curves.png")
    data = (tmp_path / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width == 992 * len(panels), "6.2 inches a net, of 160 dots"
    assert height == pytest.approx(160 * (2.9 + 0.165 * 15 + 0.3), abs=2), "15 rows: 6 and 7 sites, 2 headings"
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_a_plot_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(figure: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"\x89PN")
        raise OSError("disk is full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    (tmp_path / "curves.png").write_bytes(b"old")
    with pytest.raises(OSError, match="disk is full"):
        plot.draw([panel("cnn")], tmp_path / "curves.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"curves.png": b"old"}


def test_drawing_leaves_the_style_of_others_alone(tmp_path: Path, matplotlib: Any) -> None:
    before = dict(matplotlib.rcParams)
    plot.draw([of_runs(run(KEPT))], tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


# --- panels --------------------------------------------------------------------------------------------


def test_a_column_for_each_net_in_order() -> None:
    axes = plot.compose([panel("vit"), panel("cnn"), panel("own")]).axes
    assert [axis.get_title(loc="left") or axis.get_title() for axis in axes] == [
        "Vision transformer", "Residual CNN", "own", "", "", "",
    ]  # fmt: skip
    assert [axis.get_xlabel() for axis in axes] == [
        *["epoch, QAT after the line"] * 3,
        *["SQNR after QAT [dB], higher is closer to float"] * 3,
    ]
    tops = [axis.get_subplotspec().rowspan.start for axis in axes]
    assert tops == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("sites", "rows"), [(2, 12), (20, 43)])
def test_a_figure_is_as_tall_as_its_sites_need(sites: int, rows: int) -> None:
    figure = plot.compose([panel("cnn", sites=sites), panel("vit", sites=1)])
    assert figure.get_figheight() == pytest.approx(2.9 + 0.165 * rows + 0.3)
    assert figure.get_figwidth() == pytest.approx(12.4)


def test_every_sqnr_of_every_net_is_inside_the_plot() -> None:
    near, far = panel("cnn", sites=2), panel("vit", sites=40)
    for panels in ([near, far], [far, near]):
        figure = plot.compose(panels)
        for axis in figure.axes[2:]:
            low, high = axis.get_xlim()
            shown = [x for points in axis.collections for x, _ in points.get_offsets()]
            assert shown and all(low < x < high for x in shown)
        assert figure.axes[2].get_xlim() == figure.axes[3].get_xlim(), "one scale for all"


# --- losses --------------------------------------------------------------------------------------------


def test_losses_go_on_where_float_training_stopped() -> None:
    axis = plot.compose([of_runs(run(KEPT), run(KEPT, "w4a8"))]).axes[0]
    assert series(axis) == {
        "float 99.0": ([1, 2, 3], [2.0, 1.0, 0.5]),
        "int8 97.0 → 98.5": ([4, 5], [0.2, 0.1]),
        "w4a8 97.0 → 98.5": ([4, 5], [0.2, 0.1]),
    }
    assert axis.get_yscale() == "log" and axis.get_ylabel() == "training loss [nats]"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(series(axis))
    (border,) = [line for line in axis.get_lines() if line.get_label().startswith("_")]
    assert list(border.get_xdata()) == [3.5, 3.5]


def test_recipes_are_told_apart_by_color_and_marker() -> None:
    runs = [run(KEPT, recipe) for recipe in ("int8", "w4a8", "fp8", "int4", "fifth")]
    losses, kept = plot.compose([of_runs(*runs)]).axes
    lines = [line for line in losses.get_lines() if "→" in line.get_label()]
    looks = [(line.get_color(), line.get_marker()) for line in lines]
    assert looks[:4] == list(zip(plot.COLORS, plot.MARKERS, strict=True)) and looks[4] == looks[0]
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 4
    from matplotlib.colors import to_hex

    found = [to_hex(each.get_facecolor()[0]).upper() for each in kept.collections]
    assert found == [color for color, _ in looks], "in both panels the same"


# --- sites ---------------------------------------------------------------------------------------------


def test_a_point_for_each_site_and_recipe() -> None:
    """Rows: weights (0), a (1), b (2), activations (3), a.relu (4)."""
    other = {"a.quantizers.weight": 10.0, "a.quantizers.relu": float("inf")}
    axis = plot.compose([of_runs(run(KEPT), run(other, "w4a8"))]).axes[1]
    assert points(axis) == {"int8": [(40.0, 1.0), (30.0, 2.0), (20.0, 4.0)], "w4a8": [(10.0, 1.0)]}
    joins = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]
    assert joins == [([10.0, 40.0], [1, 1]), ([30.0, 30.0], [2, 2]), ([20.0, 20.0], [4, 4])]
    labels = axis.get_yticklabels()
    assert [label.get_text() for label in labels] == ["weights", "a", "b", "activations", "a.relu"]
    assert [label.get_fontweight() for label in labels] == ["bold", "normal", "normal", "bold", "normal"]
    shaded = [(patch.get_y(), patch.get_height()) for patch in axis.patches]
    assert shaded == [(-0.5, 1.0), (2.5, 1.0)], "the headings"
    low, high = axis.get_ylim()
    assert low > 4 and high < 0, "the first row is on top"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["int8", "w4a8"]


def test_a_net_without_sites_has_an_empty_panel() -> None:
    axis = plot.compose([of_runs(run({}))]).axes[1]
    assert axis.get_legend() is None and list(axis.get_yticks()) == []
    assert points(axis) == {"int8": []}


def test_a_net_without_runs_shows_its_float_training() -> None:
    losses, kept = plot.compose([of_runs()]).axes
    assert list(series(losses)) == ["float 99.0"] and points(kept) == {}


def test_plot_lists_weights_then_activations_once_each() -> None:
    listed = plot.rows(panel("cnn", sites=2).runs)
    assert [name for _, name in listed] == [
        "weights", "block0.conv1", "block1.conv1", "activations", "block0.relu", "block1.relu", "q.exact",
    ]  # fmt: skip


def test_sites_that_only_a_later_recipe_has_are_listed() -> None:
    listed = plot.rows([run({"a.quantizers.relu": 1.0}), run({"b.quantizers.relu": 2.0, "a.quantizers.relu": 3.0})])
    assert listed == [("", "activations"), ("a.quantizers.relu", "a.relu"), ("b.quantizers.relu", "b.relu")]
    assert plot.rows([]) == []


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("quantizers.weight", True),
        ("attn.quantizers.in_proj_weight", True),
        ("weight.quantizers.relu", False),
        ("fc.quantizers.weight_1", False),
    ],
)
def test_keys_of_weights(key: str, expected: bool) -> None:
    assert plot.is_weight(key) is expected


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("layer1.0.conv1.quantizers.weight", "layer1.0.conv1"),
        ("block1.quantizers.relu_1", "block1.relu_1"),
        ("attn.quantizers.in_proj_weight", "attn.in_proj_weight"),
        ("quantizers.weight", "weight"),
        (f"quantizers.{'x' * 34}", "x" * 34),
        (f"quantizers.{'a' * 17}b{'c' * 17}", f"{'a' * 16}…{'c' * 17}"),
    ],
)
def test_readable_site_names(key: str, name: str) -> None:
    assert plot.readable(key) == name


def test_a_long_site_name_loses_its_middle() -> None:
    name = plot.readable("encoder." * 9 + "quantizers.scaled_dot_product_attention")
    assert len(name) == 34 and name.startswith("encoder.") and name.endswith("attention")
    assert plot.readable("one.two.three", longest=7) == "one…ree"
