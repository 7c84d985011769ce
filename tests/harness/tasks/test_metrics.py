"""Metrics of tasks: values by hand, corner cases of the libraries, and what is refused before training."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from harness.errors import InputError
from harness.tasks.metrics import METRICS, check_defined, constant_prediction, default_metric, score

# 10 examples: 4 true positives, 1 false negative, 2 false positives, 3 true negatives.
REFERENCES = ["yes"] * 5 + ["no"] * 5
PREDICTIONS = ["yes"] * 4 + ["no"] + ["yes"] * 2 + ["no"] * 3


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("accuracy", ["no", "yes"], 7 / 10),
        ("f1", ["no", "yes"], 2 * 4 / (2 * 4 + 1 + 2)),
        ("f1", ["yes", "no"], 2 * 3 / (2 * 3 + 1 + 2)),  # the second class is the positive one
        ("matthews", ["no", "yes"], (4 * 3 - 2 * 1) / math.sqrt(6 * 5 * 5 * 4)),
    ],
)
def test_values_of_two_classes_are_those_of_the_confusion_matrix(
    name: str, labels: list[str], expected: float
) -> None:
    assert score(name, REFERENCES, PREDICTIONS, labels) == pytest.approx(expected, abs=1e-15)


def test_f1_of_three_classes_is_the_mean_over_classes() -> None:
    references, predictions = ["a", "a", "b", "c"], ["a", "b", "b", "b"]
    # F1 of a: 2/3; of b: 2 · 1 / (2 + 2 + 0) = 1/2; of c: 0.
    assert score("f1", references, predictions, ["a", "b", "c"]) == pytest.approx((2 / 3 + 1 / 2) / 3)


def test_correlations_are_those_of_the_formula_and_of_the_ranks() -> None:
    references, predictions = ["0", "1", "2", "3"], ["1.0", "2.0", "4.0", "100.0"]
    x, y = [0.0, 1, 2, 3], [1.0, 2, 4, 100]
    mx, my = sum(x) / 4, sum(y) / 4
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y))
    pearson = covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    assert score("pearson", references, predictions) == pytest.approx(pearson, abs=1e-15)
    assert score("spearman", references, predictions) == pytest.approx(1.0, abs=1e-15)
    assert score("spearman", references, predictions[::-1]) == pytest.approx(-1.0, abs=1e-15)


def test_exact_match_counts_equal_texts_and_an_absent_answer_as_wrong() -> None:
    assert score("exact_match", ["12", "7", "x"], ["12", "7.0", None]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_number_counts_as_zero_with_a_warning_and_a_divergence_as_nan(name: str) -> None:
    assert score(name, ["1", "2", "3"], ["0.1", "0.1", "0.1"]) == 0.0
    warning = constant_prediction(name, ["0.1", "0.1", "0.1"])
    assert warning is not None
    assert "0.1" in warning
    assert "counted as 0" in warning
    assert math.isnan(score(name, ["1", "2", "3"], ["0.1", "nan", "0.1"]))


@pytest.mark.parametrize(("name", "value"), [("matthews", 0.0), ("f1", 0.0), ("accuracy", 0.5)])
def test_a_constant_class_has_the_documented_value_and_a_warning(name: str, value: float) -> None:
    predictions = ["no"] * 10
    assert score(name, REFERENCES, predictions, ["no", "yes"]) == value
    assert "one class, no, is predicted for all 10 examples" in str(constant_prediction(name, predictions))
    assert constant_prediction(name, PREDICTIONS) is None


def test_numbers_closer_than_their_rounding_are_no_nan() -> None:
    value = score("pearson", ["1", "2", "3"], ["1e-320", "2e-320", "1e-320"])
    assert math.isfinite(value)


def test_control_constant_references_have_no_correlation() -> None:
    with pytest.raises(ValueError, match="all references are 2"):
        score("pearson", ["2", "2", "2"], ["1", "2", "3"])
    with pytest.raises(ValueError, match="2 references and 1 predictions"):
        score("accuracy", ["a", "b"], ["a"], ["a", "b"])


def test_default_metrics_follow_the_kind_of_target() -> None:
    assert default_metric("classify", ["a", "b"]) == "accuracy"
    assert default_metric("classify", None) == "pearson"
    assert default_metric("answer", None) == "exact_match"
    assert default_metric("pretrain", None) is None
    assert {metric.better for metric in METRICS.values()} == {"higher"}


@pytest.mark.parametrize(
    ("task", "name", "references", "labels", "words"),
    [
        ("classify", "acuracy", ["a", "b"], ["a", "b"], "did you mean accuracy?"),
        (
            "classify",
            "pearson",
            ["a", "b"],
            ["a", "b"],
            "is a metric of numbers, and task=classify predicts classes",
        ),
        ("classify", "accuracy", ["1", "2", "3"], None, "predicts numbers; allowed: pearson, spearman"),
        ("answer", "f1", ["1", "2"], None, "predicts answers; allowed: exact_match"),
        ("classify", "matthews", ["a"] * 9, ["a", "b"], "all 9 validation examples have the class a"),
        ("classify", "accuracy", [], ["a", "b"], "there are no validation examples"),
        ("classify", "pearson", ["1.0", "1", "1.00"], None, "all 3 validation examples have the number 1.0"),
        ("classify", "spearman", ["1", "2"], None, "±1 or undefined"),
    ],
)
def test_an_undefined_metric_is_refused_before_training(
    task: str, name: str, references: list[str], labels: list[str] | None, words: str
) -> None:
    with pytest.raises(InputError) as error:
        check_defined(task, name, references, labels)
    assert str(error.value).startswith(f"task.metric: {name} ")
    assert words in str(error.value)


def test_defined_metrics_pass() -> None:
    check_defined("classify", "matthews", ["a", "b"], ["a", "b"])
    check_defined("classify", "spearman", ["1", "2", "3"], None)
    check_defined("answer", "exact_match", ["12"], None)


def test_importing_metrics_loads_no_library() -> None:
    code = (
        "import sys, harness.tasks.metrics; print({'torch', 'sklearn', 'scipy', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"
