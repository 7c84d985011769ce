"""The arguments that `optbench compare` understands, and those that it refuses."""

import pytest

from analysis.compare import arguments
from harness.errors import InputError


def test_arms_seeds_and_shared_words() -> None:
    plan = arguments.plan(
        ["adamw", "sumo", "seeds=2", "steps=50", "sumo.rank=32", "group=mine", "preset=quickstart"]
    )
    assert [arm.label for arm in plan.arms] == ["adamw", "sumo"]
    assert plan.seeds == [0, 1]
    assert plan.overrides(plan.arms[0], 1) == [
        "steps=50",
        "experiment=quickstart",
        "optimizer=adamw",
        "seed=1",
        "group=mine",
        "name=adamw-seed1",
    ]
    assert "optimizer.rank=32" in plan.overrides(plan.arms[1], 0)
    assert "optimizer.rank=32" not in plan.overrides(plan.arms[0], 0)


def test_three_seeds_unless_told_and_counted_from_seed() -> None:
    assert arguments.plan(["adamw", "seed=5"]).seeds == [5, 6, 7]


def test_a_group_of_its_own_unless_told() -> None:
    assert arguments.plan(["adamw"]).group.startswith("compare-2")


def test_the_command_can_be_pasted_into_a_shell() -> None:
    plan = arguments.plan(["adamw", "--json", "data.files=[a b.txt]"])
    assert plan.command == "optbench compare adamw 'data.files=[a b.txt]'"
    assert plan.as_json


def test_a_label_of_ones_own() -> None:
    plan = arguments.plan(["low", "high", "low.name=sumo", "low.rank=8", "high.name=sumo", "high.rank=64"])
    assert plan.arms[0].overrides == ("optimizer=sumo", "optimizer.rank=8")
    soap = arguments.plan(["soap", "soap.target=pytorch_optimizer.SOAP", "soap.lr=3e-3"]).arms[0]
    assert soap.overrides == (
        "optimizer.name=soap",
        "optimizer.target=pytorch_optimizer.SOAP",
        "optimizer.lr=3e-3",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"names no optimizer.*allowed: .*sumo"),
        (["steps=5"], r"names no optimizer"),
        (["adamw", "sumoo"], r"sumoo is not an optimizer; did you mean sumo\?"),
        (["adamw", "adamw"], r"adamw is named twice"),
        (["adamw", "seeds=0"], r"seeds: 0"),
        (["adamw", "seeds=two"], r"seeds: two"),
        (["adamw", "seeds=2", "seeds=3"], r"seeds: 3 was already set to 2"),
        (["adamw", "seed=-1"], r"seed: -1"),
        (["adamw", "name=x"], r"would be the same for all runs.*group="),
        (["adamw", "optimizer=sumo"], r"fix: optbench compare adamw sumo"),
        (["adamw", "optimizer.name=sumo"], r"would be the same for all runs"),
        (["adamw", "sumo.rank=8"], r"belongs to sumo, which is not compared"),
        (["adamw", "--seeds=3"], r"--seeds=3 is not an option.*fix: seeds=3"),
        (["adamw", "--jsn"], r"--jsn.*did you mean --json"),
        (["x", "x.name=sumoo"], r"x.name: sumoo is not an optimizer; did you mean sumo\?"),
    ],
)
def test_words_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        arguments.plan(words)
