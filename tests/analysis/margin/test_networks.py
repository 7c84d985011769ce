"""Modes `mlp` and `head` on small real networks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch import nn

from analysis.margin import checkpoints, command, head, mlp
from analysis.margin.config import MarginConfig, load
from analysis.margin.input_margins import functional_margins
from harness.checkpoint import files, store
from harness.config import compose
from harness.errors import InputError
from harness.model import build
from optimizers.named_state import StatePiece
from tests.faults import forked
from tests.harness.running import small, write_documents


def quiet(_: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """Two optimizers on digits, a small net."""
    words = ["mode=mlp", "optimizer=spectral,adam", "hidden=32", "steps=150", "max_samples=6", "record=1"]
    margin_config = load([*words, "adam.lr=0.03", "spectral.lr=0.05"])
    return {run.optimizer: run for run in mlp.run_mlp(margin_config, quiet)}


def test_networks_are_trained_and_bracketed(trained: dict[str, Any]) -> None:
    for run in trained.values():
        assert [row["t"] for row in run.rows] == [1.0, 10.0, 100.0, 150.0]
        first, last = run.rows[0], run.rows[-1]
        assert last["log_loss"] < first["log_loss"]
        assert last["train_accuracy"] > 0.95
        assert all(row["bracket_holds"] for row in run.rows)
        for norm in ("l2", "linf"):
            assert 0.0 < last[f"lower_{norm}_q50"] <= last[f"upper_{norm}_q50"] < 5.0
        # ‖δ‖∞ ≤ ‖δ‖₂ ≤ 8‖δ‖∞ in R^64.
        assert last["upper_linf_q50"] < last["upper_l2_q50"] < 8.0 * last["upper_linf_q50"] * 1.1
        assert last["margin"] == last["upper_l2_q50"]


def test_spectral_descent_has_the_larger_spectral_margin(trained: dict[str, Any]) -> None:
    spectral, adam = (trained[name].rows[-1]["norm_margin_spec"] for name in ("spectral", "adam"))
    assert spectral > adam


def test_digits_are_split_once() -> None:
    found = mlp.load_digits()
    assert (len(found.train_y), len(found.test_y)) == (1000, 797)
    assert found.train_x.shape == (1000, 64)
    assert (float(found.train_x.min()), float(found.train_x.max())) == (0.0, 1.0)
    assert torch.bincount(found.train_y).min() > 80
    both = torch.cat([found.train_x, found.test_x])
    assert len(torch.unique(both, dim=0)) == len(both) or len(both) == 1797


def test_the_loss_keeps_its_gradient_where_probabilities_round_to_one() -> None:
    scores = torch.zeros(1, 3, dtype=torch.float64)
    scores[0, 1] = 200.0
    scores.requires_grad_()
    loss = mlp.log_cross_entropy(scores, torch.tensor([1]))
    assert loss.item() == pytest.approx(-200.0 + math.log(2.0), rel=1e-12)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([0.5, -1.0, 0.5])
    plain = nn.functional.cross_entropy(scores.detach(), torch.tensor([1]))
    assert plain.item() == 0.0
    small_ = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = small_.argmin(1)
    expected = nn.functional.cross_entropy(small_, labels).log()
    assert mlp.log_cross_entropy(small_, labels).item() == pytest.approx(expected.item(), rel=1e-12)


def test_head_margins_are_distances() -> None:
    """Move the feature by the margin towards the nearest rival: a tie; by 1 % less: none."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    h = torch.randn(9, 5, dtype=torch.float64, generator=generator)
    scores = h @ weight.mT
    labels = scores.argmax(1)
    for norm in ("l2", "linf"):
        found = head.head_margins(h, labels, weight, scores, norm)
        for point, label, radius in zip(h, labels, found):
            ties = []
            for c in range(7):
                if c == int(label):
                    continue
                way = weight[c] - weight[label]
                unit = way / way.norm() if norm == "l2" else way.sign()
                for share, sign in ((1.0 + 1e-9, "beyond"), (0.99, "before")):
                    moved = (point + share * radius * unit) @ weight.mT
                    ties.append((sign, bool(moved.argmax() == label)))
            assert ("beyond", False) in ties
            assert ("before", False) not in ties


def our_checkpoint(folder: Path, config: Any, step: int, seed: int) -> Path:
    """A checkpoint as a run would write it, with weights that predict something."""
    target = store.Store(folder)
    partial = target.partial(step, "1")
    partial.mkdir(parents=True)
    model = build(config.model, seed=seed)
    pieces = [
        StatePiece(name, "weight", tuple(p.shape), None, 0, p.detach().clone(), True)
        for name, p in model.named_parameters()
    ]
    files.write(partial, 0, pieces, {}, {})
    (partial / "config.yaml").write_text(compose.to_yaml(config))
    target.commit(step, partial, {"step": step, "world_size": 1, "identity": "x"})
    return target.folder(step)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """A run's configuration on a small corpus."""
    from harness.config import checks

    corpus = write_documents(tmp_path)
    return checks.check(compose.load(small(corpus, tmp_path / "runs", "optimizer=muon")))


def test_heads_of_our_checkpoints(tmp_path: Path, config: Any) -> None:
    for step in (5, 20):
        our_checkpoint(tmp_path / "run", config, step, seed=step)
    margin_config = load(["mode=head", f"checkpoints='{tmp_path}/run/checkpoints/step_*'", "max_samples=20"])
    (run,) = head.run_head(margin_config, quiet)
    assert run.optimizer == "muon"
    assert [row["t"] for row in run.rows] == [5.0, 20.0]
    # The weights that were read are those that were written.
    model: Any = build(config.model, seed=20).double().eval()
    loaded = checkpoints.load_checkpoint(tmp_path / "run/checkpoints/step_00000020", 20, margin_config, quiet)
    with torch.no_grad():
        scores = model(input_ids=loaded.ids).logits.flatten(0, 1)
    used = loaded.labels.flatten() != -100
    right = functional_margins(scores, loaded.labels.flatten().clamp_min(0))[used] > 0.0
    assert run.rows[1]["accuracy"] == pytest.approx(float(right.double().mean()))
    for row in run.rows:
        assert (row["margin"] is None) == (row["accuracy"] == 0.0)


def test_the_head_of_a_run_from_its_training_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that a process trained, in the folder that its users have."""
    monkeypatch.chdir(tmp_path)
    corpus = write_documents(tmp_path)
    keys = ("steps=40", "checkpoint.every=20", "optimizer=adamw", "optimizer.lr=3e-3", "group=g", "name=n")
    words = small(corpus, tmp_path / "runs", *keys)
    said = tmp_path / "said.txt"
    assert forked.trained(words, 1, said) == [0], said.read_text()
    pattern = "checkpoints='runs/g/n/checkpoints/step_*'"
    assert command.main(["mode=head", pattern, "wandb.mode=disabled", "--json", "--out", "out"]) == 0
    found = json.loads(capsys.readouterr().out)
    (run,) = found["runs"]
    assert (run["optimizer"], run["status"], run["checkpoints"]) == ("adamw", "ok", 2)
    assert [row["t"] for row in run["trajectory"]] == [20.0, 40.0]
    (row,) = found["table"]
    assert row["accuracy"] > 0.0
    assert 0.0 < row["head_linf_q50"] < row["head_l2_q50"]
    assert 0.0 < row["embedding_upper_linf_q50"] < row["embedding_upper_l2_q50"]
    assert "where it predicts the token" in found["sentence"]
    assert "upper bounds" in (tmp_path / "out" / "report.html").read_text()
    # A second run of the same optimizer is another curve.
    copytree(tmp_path / "runs" / "g" / "n", tmp_path / "runs" / "g" / "m")
    with pytest.raises(InputError, match=r"matches two runs of adamw: .*fix: a pattern that matches one"):
        command.main(["mode=head", "checkpoints='runs/g/*/checkpoints/step_*'", "wandb.mode=disabled"])
    assert head.run_head(load(["mode=head", pattern, "optimizer_label=mine"]), quiet)[0].optimizer == "mine"


def hugging_face(folder: Path, size: int = 16) -> Path:
    """A tiny LLaMA with a word tokenizer, trained for a moment so that some tokens are right."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": size,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=6, num_key_value_heads=2, **shape))
    ids = torch.arange(5).repeat(40)[None] % 5
    stepper = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        stepper.zero_grad()
        loss: Any = model(input_ids=ids[:, :64], labels=ids[:, :64]).loss
        loss.backward()
        stepper.step()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdex")}, unk_token="x"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="x").save_pretrained(folder)
    return folder


def test_heads_of_hugging_face_folders(tmp_path: Path) -> None:
    hugging_face(tmp_path / "llama" / "checkpoint-40")
    (tmp_path / "text.txt").write_text("a b c d e " * 60)
    words = ["mode=head", f"checkpoints='{tmp_path}/llama/checkpoint-*'", f"data={tmp_path}/text.txt"]
    (run,) = head.run_head(load(words), quiet)
    (row,) = run.rows
    assert row["accuracy"] > 0.9
    assert row["head_l2_q50"] > row["head_linf_q50"] > 0.0
    # To change a token a perturbation of the input has to move the feature over the head's boundary.
    assert 0.0 < row["embedding_upper_l2_relative_q50"] < 50.0
    assert row["embedding_attacked"] > 0
    assert run.facts["own_norms"].keys() == {"l2", "sign", "spectral"}


def test_bad_checkpoints(tmp_path: Path, config: Any) -> None:
    def refused(pattern: str, part: str, data: str = "x.txt") -> None:
        margin_config = MarginConfig(mode="head", checkpoints=str(tmp_path / pattern), data=data)
        with pytest.raises(InputError, match=part):
            head.run_head(margin_config, quiet)

    refused("nothing*", "matches no folder")
    (tmp_path / "empty").mkdir()
    refused("empty", "is not a checkpoint")
    for name, width in (("a_step1", 16), ("b_step2", 32), ("stepless", 16)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(
            json.dumps({"model_type": "llama", "hidden_size": width})
        )
    refused("stepless", "has no step")
    refused("?_step?", "mixes architectures: a_step1 and b_step2 differ in hidden_size")
    refused("a_step1", "does not exist")
    damaged = our_checkpoint(tmp_path / "run", config, 5, seed=0)
    with (damaged / "rank_00000.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    refused("run/checkpoints/step_*", "is damaged: .*changed since it was written")


@pytest.mark.parametrize(
    "damage",
    [
        "manifest",
        "bomb",
        pytest.param("config", marks=pytest.mark.slow),
        pytest.param("weights", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_said_and_the_others_are_measured(
    tmp_path: Path, config: Any, damage: str
) -> None:
    for step in (5, 20):
        our_checkpoint(tmp_path / "run", config, step, seed=step)
    folder = tmp_path / "run" / "checkpoints" / "step_00000020"
    if damage == "manifest":
        (folder / "manifest.json").write_text("[]")
    elif damage == "config":
        (folder / "config.yaml").write_text("a: [")
    elif damage == "bomb":
        (folder / "config.yaml").write_text("a: &a {b: *a}")
    else:
        path = next(folder.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-9])
    margin_config = load(["mode=head", f"checkpoints='{tmp_path}/run/checkpoints/step_*'", "max_samples=20"])
    said: list[str] = []
    (run,) = head.run_head(margin_config, said.append)
    assert [row["t"] for row in run.rows] == [5.0]
    assert len([line for line in said if line.startswith("left out: ") and "step_00000020" in line]) == 1
    alone = load(["mode=head", f"checkpoints='{tmp_path}/run/checkpoints/step_00000020'", "max_samples=20"])
    with pytest.raises(InputError):
        head.run_head(alone, quiet)
