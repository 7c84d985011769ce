"""The loss in chunks on the device: its value and gradients in half precision against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness.model.linear_loss import linear_cross_entropy

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 24, 16, 40


def problem(device: torch.device, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states and head weight, leaves, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[0, -5:] = -100
    # Rounded once, so that fp64 starts from the same numbers.
    leaves = [t.to(torch.bfloat16).to(dtype).to(device).requires_grad_() for t in (hidden, weight)]
    return leaves, labels.to(device)


def exact(device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Value and gradients in fp64, from whole logits."""
    (hidden, weight), labels = problem(device, torch.float64)
    logits = hidden @ weight.mT
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss.detach(), list(torch.autograd.grad(loss, [hidden, weight]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_chunked_loss_is_that_of_fp64(dtype: torch.dtype, gpu_device: torch.device) -> None:
    expected, wanted = exact(gpu_device)
    (hidden, weight), labels = problem(gpu_device, dtype)
    loss = linear_cross_entropy(hidden, weight, None, labels, chunk=16)
    loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert abs(loss.item() / expected.item() - 1) < tolerance
    for leaf, gradient in zip((hidden, weight), wanted):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert (leaf.grad.double() - gradient).norm() < tolerance * gradient.norm()


def test_chunks_do_not_change_the_result(gpu_device: torch.device) -> None:
    """The head's gradient adds up in fp32, whatever the chunks are."""
    gradients = []
    for chunk in (7, 64):
        (hidden, weight), labels = problem(gpu_device, torch.bfloat16)
        linear_cross_entropy(hidden, weight, None, labels, chunk=chunk).backward()
        assert weight.grad is not None
        gradients.append(weight.grad.double())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()
