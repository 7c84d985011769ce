"""Eigendecompositions shared over the cores: the bits of one thread, and threads that are in nobody's way."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from optimizers.linalg import robust
from optimizers.linalg.cores import SMALLEST, over_cores, worth_sharing
from optimizers.linalg.inverse_root import inverse_root
from optimizers.linalg.robust import robust_eigh

EIGH = torch.linalg.eigh


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def grams(count: int = 5, side: int = SMALLEST + 1, seed: int = 0) -> torch.Tensor:
    wide = torch.randn(count, side, 2 * side, generator=torch.Generator().manual_seed(seed)).double()
    return wide @ wide.mT


def by_one_thread(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    values, vectors = EIGH(gram)
    torch.set_num_threads(threads)
    return values, vectors


def threads_that_ran(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    seen: set[str] = set()

    def watched(*args: object, **kwargs: object) -> object:
        seen.add(threading.current_thread().name)
        time.sleep(0.05)  # so that one thread cannot take all shares before the other wakes up
        return EIGH(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    return seen


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_shares_give_the_bits_of_one_thread(count: int, threads: int) -> None:
    gram = grams(count)
    expected = by_one_thread(gram)
    torch.set_num_threads(threads)
    values, vectors, rescued = robust_eigh(gram)
    assert torch.equal(values, expected[0])
    assert torch.equal(vectors, expected[1])
    assert not rescued.any()


def test_the_shares_really_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = threads_that_ran(monkeypatch)
    robust_eigh(grams(4))
    assert len(seen) == 2
    assert threading.current_thread().name not in seen


@pytest.mark.parametrize(
    ("count", "side", "threads"), [(5, SMALLEST, 1), (1, 128, 2), (5, 8, 2), (2, 128, 64)]
)
def test_what_is_not_worth_sharing_stays_here(
    count: int, side: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gram = grams(count, side)
    torch.set_num_threads(threads)
    assert not worth_sharing(count, side)
    seen = threads_that_ran(monkeypatch)
    robust_eigh(gram)
    assert seen == {threading.current_thread().name}


def test_other_threads_keep_their_number_of_cores() -> None:
    robust_eigh(grams())
    torch.set_num_threads(3)
    robust_eigh(grams())  # another team
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 3


def test_each_thread_of_the_team_computes_on_one_core() -> None:
    inside: list[int] = []
    over_cores(lambda share: inside.append(torch.get_num_threads()), 8)
    assert set(inside) == {1}


def test_a_failed_share_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = grams()
    expected = by_one_thread(gram)
    bad = gram[3].clone()

    def failing(matrix: torch.Tensor, **options: object) -> object:
        if any(torch.equal(m, bad) for m in matrix.reshape(-1, *bad.shape)):
            raise RuntimeError("did not converge")
        return EIGH(matrix, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, _, rescued = robust_eigh(gram)
    assert rescued.tolist() == [False, False, False, True, False]
    # The rescued one comes from an fp64 SVD: r·eps64 relative to its largest value.
    torch.testing.assert_close(values[3], expected[0][3], rtol=0, atol=1e-13 * float(expected[0][3, -1]))
    with pytest.raises(RuntimeError, match="did not converge"):
        robust._eigh(gram)


def test_callers_in_several_threads() -> None:
    stacks = [grams(6, seed=seed) for seed in range(4)]
    expected = [by_one_thread(gram)[1] for gram in stacks]

    def call(index: int) -> torch.Tensor:
        torch.get_num_threads()
        torch.set_num_threads(2 + index % 2)  # half of them want another team
        return robust_eigh(stacks[index])[1]

    with ThreadPoolExecutor(4) as callers:
        for found, exact in zip(callers.map(call, range(4)), expected):
            assert torch.equal(found, exact)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_autograd(mode: type[torch.no_grad]) -> None:
    with mode():
        gram = grams()
        assert torch.equal(robust_eigh(gram)[1], by_one_thread(gram)[1])


def test_a_compiled_caller() -> None:
    gram = grams()

    def root(gram: torch.Tensor) -> torch.Tensor:
        return 2.0 * inverse_root(gram, 1e-6).root

    compiled = torch.compile(root, backend="eager", fullgraph=True)
    assert torch.equal(compiled(gram), root(gram))


def _child(gram: torch.Tensor, expected: torch.Tensor) -> None:
    torch.set_num_threads(2)  # torch gives a forked child one thread
    raise SystemExit(0 if torch.equal(robust_eigh(gram)[1], expected) else 1)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_makes_its_own_threads() -> None:
    gram = grams()
    expected = robust_eigh(gram)[1]
    child = multiprocessing.get_context("fork").Process(target=_child, args=(gram, expected))
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    assert code == 0


def test_the_threads_let_the_process_end() -> None:
    script = (
        "import atexit, torch; torch.set_num_threads(2)\n"
        "from optimizers.linalg.robust import robust_eigh\n"
        "gram = torch.eye(80, dtype=torch.float64).expand(4, 80, 80)\n"
        # After Python has ended the team there is nobody to share with, but there is still an answer.
        "atexit.register(lambda: print(float(robust_eigh(gram)[0].sum())))\n"
        "robust_eigh(gram)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["320.0"]
    assert done.stderr == ""
