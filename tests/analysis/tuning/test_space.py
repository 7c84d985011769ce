"""Spaces, ladders and edges against values worked out by hand."""

import math

import pytest

from analysis.tuning import space
from analysis.tuning.space import Axis
from harness.errors import InputError


def axis(text: str, key: str = "lr") -> Axis:
    found = space.parse(key, key, text)
    assert found is not None
    return found


def test_lists_ranges_and_single_values() -> None:
    assert axis("1e-4,3e-4").values == ("1e-4", "3e-4")
    assert axis("[0.9,0.95],[0.9,0.99]", "betas").values == ("[0.9,0.95]", "[0.9,0.99]")
    assert (axis("1e-4..1e-2").low, axis("1e-4..1e-2").high) == (1e-4, 1e-2)
    assert axis("0.5..2.5").high == 2.5
    for text in ("1e-3", "[0.9,0.95]", "svd", "'a,b'"):
        assert space.parse("x", "x", text) is None


@pytest.mark.parametrize("text", ["1e-2..1e-4", "0..1", "a..b", "1..", "1e-3,1e-3", "0.001,1e-3", "1,,2"])
def test_spaces_that_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="lr"):
        space.parse("lr", "lr", text)


def test_the_ladder_begins_at_the_default_and_goes_outwards() -> None:
    rates = [float(point["lr"]) for point in space.ladder({"lr": 0.02}, 5)]
    assert rates == pytest.approx([0.02, 0.01, 0.04, 0.005, 0.08])
    assert space.ladder({"lr": 0.02, "aux_lr": 0.016}, 2)[1] == {"lr": "0.01", "aux_lr": "0.008"}


def test_one_axis_is_tried_from_the_middle_out() -> None:
    tried = space.points("a", [axis("1,2,3,4,5")], 5, 0)
    assert [point["lr"] for point in tried] == ["3", "2", "4", "1", "5"]
    cut = sorted(float(point["lr"]) for point in space.points("a", [axis("1e-4..1e-2")], 5, 0))
    assert cut == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2], rel=1e-5)


def test_two_axes_are_a_grid_where_it_fits_and_else_quasi_random() -> None:
    axes = [axis("1,2"), axis("8,16,32", "rank")]
    grid = space.points("a", axes, 6, 0)
    assert {(point["lr"], point["rank"]) for point in grid} == {
        (a, b) for a in "12" for b in ("8", "16", "32")
    }
    drawn = space.points("a", axes, 4, 0)
    assert len({tuple(point.values()) for point in drawn}) == 4
    assert drawn == space.points("a", axes, 5, 0)[:4], "more trials keep the ones that were made"
    ranges = [axis("1e-4..1e-2"), axis("0.01..1", "weight_decay")]
    rates = [float(point["lr"]) for point in space.points("a", ranges, 16, 0)]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    # Low discrepancy: each quarter of the logarithmic range has its share.
    quarters = [int((math.log10(rate) + 4) * 2) for rate in rates]
    assert all(3 <= quarters.count(quarter) <= 5 for quarter in range(4))
    assert space.points("a", ranges, 4, 0) != space.points("a", ranges, 4, 1)


@pytest.mark.parametrize(("texts", "trials"), [(["1,2"], 3), (["1,2,3,4"], 3), (["1,2", "3,4"], 5)])
def test_a_space_of_another_size_is_refused(texts: list[str], trials: int) -> None:
    axes = [axis(text, f"key{i}") for i, text in enumerate(texts)]
    with pytest.raises(InputError, match=r"mine.*budgets must be equal"):
        space.points("mine", axes, trials, 0)


def test_edges() -> None:
    tried = [{"lr": "1"}, {"lr": "2"}, {"lr": "4"}]
    assert space.edges({"lr": "4"}, tried, ()) == {"lr": "highest"}
    assert space.edges({"lr": "1"}, tried, ()) == {"lr": "lowest"}
    assert space.edges({"lr": "2"}, tried, ()) == {}
    decay = axis("0,0.1", "weight_decay")
    points = [{"weight_decay": "0"}, {"weight_decay": "0.1"}]
    assert space.edges(points[0], points, [decay]) == {}, "there is nothing below 0"
    assert space.edges(points[1], points, [decay]) == {"weight_decay": "highest"}
    words = [{"basis": "svd"}, {"basis": "randomized"}]
    assert space.edges(words[0], words, [axis("svd,randomized", "basis")]) == {}


def test_samples_of_a_range_are_judged_by_its_ends_and_not_by_each_other() -> None:
    axes = [axis("1e-4..1e-2"), axis("1e-2..1", "weight_decay")]
    tried = [{"lr": "0.0005", "weight_decay": "0.1"}, {"lr": "0.002", "weight_decay": "0.9"}]
    assert space.edges(tried[0], tried, axes) == {}
    assert space.edges(tried[1], tried, axes) == {"weight_decay": "highest"}


def test_the_next_point_is_past_the_edge_or_beside_the_best() -> None:
    assert float(space.beyond({"lr": "4"}, [1, 2, 4], [3, 2, 1])["lr"]) == 8
    assert float(space.beyond({"lr": "1"}, [1, 2, 4], [1, 2, 3])["lr"]) == 0.5
    inside = space.beyond({"lr": "2", "aux_lr": "20"}, [1, 2, 4], [3.0, 1.0, 2.0])
    assert float(inside["lr"]) == pytest.approx(2 * math.sqrt(2), rel=1e-5)
    assert float(inside["aux_lr"]) == pytest.approx(20 * math.sqrt(2), rel=1e-5)
    diverged_above = space.beyond({"lr": "2"}, [1, 2, 4], [3.0, 1.0, math.inf])
    assert float(diverged_above["lr"]) == pytest.approx(math.sqrt(2), rel=1e-5)
