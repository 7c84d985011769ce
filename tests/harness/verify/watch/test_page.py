"""The blocks of docs/watch.md do what the page says, and its table of findings is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from harness.audit import DEFECTS, NOTES
from tests.harness.verify.watch.loops import batches, loss_of, net, split

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

PAGE = Path(__file__).parents[4] / "docs" / "watch.md"


def block(heading: str, index: int = 0) -> str:
    """Return a Python block below a heading."""
    part = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)[index]


def given() -> dict[str, Any]:
    model = net()
    hidden, rest = split(model)
    return {"model": model, "hidden": hidden, "rest": rest, "batches": batches(6), "loss_of": loss_of}


def test_a_plain_loop_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    names = given()
    exec(compile(block("A plain loop"), "a plain loop", "exec"), names)
    printed = capsys.readouterr().out
    shown = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    for line in shown.splitlines()[:3]:
        # How much rounding is left over depends on the machine.
        columns = [c for c in re.split(r"\s{2,}", line) if "%" not in c]
        assert all(column in printed for column in columns), (line, printed)
    assert "is right: yes" in printed


def test_accelerate(capsys: pytest.CaptureFixture[str]) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    import optimizers

    names = given()
    names["optimizer"] = optimizers.Muon(names["model"].named_parameters(), modules=names["model"])
    try:
        exec(compile(block("accelerate and the Trainer"), "accelerate", "exec"), names)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    assert names["report"].is_right is True
    assert names["report"].steps == 3


def under_deepspeed(rank: int, text: str) -> tuple[bool | None, str]:
    """Run a block on a rank, on its half of each batch."""
    import os

    from harness.engines.deepspeed import _library

    deepspeed, linear = _library(), torch.nn.functional.linear
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    names = {**given(), "batches": [ids.chunk(2)[rank] for ids in batches(3)]}
    try:
        exec(compile(text, "deepspeed", "exec"), names)
    finally:
        names["engine"].destroy()
        torch.nn.functional.linear = linear
        os.environ.pop("LOCAL_RANK", None)
    return names["report"].is_right, str(names["report"])


def test_deepspeed_and_its_default_clipping(two_ranks: RankPool) -> None:
    text = block("DeepSpeed")
    right, table = two_ranks.run(under_deepspeed, text)[0]
    assert right is True, table
    without = text.replace('    "gradient_clipping": 0.0,\n', "")
    assert without != text
    right, table = two_ranks.run(under_deepspeed, without)[0]
    assert right is False
    assert "clipping after orthogonalization" in table


def test_the_page_names_every_finding() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in [*DEFECTS, *NOTES]:
        short = name.removeprefix("another ")
        assert short in text, name
