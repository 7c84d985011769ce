"""The preflight's verdict: the bad node is named, and no other."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.jobs import preflight
from harness.jobs.preflight import Limits, NodeFacts, judge, rounds

LIMITS = Limits(gpus=8, min_free_gb=10, max_skew_s=2, min_gb_per_s=1, min_share=0.5)
NODES = ["n1", "n2", "n3"]


def _facts(node: str, **changes: object) -> NodeFacts:
    return NodeFacts(node, 8, "", {"/tmp": 50.0}, 1000.0, [5.0], None, {})._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 7, "broken": "cuda:3: Xid 79"}, "7 of 8 GPUs (cuda:3: Xid 79)"),
        ({"free_gb": {"/tmp": 3.0}}, "3.0 GB free in /tmp, not 10"),
        ({"clock_s": 1005.0}, "its clock is +5.0 s off"),
    ],
)
def test_the_bad_node_is_named(changes: dict[str, object], said: str) -> None:
    facts = [_facts("n1"), _facts("n2", **changes), _facts("n3")]
    assert judge(facts, NODES, LIMITS) == {"n2": said}
    assert judge([_facts(node) for node in NODES], NODES, LIMITS) == {}


def test_a_node_that_says_nothing_is_named() -> None:
    assert judge([_facts("n1"), _facts("n3")], NODES, LIMITS) == {"n2": "did not answer"}


def test_the_slow_node_is_the_one_without_a_fast_pair() -> None:
    slow = {"gb_per_s": [0.5]}  # an all-reduce is as slow for all as for the slowest
    facts = [
        _facts("n1", pairs_gb_per_s={"n2": 0.5, "n3": 4.0}, **slow),
        _facts("n2", pairs_gb_per_s={"n1": 0.5, "n3": 0.5}, **slow),
        _facts("n3", pairs_gb_per_s={"n1": 4.0, "n2": 0.5}, **slow),
    ]
    assert judge(facts, NODES, LIMITS) == {"n2": "0.5 GB/s with the best of the other nodes, not 2"}


def test_slow_together_and_fast_in_pairs_is_nobodys_fault_alone() -> None:
    fast = {"pairs_gb_per_s": {"other": 4.0}, "gb_per_s": [0.5]}
    assert set(judge([_facts(node, **fast) for node in NODES], NODES, LIMITS)) == set(NODES)


def test_nodes_judge_as_they_agreed_when_they_measured() -> None:
    """One fast value of one node is no measure: a GPU counts where it was slowest, and nobody measured pairs."""
    facts = [_facts("n1", gb_per_s=[41.0, 20.4]), _facts("n2", gb_per_s=[40.0, 20.3])]
    assert judge(facts, ["n1", "n2"], LIMITS) == {}
    # Negative control: one that is below half of 40, and was slow with the only other node.
    facts = [one._replace(gb_per_s=[40.0, 19.0], slow=1, pairs_gb_per_s={"other": 19.0}) for one in facts]
    assert set(judge(facts, ["n1", "n2"], LIMITS)) == {"n1", "n2"}


def test_a_script_of_an_earlier_version_still_runs() -> None:
    known = [
        "--seconds",
        "1",
        "--min-gb-per-s",
        "0.1",
        "--min-free-gb",
        "1",
        "--max-skew-s",
        "2",
        "--timeout-s",
        "9",
    ]
    assert preflight._options(["--results", "r", "--disk", "/tmp", "--gpus", "8", *known]).min_share == 0.5


def test_a_broken_rail_is_found_by_its_share_of_the_best() -> None:
    """GPU 3 of n2 has lost its network card: far above the absolute limit, and a tenth of what the others do."""
    rails = {"gb_per_s": [40.0, 41.0, 40.0, 4.0], "slow": 3}
    facts = [
        _facts("n1", pairs_gb_per_s={"n2": 4.0, "n3": 39.0}, **rails),
        _facts("n2", pairs_gb_per_s={"n1": 4.0, "n3": 4.0}, **rails),
        _facts("n3", pairs_gb_per_s={"n1": 39.0, "n2": 4.0}, **rails),
    ]
    assert judge(facts, NODES, LIMITS) == {"n2": "GPU 3: 4 GB/s with the best of the other nodes, not 20.5"}
    assert judge(facts, NODES, LIMITS._replace(min_share=0)) == {}


def test_rails_that_are_alike_are_good() -> None:
    facts = [_facts(node, gb_per_s=[40.0, 35.0, 28.0]) for node in NODES]
    assert judge(facts, NODES, LIMITS) == {}


@given(st.integers(2, 17))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count: int) -> None:
    schedule = rounds(count)
    for pairs in schedule:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    met = sorted(tuple(sorted(pair)) for pairs in schedule for pair in pairs)
    assert met == sorted(combinations(range(count), 2))
