"""An optimizer of one's own is found in the working folder, and no stranger's package is ever advised."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import checks, compose, optimizer_checks
from harness.errors import InputError

CODE = "import torch\n\n\nclass SignSGD(torch.optim.Optimizer):\n    pass\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "myopt.py").write_text(CODE)
    (tmp_path / "mine/rules").mkdir(parents=True)
    (tmp_path / "mine/rules/sign.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("class SignSGD(:\n")
    (tmp_path / "made.py").write_text("import torch\nSignSGD = type('SignSGD', (torch.optim.SGD,), {})\n")
    (tmp_path / "elsewhere.py").write_text("from myopt import *\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(target: str) -> str:
    with pytest.raises(InputError) as caught:
        optimizer_checks.check_target(target)
    return str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        "myopt.SignSGD",
        "mine.rules.sign.SignSGD",
        "made.SignSGD",
        "elsewhere.SignSGD",
        "torch.optim.SGD",
        "json.X",
    ],
)
def test_what_is_here_is_accepted(folder: Path, target: str) -> None:
    optimizer_checks.check_target(target)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("nowhere.SignSGD", ["not installed", "nowhere.py"]),
        ("myop.SignSGD", ["fix: optimizer=myopt.SignSGD"]),
        ("myopt.SignSDG", ["names the class SignSDG", "myopt.py", "fix: optimizer=myopt.SignSGD"]),
        ("broken.SignSGD", ["broken.py, line 1", "does not parse"]),
        ("x" * 300 + ".Y", ["not installed"]),
        ("myopt", ["an import path"]),
        ("my-opt.X", ["an import path"]),
    ],
)
def test_what_is_not_here_says_where_it_was_looked_for(folder: Path, target: str, parts: list[str]) -> None:
    text = refusal(target)
    assert all(part in text for part in parts), text
    assert "pip install" not in text


def test_the_folder_is_named(folder: Path) -> None:
    assert str(folder) in refusal("nowhere.SignSGD")
    (folder / "nowhere.py").write_text(CODE)
    optimizer_checks.check_target("nowhere.SignSGD")


def test_a_package_of_the_documentation_may_be_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_checks, "_find", lambda package, folder: None)
    assert "fix: pip install pytorch-optimizer" in refusal("pytorch_optimizer.SOAP")
    assert "pip install" not in refusal("pytorch_optimizers.SOAP")


CLASSIFY = ("task=classify", "task.text=[a]", "task.label=b", "data=jsonl", "data.files=[t]")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((*CLASSIFY, "data.validation_files=[v]"), "those of task=classify are padded"),
        (("model.adapter=lora",), "are frozen next to an adapter"),
        (("optimizer.matrix_modules=[v_proj,q_proj]",), "leaves out model.layers.0.self_attn.k_proj.weight"),
    ],
)
def test_logits_are_clipped_where_they_are_those_of_pretraining(words: tuple[str, ...], reason: str) -> None:
    words = ("optimizer=muon_clip", "optimizer.lr=0.001", *words)
    with pytest.raises(InputError, match=rf"optimizer.qk_clip_threshold.*{reason}"):
        checks.check(compose.load(words), {}, 0)
    # Control: without the threshold, and with the projections.
    checks.check(compose.load((*words, "optimizer.qk_clip_threshold=null")), {}, 0)
    checks.check(compose.load(("optimizer=muon_clip", "optimizer.matrix_modules=[q_proj,k_proj]")), {}, 0)
