"""Modes `mlp` and `head` on small real networks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests
from torch import nn

from analysis.margin import checkpoints, command, head, mlp, robustness
from analysis.margin.config import MarginConfig, load
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


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_signed_margins_are_distances(norm: str) -> None:
    """Right: moved by the margin towards the nearest rival there is a tie, and by 1 % less there is none. Wrong: a move
    of 1 % less than the margin towards the label against any rival leaves that rival ahead or was not needed."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    h = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    labels = torch.randint(7, (40,), generator=generator)
    labels[::2] = (h @ weight.mT).argmax(1)[::2]
    found = robustness.signed_margins(h, labels, weight, None, norm)
    right = (h @ weight.mT).argmax(1) == labels
    assert torch.equal(found > 0.0, right)
    assert right.sum() < 40
    for point, label, radius in zip(h, labels, found):
        wins: dict[float, list[bool]] = {1.0 + 1e-9: [], 0.99: []}
        for c in set(range(7)) - {int(label)}:
            way = weight[c] - weight[label]
            unit = way / way.norm() if norm == "l2" else way.sign()
            for share, seen in wins.items():
                seen.append(bool(((point + share * radius * unit) @ (weight[label] - weight[c])) > 0.0))
        # A wrong label's margin is the distance to its worst rival's boundary alone: sufficient for no more than it.
        assert (False in wins[1.0 + 1e-9]) if radius > 0.0 else (False in wins[0.99])
        assert False not in wins[0.99] if radius > 0.0 else True


def test_classes_of_equal_weights_are_out_of_reach() -> None:
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    h, labels = torch.tensor([[3.0, 0.0]]), torch.tensor([0])
    bias = torch.tensor([1.0, 0.0, 0.0])
    assert robustness.signed_margins(h, labels, weight, bias, "l2").tolist() == [3.5]
    assert robustness.signed_margins(h, labels, weight, -bias, "l2").tolist() == [-math.inf]


def test_windows_are_cut_in_order() -> None:
    rows = torch.arange(14).view(2, 7)
    assert robustness.windows(rows, 3, 3).tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9]]


def test_paired_differences_are_those_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=64)
    by_window = {"a": (common + 0.1).tolist(), "b": (common + 0.05 * rng.normal(size=64)).tolist()}
    (row,) = head.paired_differences(by_window)
    oracle = stats.ttest_rel(by_window["a"], by_window["b"]).confidence_interval(0.95)
    interval = (row["mean signed margin low"], row["mean signed margin high"])
    assert interval == pytest.approx((oracle.low, oracle.high), rel=1e-9)
    # Unpaired windows would be too wide to see it.
    assert interval[0] > 0.0
    unpaired = stats.ttest_ind(by_window["a"], by_window["b"]).confidence_interval(0.95)
    assert unpaired.low < 0.0


def test_verdicts_on_many_pairs_are_adjusted_by_holms_method() -> None:
    rng = np.random.default_rng(1)
    by_window = {
        name: rng.normal(shift, 1.0, 64).tolist() for name, shift in zip("abcd", (0.0, 0.0, 0.4, 3.0))
    }
    rows = head.paired_differences(by_window)
    oracle = [
        stats.ttest_rel(by_window[a], by_window[b]).pvalue for a, b in ("ab", "ac", "ad", "bc", "bd", "cd")
    ]
    assert [row["p"] for row in rows] == pytest.approx(oracle, rel=1e-9)
    adjusted = np.asarray(multipletests(oracle, method="holm")[1])
    assert [row["p_holm"] for row in rows] == pytest.approx(adjusted.tolist(), rel=1e-9)
    for row in rows:
        if row["p_holm"] >= 0.05:
            assert row["verdict"] == "not settled"
        else:
            assert row["verdict"] == ("larger" if row["mean signed margin"] > 0.0 else "smaller")
    # Each p below 0.05 would be a verdict without the adjustment; at least one is none with it.
    assert any(row["p"] < 0.05 and row["verdict"] == "not settled" for row in rows)
    assert {row["verdict"] for row in rows} >= {"not settled", "smaller"}


def test_one_window_has_no_interval() -> None:
    (row,) = head.paired_differences({"a": [1.0], "b": [0.5]})
    assert row["mean signed margin"] == 0.5
    ends = ("mean signed margin low", "mean signed margin high", "p", "p_holm")
    assert [row[key] for key in ends] == [None] * 4
    assert row["verdict"] == "not settled"
    one = head._with_interval("x", np.array([[1.0, 2.0, 4.0]]))  # pyright: ignore[reportPrivateUsage]
    assert one == {"x": 2.0, "x low": None, "x high": None}
    assert head.paired_differences({"a": [1.0, 2.0]}) == []


def test_optimizers_are_paired_at_their_last_common_step(
    tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(step, our_checkpoint(tmp_path / "run", config, step, seed=step)) for step in (5, 20)]
    steps = [*found, found[0]]
    genuine = checkpoints.load_checkpoint
    monkeypatch.setattr(head, "find_checkpoints", lambda *_: steps)
    seen: list[str] = []

    def labelled(*args: Any) -> checkpoints.LoadedCheckpoint:
        seen.append("sumo" if len(seen) == 2 else "muon")
        return genuine(*args)._replace(optimizer=seen[-1])

    monkeypatch.setattr(head, "load_checkpoint", labelled)
    margin_config = load(["mode=head", "norms=l2"])
    runs = head.run_head(margin_config, quiet)
    assert [[row["t"] for row in run.rows] for run in runs] == [[5.0, 20.0], [5.0]]
    assert [run.facts["paired_at"] for run in runs] == [5.0, 5.0]
    report = head.report(margin_config, runs)
    (row,) = report.more["differences_on_the_same_tokens_l2"]
    # The same weights on the same windows: step 20 against step 5 would differ.
    assert (row["step"], row["mean signed margin"], row["verdict"]) == (5.0, 0.0, "not settled")
    assert "pairs of optimizers are compared at step 5" in report.notes[-1]
    seen.clear()
    steps[:] = [found[0], found[1], found[1]][::2]
    monkeypatch.setattr(
        head,
        "load_checkpoint",
        lambda path, step, *rest: genuine(path, step, *rest)._replace(optimizer=str(step)),
    )
    apart = head.report(margin_config, head.run_head(margin_config, quiet))
    assert apart.more == {}
    assert "no step in common" in apart.notes[-1]


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


@pytest.fixture(autouse=True)
def _few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight windows: an attack is a hundred passes through the model on all of them."""
    monkeypatch.setattr(head, "WINDOWS", 8)


def test_heads_of_our_checkpoints(tmp_path: Path, config: Any) -> None:
    for step in (5, 20):
        our_checkpoint(tmp_path / "run", config, step, seed=step)
    margin_config = load(["mode=head", f"checkpoints='{tmp_path}/run/checkpoints/step_*'"])
    (run,) = head.run_head(margin_config, quiet)
    assert run.optimizer == "muon"
    assert [row["t"] for row in run.rows] == [5.0, 20.0]
    # The weights that were read are those that were written.
    model: Any = build(config.model, seed=20).double().eval()
    loaded = checkpoints.load_checkpoint(tmp_path / "run/checkpoints/step_00000020", 20, margin_config, quiet)
    with torch.no_grad():
        scores = model(input_ids=loaded.ids).logits.flatten(0, 1)
    used = loaded.labels.flatten() != -100
    measured = robustness.windows(loaded.labels, min(32, loaded.ids.shape[1]), 8)
    assert run.rows[1]["tokens"] == int((measured != -100).sum())
    assert scores.shape[0] >= run.rows[1]["tokens"]
    norm_of = {"l2": 2.0, "linf": math.inf}
    for norm, p in norm_of.items():
        with torch.no_grad():
            h = model.base_model(input_ids=loaded.ids).last_hidden_state.flatten(0, 1)[used]
            found = head.head_margins(model, loaded.ids, loaded.labels, norm).flatten()[used]
        own = robustness.signed_margins(
            h, loaded.labels.flatten()[used], model.get_output_embeddings().weight, None, norm
        )
        assert found.tolist() == pytest.approx((own / torch.linalg.vector_norm(h, ord=p, dim=1)).tolist())
    for row in run.rows:
        assert row["head_l2 low"] <= row["head_l2"] <= row["head_l2 high"]
        assert 0.0 < row["embedding_linf"] < row["embedding_l2"]


def test_checkpoints_on_other_tokens_are_refused(
    tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 20):
        our_checkpoint(tmp_path / "run", config, step, seed=step)
    genuine = checkpoints.load_checkpoint

    def shifted(path: Path, step: int, *rest: Any) -> checkpoints.LoadedCheckpoint:
        loaded = genuine(path, step, *rest)
        return loaded._replace(ids=loaded.ids.roll(1, 0)) if step == 20 else loaded

    monkeypatch.setattr(head, "load_checkpoint", shifted)
    with pytest.raises(
        InputError, match="mixes data: step_00000005 and step_00000020 have other held-out tokens"
    ):
        head.run_head(load(["mode=head", f"checkpoints='{tmp_path}/run/checkpoints/step_*'"]), quiet)


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
    assert 0.0 < row["tokens right"] < 1.0
    assert 0.0 < row["embedding radius ℓ∞"] < row["embedding radius ℓ2"]
    assert (
        row["signed head margin ℓ2 low"] <= row["signed head margin ℓ2"] <= row["signed head margin ℓ2 high"]
    )
    assert "signed ℓ2 margin of the head" in found["sentence"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "upper bounds" in page
    assert "margin-head-figure" in page
    # One checkpoint makes no curve, and no plot of a dot.
    last = pattern.replace("step_*", "step_00000040")
    assert command.main(["mode=head", last, "wandb.mode=disabled", "--json", "--out", "last"]) == 0
    assert "margin-head-figure" not in (tmp_path / "last" / "report.html").read_text()
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
    assert row["head_l2"] > 0.0
    assert row["head_linf"] > 0.0
    assert 0.0 < row["embedding_l2"] < 50.0
    assert row["windows"] == 8


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
    margin_config = load(["mode=head", f"checkpoints='{tmp_path}/run/checkpoints/step_*'"])
    said: list[str] = []
    (run,) = head.run_head(margin_config, said.append)
    assert [row["t"] for row in run.rows] == [5.0]
    assert len([line for line in said if line.startswith("left out: ") and "step_00000020" in line]) == 1
    alone = load(["mode=head", f"checkpoints='{tmp_path}/run/checkpoints/step_00000020'", "max_samples=20"])
    with pytest.raises(InputError):
        head.run_head(alone, quiet)
