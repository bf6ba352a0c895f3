"""What the pages say of made-up results: no more than the numbers do."""

from gaq_export.comparison import tables
from gaq_export.comparison.results import CellScores, Table
from gaq_export.comparison.spec import Comparison
from gaq_export.comparison.tables import Column


def scores(
    db: float,
    error: float = 1.0,
    weights_error: float = 1.0,
    psnr_db: float | None = None,
    blocks: tuple[float, ...] = (),
) -> CellScores:
    return CellScores(
        steps_db=(db - 1, db + 1),
        pooled_db=db - 2,
        error=error,
        weights_db=db + 3,
        weights_error=weights_error,
        psnr_db=psnr_db,
        fd_real=None,
        fd_float=None,
        seconds=12.3,
        peak_mib=400.0,
        spread=0.5,
        blocks={f"block{i}": loss for i, loss in enumerate(blocks)},
    )


def table(**rows: list[float]) -> Table:
    return {row: {seed: scores(db) for seed, db in enumerate(values)} for row, values in rows.items()}


def test_the_table_pairs_seeds_and_leaves_unmeasured_columns_empty() -> None:
    columns = (
        Column(title="SQNR", value=lambda m: m.mean_db, digits=1),
        Column(title="paired", value=lambda m: m.mean_db, digits=1, paired=True),
        Column(title="PSNR", value=lambda m: m.psnr_db),
    )
    rows = tables.markdown(
        table(uniform=[20.0, 30.0], gac=[20.5, 30.7, 50.0]), "row", columns, [["float", "∞", "-", "∞"]]
    )
    assert rows == [
        "| row | SQNR | paired | PSNR |",
        "| --- | --- | --- | --- |",
        "| `uniform` | 25.0 ± 7.1 | - | - |",
        "| `gac` | 33.7 ± 15.0 | 0.6 ± 0.1 | - |",
        "| float | ∞ | - | ∞ |",
    ]


def test_an_order_is_called_only_where_the_lead_is_steady() -> None:
    text = tables.ranking(table(a=[20.0, 25.0, 30.0], b=[19.0, 24.1, 28.9], c=[19.5, 23.0, 29.0]))
    assert text.startswith("By mean SQNR, seeds 0, 1, 2: `a` > `b` ≈ `c`;")
    assert "no order" in tables.ranking(table(a=[20.0]))


def test_mean_and_deviation_are_written_with_as_many_digits() -> None:
    assert tables.mean_sd([1.25, 1.75], 2) == "1.50 ± 0.35"


def test_a_float_row_is_exact_and_has_its_distances(measured: Comparison) -> None:
    columns = (tables.SQNR, tables.PSNR, tables.SECONDS)
    assert tables.float_rows(measured, columns) == [
        ["float, same noise", "∞", "∞", "-"],
        ["float, other noise", "∞", "-", "-"],
    ]


def test_a_page_says_how_it_was_measured(measured: Comparison) -> None:
    text = "\n".join(tables.how_measured(measured, (tables.SQNR,)))
    assert "4 DDIM steps, uniform spacing" in text
    assert "Quantized networks are computed by fake quantization in PyTorch" in text
    assert "SQNR, dB: of the predicted noise against the float network" in text
    assert "No Frechet distances" in text
