"""What the tables' memory is predicted as, against formulas written down here by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.paper import tables
from analysis.paper.cells import PaperCell
from analysis.paper.filling import count, fill
from harness.config import checks, compose
from harness.errors import InputError

# hidden, feed-forward, layers, rank of the GaLore protocol; vocabulary 32,000, embedding and head untied
SIZES = {
    "60M": (512, 1376, 8, 128),
    "130M": (768, 2048, 12, 256),
    "350M": (1024, 2736, 24, 256),
    "1B": (2048, 5461, 24, 512),
    "7B": (4096, 11008, 32, 1024),
}
MATRICES = {
    "350M, q_proj 1024×1024, r=256": (1024, 1024, 256),
    "350M, gate_proj 2736×1024, r=256": (2736, 1024, 256),
    "350M, down_proj 1024×2736, r=256": (2736, 1024, 256),
    "7B, gate_proj 11008×4096, r=1024": (11008, 4096, 1024),
}
GIB = 2**30


def beside(d: int, layers: int) -> int:
    """Numbers in embedding, head and norms, which take Adam beside a matrix rule."""
    return 2 * 32000 * d + (2 * layers + 1) * d


def weights(d: int, f: int, layers: int) -> int:
    return beside(d, layers) + layers * (4 * d * d + 3 * d * f)


def low_rank(d: int, f: int, layers: int, r: int, *, short: int, long: int) -> int:
    """State of all hidden matrices that keep so many r × (short side) and r × (long side) factors."""
    square = r * d * (short + long)
    return layers * (4 * square + 3 * r * (short * d + long * f))


def gib(size: str, method: str) -> float:
    """Two bytes a weight and a state number."""
    d, f, layers, r = SIZES[size]
    whole, aux = weights(d, f, layers), 2 * beside(d, layers)
    state = {
        "Full-Rank (Adam)": 2 * whole,
        "SUMO": aux + low_rank(d, f, layers, r, short=1, long=1),
        "GaLore": aux + low_rank(d, f, layers, r, short=1, long=2),
        "GaLore, moments on the short side": aux + low_rank(d, f, layers, r, short=2, long=1),
    }[method]
    return 2 * (whole + state) / GIB


@pytest.fixture(scope="module")
def table3() -> dict[tuple[str, str], PaperCell]:
    return {(cell.row, cell.column): cell for cell in fill("sumo_table3").cells}


@pytest.mark.parametrize(
    "method", ["Full-Rank (Adam)", "SUMO", "GaLore", "GaLore, moments on the short side"]
)
@pytest.mark.parametrize("size", ["60M", "130M", "350M", "1B"])
def test_memory_of_table_3(table3: dict[tuple[str, str], PaperCell], size: str, method: str) -> None:
    assert table3[method, f"{size} memory"].predicted == pytest.approx(gib(size, method), rel=1e-12)


def test_the_oracle_is_the_audit_of_the_paper() -> None:
    """Figures that were computed from the paper's accounting before this code was written."""
    audit = {
        "Full-Rank (Adam)": (0.325, 0.749, 2.056, 7.483, 37.65),
        "SUMO": (0.249, 0.516, 1.153, 3.873, 18.29),
        "GaLore": (0.261, 0.569, 1.293, 4.436, 21.31),
        "GaLore, moments on the short side": (0.256, 0.547, 1.235, 4.202, 20.04),
    }
    for method, figures in audit.items():
        for size, figure in zip(SIZES, figures, strict=True):
            assert gib(size, method) == pytest.approx(figure, abs=0.006 if size == "7B" else 0.0006), (
                method,
                size,
            )


def test_seven_billion_parameters_are_counted_too() -> None:
    words = [
        "model=llama_7b",
        "optimizer=sumo_paper",
        "optimizer.rank=1024",
        "precision=bf16_pure",
        "world_size=1",
    ]
    counted = count(checks.check(compose.load(words), environ={}, devices=0))
    assert counted is not None
    quantity = tables.load("sumo_table3").quantities["memory"]
    assert quantity.in_unit(counted.memory(quantity)) == pytest.approx(gib("7B", "SUMO"), rel=1e-12)


def test_no_perplexity_is_predicted(table3: dict[tuple[str, str], PaperCell]) -> None:
    cells = [cell for cell in table3.values() if cell.quantity.kind == "perplexity"]
    assert len(cells) == 24
    assert {cell.predicted for cell in cells} == {None}
    ours = {cell.row for cell in cells if cell.status == "not_run"}
    assert ours == {"Full-Rank (Adam)", "GaLore", "SUMO"}
    assert {cell.status for cell in cells if cell.row not in ours} == {"not_predictable"}


def test_statuses_of_table_3(table3: dict[tuple[str, str], PaperCell]) -> None:
    found = {place: cell.status for place, cell in table3.items() if cell.predicted is not None}
    assert {place for place, status in found.items() if status == "agrees"} == {
        ("Full-Rank (Adam)", "350M memory")
    }
    close = {("Full-Rank (Adam)", "130M"), ("GaLore, moments on the short side", "350M")}
    close |= {("SUMO", size) for size in ("130M", "350M", "1B")}
    assert {place for place, status in found.items() if status == "close"} == {
        (r, f"{c} memory") for r, c in close
    }
    known = {("Full-Rank (Adam)", "60M"), ("Full-Rank (Adam)", "1B"), ("GaLore", "350M")}
    explained = {place for place, status in found.items() if status == "differs_known"}
    assert explained == {(r, f"{c} memory") for r, c in known}


def test_the_reasons_of_table_3_are_arithmetic() -> None:
    assert round(6 * 60e6 / 1e9, 2) == 0.36
    assert round(6 * 1.3e9 / 1e9, 2) == 7.80
    assert round(weights(*SIZES["60M"][:3]) / 1e6, 2) == 58.07
    assert round(weights(*SIZES["1B"][:3]) / 1e9, 3) == 1.339


def test_table_1_holds_on_every_matrix() -> None:
    cells = fill("sumo_table1").cells
    counted = [cell for cell in cells if cell.predicted is not None]
    assert len(counted) == 16
    for cell in counted:
        m, n, r = MATRICES[cell.column]
        by_hand = {
            "SUMO": n * r + m * r,
            "Adam": 2 * m * n,
            "GaLore": n * r + 2 * m * r,
            "GaLore, moments on the short side": 2 * n * r + m * r,
        }
        assert cell.predicted == by_hand[cell.row], cell
    differing = {
        (cell.row, cell.status) for cell in cells if cell.predicted not in (None, cell.published.value)
    }
    assert differing == {("GaLore", "differs_known")}


def test_table_6_counts_states_alone() -> None:
    cells = {(cell.row, cell.column): cell for cell in fill("sumo_table6").cells}
    d, f, layers, r = SIZES["350M"]
    adam, sumo = cells["AdamW", "350M memory"], cells["SUMO", "350M memory"]
    assert adam.predicted == pytest.approx(4 * weights(d, f, layers) / GIB, rel=1e-12)
    assert adam.status == "agrees"
    aux = 4 * beside(d, layers)
    rank_part = 2 * low_rank(d, f, layers, r, short=1, long=1)
    assert sumo.predicted == pytest.approx((aux + rank_part) / GIB, rel=1e-12)
    assert sumo.status == "differs_known"
    # What the reason says: no rank gives 0.18 with Adam's states counted, 206 or so without them.
    assert round(aux / GIB, 3) == 0.244
    assert 0.18 * GIB / (rank_part / r) == pytest.approx(206, abs=1)


def changed(home: Path, *replacements: tuple[str, str]) -> dict[tuple[str, str], PaperCell]:
    """Table 3 out of the user's own configs, with text replaced."""
    text = (tables.path_of("sumo_table3")).read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = home / "configs" / "paper" / "mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return {(cell.row, cell.column): cell for cell in fill("mine").cells}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_control_a_wrong_rank_differs(home: Path) -> None:
    cells = changed(home, ("rank: 512", "rank: 1024"))
    assert cells["SUMO", "1B memory"].status == "differs"
    assert cells["SUMO", "350M memory"].status == "close"


def test_control_a_wrong_side_differs_although_another_value_has_a_reason(home: Path) -> None:
    """The reason at 350M is for the long side's 1.293 and for no other number."""
    cells = changed(home, ("{rank: 256, interval: 200}", "{rank: 512, interval: 200}"))
    assert cells["GaLore", "350M memory"].status == "differs"


def test_control_another_accounting_differs(home: Path) -> None:
    cells = changed(home, ("bytes_per_number: 2", "bytes_per_number: 4"))
    assert {cell.status for cell in cells.values() if cell.predicted is not None} == {"differs"}


@pytest.mark.parametrize(("unit", "size"), [("GiB", 2**30), ("MiB", 2**20), ("GB", 10**9), ("MB", 10**6)])
def test_units_of_memory(unit: str, size: int) -> None:
    quantity = tables.Quantity(kind="memory", unit=unit)
    assert quantity.in_unit(3 * size) == pytest.approx(3, rel=1e-15)


def test_control_a_column_of_another_matrix_is_refused(home: Path) -> None:
    text = tables.path_of("sumo_table1").read_text(encoding="utf-8")
    (home / "configs" / "paper").mkdir(parents=True)
    (home / "configs/paper/mine.yaml").write_text(text.replace("{m: 11008,", "{m: 11000,"), encoding="utf-8")
    with pytest.raises(InputError, match=r"has m=11000 and n=4096; model.*gate_proj.weight is 11008 × 4096"):
        fill("mine")


def test_every_table_says_where_it_is_from() -> None:
    pretraining = ["sumo_table1", "sumo_table3", "sumo_table6", "sumo_table9"]
    fine_tuning = ["sumo_gsm8k", "sumo_table2", "sumo_table7", "sumo_table8"]
    assert sorted(tables.names()) == sorted(pretraining + fine_tuning)
    for name in tables.names():
        table = tables.load(name)
        assert table.source.arxiv == "2505.24749"
        assert table.provenance
        assert "unstated" not in {tag for what, tag in table.provenance.items() if what == "published"}
