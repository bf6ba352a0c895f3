"""Charts: one SVG element each, the same bytes for the same numbers, and readable by machines that see no picture."""

import xml.etree.ElementTree as ET
from collections.abc import Callable

import matplotlib as mpl
import pytest
import torch

from calib.diagnose import Agreement, Alignment, Cosines
from calib.reconstruct import BlockResult
from gaq_export.quantize.noise_sqnr import NoiseSqnr
from gaq_export.report import charts
from gaq_export.report.inspection import LayerRange

COSINES = Cosines(matrix=torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), halves=None)
DECIBELS = torch.tensor([[30.0, 32.0], [20.0, 24.0], [10.0, 11.0]])
BLOCKS = (
    BlockResult(name="first", layers=("first",), loss_before=2.0, loss_after=0.5, rounding="adaround"),
    BlockResult(name="second", layers=("second",), loss_before=0.1, loss_after=0.1, rounding="nearest"),
)
RANGE = LayerRange(
    name="layer.of.it", channels=2, weight_bits=4, covered=(0.5, 0.75, 1.0), input_bits=8, input_reach=127.0
)
OMEGA = torch.softmax(torch.arange(6.0), 0)
CHARTS: dict[str, Callable[[], str]] = {
    "cosines": lambda: charts.cosines(Agreement(block="b", steps=(0, 2), samples=3, before=COSINES, after=COSINES)),
    "alignment": lambda: charts.alignment(Alignment(block="b", validation=2, omega=OMEGA, inner=torch.ones(6))),
    "losses": lambda: charts.losses(BLOCKS),
    "plan-sqnr": lambda: charts.plan_sqnr(NoiseSqnr(t=torch.tensor([66, 33, 0]), weights=DECIBELS + 5, both=DECIBELS)),
    "engine-sqnr": lambda: charts.engine_sqnr(torch.tensor([66, 0]), {"along one": [9.0, 8.0], "other": [7.0, 6.0]}),
    "sensitivity": lambda: charts.sensitivity({"first": 1e-3, "second": 2e-4}),
    "ranges": lambda: charts.ranges([RANGE, RANGE]),
}


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_one_svg_whose_ids_begin_with_its_name(name: str) -> None:
    svg = CHARTS[name]()
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["role"] == "img"
    assert len(root.attrib["aria-label"]) > 10
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert ids
    assert all(i.startswith(f"{name}-") for i in ids)


@pytest.mark.parametrize("name", CHARTS)
def test_the_same_numbers_give_the_same_bytes_whatever_matplotlib_is_set_to(name: str) -> None:
    svg = CHARTS[name]()
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "path"}):
        assert CHARTS[name]() == svg
        assert mpl.rcParams["font.size"] == 30


def test_a_block_that_stayed_nearest_has_a_mark() -> None:
    assert "nearest kept" in charts.losses(BLOCKS)
    assert "nearest kept" not in charts.losses(BLOCKS[:1])


def test_a_small_heat_map_has_its_numbers() -> None:
    svg = CHARTS["cosines"]()
    assert svg.count(">-0.50<") == 4  # two maps of two steps
    assert svg.count(">1.00<") >= 4


def test_places_are_spread_evenly_from_the_first() -> None:
    assert charts._spread(10, 5) == [0, 2, 4, 6, 8]
    assert charts._spread(3, 5) == [0, 1, 2]
