"""The routers' load-balancing loss: gradients against transformers' own objective, cuts, padding, evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import engines
from harness.config import compose, model_facts
from harness.config.checks import check
from harness.config.identity import identity
from harness.errors import InputError
from harness.loop import Callbacks, Run, forward_backward, train
from harness.model import CausalLMObjective
from harness.preparation import prepare
from harness.run import assemble
from tests.distributed.pool import RankPool
from tests.harness.running import Trained, small, trained, write_documents

ROUTED = {
    "mixtral": ("num_local_experts=4", "num_experts_per_tok=2"),
    "qwen3_moe": ("num_experts=4", "num_experts_per_tok=2", "moe_intermediate_size=16", "head_dim=16"),
    "olmoe": ("num_experts=4", "num_experts_per_tok=1"),
}
LOUD = ("output_router_logits=true", "router_aux_loss_coef=0.5")


def _words(kind: str, *keys: str) -> list[str]:
    return [f"model.model_type={kind}", *(f"model.config.{key}" for key in (*ROUTED[kind], *keys))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def _run(overrides: list[str]) -> Run:
    prepared = prepare(overrides, say=lambda text: None, worker=True, writes_folder=False)
    run = assemble(prepared, engines.start(prepared.config))
    run.stop.restore()
    return run


def _ranked(rank: int, words: list[str]) -> Trained:
    return trained(rank, words)


def _gradients(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ROUTED)
def test_one_forward_pass_has_the_gradient_of_transformers_own_objective(
    kind: str, corpus: Path, tmp_path: Path
) -> None:
    run = _run(small(corpus, tmp_path, *_words(kind, *LOUD)))
    ((ids, labels),) = run.loader.micro_batches(0)
    losses = forward_backward(run, [(ids, labels)], weight=1 / labels.numel())
    ours = _gradients(run)
    run.optimizer.zero_grad(set_to_none=True)
    # `shift_labels`: ours are shifted already.
    own = run.model(input_ids=ids, labels=labels, shift_labels=labels)
    own.loss.backward()
    assert losses.aux is not None
    assert losses.aux.item() / labels.numel() == pytest.approx(own.aux_loss.item(), rel=1e-6)
    for name, gradient in _gradients(run).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)
    # Control: without the coefficient the routers' gradients are others.
    run.optimizer.zero_grad(set_to_none=True)
    run.model.config.output_router_logits = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    run = dataclasses.replace(run, objective=CausalLMObjective(run.model, is_padded=False))
    assert forward_backward(run, [(ids, labels)], weight=1 / labels.numel()).aux is None
    router = next(name for name in ours if "gate.weight" in name or "router.weight" in name)
    assert (_gradients(run)[router] - ours[router]).norm() > 0.1 * ours[router].norm()


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_two_processes_train_what_one_trains_at_the_same_micro_batch(
    mode: str, corpus: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    words = [*_words("mixtral", *LOUD), f"data.mode={mode}", "micro_batch_size=2", "optimizer.lr=0.003"]
    alone = trained(0, small(corpus, tmp_path, *words))
    both = two_ranks.run(_ranked, small(corpus, tmp_path, *words, "world_size=2"))[0]
    for name, weight in alone.after.items():
        torch.testing.assert_close(both.after[name], weight, rtol=1e-4, atol=2e-6)
    for one, two in zip(alone.rows, both.rows, strict=True):
        assert one["train/aux_loss"] == pytest.approx(two["train/aux_loss"], rel=1e-5)
        assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-5)
        value = one["train/aux_loss"]
        assert value is not None
        assert value > 1.0
        assert value <= 4.0


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_other_engines_add_the_same_loss(
    engine: str, corpus: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    words = [*_words("mixtral", *LOUD), "micro_batch_size=2", "steps=2", "optimizer.lr=0.003"]
    alone = trained(0, small(corpus, tmp_path, *words))
    # In warm ranks: DeepSpeed keeps a process group that another test of this process may have left.
    other = two_ranks.run(_ranked, small(corpus, tmp_path, *words, "world_size=2", f"engine={engine}"))[0]
    for name, weight in alone.after.items():
        torch.testing.assert_close(other.after[name], weight, rtol=1e-4, atol=2e-6)
    assert [row["train/aux_loss"] for row in other.rows] == pytest.approx(
        [row["train/aux_loss"] for row in alone.rows], rel=1e-5
    )


def test_padding_is_not_balanced(corpus: Path, tmp_path: Path) -> None:
    """The value of padded rows is that of the same rows one by one without their padding, put together."""
    run = _run(small(corpus, tmp_path, *_words("mixtral", *LOUD), "data.mode=padded"))
    ((ids, labels),) = run.loader.micro_batches(0)
    assert (labels == -100).float().mean() > 0.2
    losses = forward_backward(run, [(ids, labels)], weight=1.0)
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    pieces = [
        run.model(input_ids=row[None, : int((label != -100).sum()) + 1]).router_logits
        for row, label in zip(ids, labels)
    ]
    expected: Any = load_balancing_loss_func(tuple(torch.cat(layer) for layer in zip(*pieces)), 4, 2)  # pyright: ignore[reportArgumentType]
    assert losses.aux is not None
    assert losses.aux.item() / int((labels != -100).sum()) == pytest.approx(expected.item(), rel=1e-5)
    whole = run.model(input_ids=ids).aux_loss
    assert abs(whole.item() - expected.item()) > 1e-4 * expected.item()


def test_evaluation_is_cross_entropy_alone(corpus: Path, tmp_path: Path) -> None:
    still = ("optimizer.lr=1e-30", "steps=1")
    loud = trained(0, small(corpus, tmp_path, *_words("olmoe", *LOUD), *still)).rows[-1]
    silent = trained(0, small(corpus, tmp_path, *_words("olmoe"), *still)).rows[-1]
    assert loud["val/loss"] == pytest.approx(silent["val/loss"], rel=1e-6)
    assert loud["train/loss"] == pytest.approx(silent["train/loss"], rel=1e-6)
    assert "train/aux_loss" in loud
    assert "train/aux_loss" not in silent


def test_the_sum_survives_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    from harness.checkpoint import contents

    run = _run(small(corpus, tmp_path, *_words("olmoe", *LOUD), "steps=1", "log_every=5"))
    assert train(run, Callbacks()) == "finished"
    run.state.loss, run.state.aux_loss = torch.tensor(1.0), torch.tensor(2.5)
    kept = contents.counters(run, [])
    run.state.aux_loss = None
    contents.restore_counters(run, [], [kept], None)
    assert run.state.aux_loss is not None
    assert run.state.aux_loss.item() == 2.5


def test_the_cut_is_part_of_the_identity_only_with_the_loss() -> None:
    def key(*words: str) -> str:
        return identity(check(compose.load([*words, "world_size=1"]), {}), "corpus", "tokenizer")

    loud = _words("mixtral", *LOUD)
    assert key(*loud, "micro_batch_size=2") != key(*loud, "micro_batch_size=4")
    silent = _words("mixtral")
    assert key(*silent, "micro_batch_size=2") == key(*silent, "micro_batch_size=4")


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("mixtral", ["router_aux_loss_coef=0.1"], "model.config.output_router_logits=true"),
        ("llama", ["output_router_logits=true"], "unknown key"),
        ("deepseek_v3", ["output_router_logits=true"], "no load-balancing loss"),
        ("bamba", ["z_loss_coefficient=0.1"], "own loss"),
        ("deepseek_v3", ["num_mtp_layers=2"], "own loss"),
        ("bailing_hybrid", ["mtp_loss_scaling_factor=0.1"], "own loss"),
        ("llama4_text", ["router_aux_loss_coef=0.1"], "no load-balancing loss"),
        ("dbrx", ["ffn_config.moe_loss_weight=0.1"], "model.config.*output_router_logits=true"),
        ("jetmoe", ["aux_loss_coef=0.1"], "model.config.output_router_logits=true"),
        ("llama", ["label_smoothing=0.1"], "unknown key"),
        ("mixtral", ["router_z_loss_coef=0.1"], "unknown key"),
        ("mixtral", ["output_router_logits=true", "router_aux_loss_coef=-1"], "≥ 0"),
        ("llama", ["return_dict=false"], "return_dict"),
        ("llama", ["dtype=bfloat16"], "precision=bf16_pure"),
    ],
)
def test_keys_of_the_models_own_loss_are_refused(kind: str, keys: list[str], said: str) -> None:
    words = [f"model.model_type={kind}", *(f"model.config.{key}" for key in keys)]
    with pytest.raises(InputError, match=said):
        check(compose.load(words), {})


def test_a_coefficient_of_zero_is_silent() -> None:
    words = _words("mixtral", "output_router_logits=true", "router_aux_loss_coef=0.0")
    assert model_facts.router_coefficient(compose.load(words).model) == 0.0
