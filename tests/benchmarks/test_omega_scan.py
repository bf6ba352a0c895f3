"""The variants of the scan of the sample weights' settings."""

import dataclasses

import pytest

import omega_scan
from gaq_export.comparison.spec import adjusted_preset


def test_a_variant_changes_only_what_it_names() -> None:
    base = adjusted_preset("tiny", None).config
    changed = omega_scan.changed({"meta_learning_rate": 0.1})(base)
    assert changed == dataclasses.replace(base, omega=dataclasses.replace(base.omega, meta_learning_rate=0.1))


@pytest.mark.parametrize("name", [name for name, _ in omega_scan.VARIANTS])
def test_every_variant_is_a_valid_config(name: str) -> None:
    row = omega_scan.chosen(name)[name]
    assert row(adjusted_preset("tiny", None).config).omega is not None
