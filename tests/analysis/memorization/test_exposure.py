"""Exposure against closed forms and plain forward passes; a null that was trained on is told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.memorization import exposure
from harness.config.schema import CanaryConfig
from harness.data import canaries
from harness.data.tokenizer import Encoder


def test_random_guesses_have_an_exposure_of_log2_e_on_average() -> None:
    # The mean of log2(n) - log2(rank) over ranks 1 … n is log2(n) - log2(n!)/n; Stirling's limit is log2 e.
    for alternatives in (1, 127, 100_000):
        n = alternatives + 1
        exact = math.log2(n) - math.lgamma(n + 1) / math.log(2) / n
        assert exposure.of_random_guesses(alternatives)[0] == pytest.approx(exact, rel=1e-12)
    assert exposure.of_random_guesses(100_000)[0] == pytest.approx(math.log2(math.e), abs=2e-4)
    losses = np.random.default_rng(0).normal(size=(4000, 128))
    bits = exposure.exposures(losses[:, 0], losses[:, 1:])
    mean, sd = exposure.of_random_guesses(127)
    assert abs(bits.mean() - mean) < 4 * sd / math.sqrt(4000)
    assert bits.std() == pytest.approx(sd, rel=0.1)
    # Control: secrets whose alternatives were trained on are not those of random guesses.
    leaked = exposure.exposures(losses[:, 0], losses[:, 1:] - 1.0)
    assert abs(leaked.mean() - mean) > 10 * sd / math.sqrt(4000)


def test_ranks_count_ties_as_halves() -> None:
    others = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    assert exposure.exposures(np.array([0.0, 1.0]), others).tolist() == [2.0, 2 - math.log2(2.5)]
    assert exposure.exposures(np.array([4.0]), others[:1]).tolist() == [0.0]


def small_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(shape).double().eval()
    # Weights of 0.02 hardly tell secrets apart.
    for p in model.parameters():
        p.data.mul_(10.0) if p.ndim > 1 else None
    return model


def byte_encoder() -> Encoder:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # One merge, so that secrets have different lengths.
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet, "90"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("9", "0")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<eos>"])
    return Encoder(tokenizer, "<eos>", None)


def test_scores_with_a_shared_cache_are_those_of_plain_passes() -> None:
    encoder, config = byte_encoder(), CanaryConfig(count=2, copies=[1])
    model, held_out = small_model(encoder.vocab_size), canaries.held_out(config)
    chosen = [*canaries.inserted(config), held_out[5]]
    scores = exposure.secret_scores(model, encoder, chosen, held_out)
    lengths = set()
    for i, canary in enumerate(chosen):
        secrets = [canary.secret, *(other.secret for other in held_out if other.secret != canary.secret)][
            :128
        ]
        plain = []
        for secret in secrets:
            text = f" The number of {canary.name} is {secret}."
            ids = torch.tensor([[encoder.eos_id, *encoder.encode_bare([text])[0].tolist()]])
            log_probs = torch.log_softmax(model(ids).logits[0, :-1], -1)
            plain.append(-float(log_probs.gather(1, ids[0, 1:, None]).sum().detach()))
            lengths.add(ids.shape[1])
        # Up to what is common to all, which is the name.
        relative = np.array(plain) - plain[0]
        np.testing.assert_allclose(scores.others[i] - scores.own[i], relative[1:], atol=1e-9)
        assert np.ptp(relative) > 0.1
    assert len(lengths) > 1
    assert not scores.is_extracted.any()


def test_an_extracted_secret_is_the_greedy_one() -> None:
    class Knowing(torch.nn.Module):
        """Follows one sequence of tokens with certainty."""

        def __init__(self, model: LlamaForCausalLM, ids: list[int]) -> None:
            super().__init__()
            self.model, self.ids = model, ids

        def forward(self, ids: torch.Tensor, cache: object = None, **keys: object) -> object:
            out = self.model(ids, cache=cache, use_cache=True)
            start = out.cache.get_seq_length() - ids.shape[1]
            for i in range(ids.shape[1]):
                out.logits[:, i, self.ids[min(start + i + 1, len(self.ids) - 1)]] += 1e3
            out.logits = out.logits[:, -1:] if "logits_to_keep" in keys else out.logits
            return out

    encoder, config = byte_encoder(), CanaryConfig(count=2, copies=[1])
    first, second = canaries.inserted(config)
    ids = [encoder.eos_id, *encoder.encode_bare([first.text])[0].tolist()]
    model = Knowing(small_model(encoder.vocab_size), ids)
    scores = exposure.secret_scores(model, encoder, [first, second], canaries.held_out(config))
    assert scores.is_extracted.tolist() == [True, False]
    assert exposure.exposures(scores.own, scores.others)[0] == 7.0


def test_the_band_of_the_null_holds_999_of_1000_means() -> None:
    low, high = exposure.band_of_random_guesses(127, 32)
    bits = math.log2(128) - np.log2(np.arange(1, 129))
    means = bits[np.random.default_rng(7).integers(128, size=(200_000, 32))].mean(1)
    # 100 expected on each side, with a standard deviation of 10, and 14 for the quantile itself.
    for outside in ((means < low).sum(), (means > high).sum()):
        assert 30 < outside < 170
    assert 0.6 < low < 0.9
    # Control: of eight canaries, the normal band at 3.29 standard deviations has no lower end.
    mean, sd = exposure.of_random_guesses(127)
    assert mean - 3.29 * sd / math.sqrt(8) < 0 < exposure.band_of_random_guesses(127, 8)[0]
