"""Fixtures for the tests of calibration: conditional networks with samples that fit them."""

import pytest

from calib.data import CalibrationSet
from gaq_export.models.architectures import EpsilonModel
from tests.calib.conditional import LABELS, NETWORKS, class_unet, samples


@pytest.fixture(params=NETWORKS)
def conditional(request: pytest.FixtureRequest) -> tuple[EpsilonModel, CalibrationSet]:
    """Return a conditional network, of every kind in turn, and 16 samples of four steps with conditions that fit it."""
    make, cond = NETWORKS[request.param]
    return EpsilonModel(make().eval()), samples(**cond)


@pytest.fixture
def class_conditional() -> tuple[EpsilonModel, CalibrationSet]:
    """Return a network of classes, and samples with their labels."""
    return EpsilonModel(class_unet().eval()), samples(class_labels=LABELS)
