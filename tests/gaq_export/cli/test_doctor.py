"""`doctor`: what it says is what the backends say."""

import json

import engines
from tests.gaq_export.commands import gaq


def test_doctor_says_what_every_backend_can_do_here() -> None:
    diagnosis = json.loads(gaq("doctor", "--json").stdout)
    assert set(diagnosis["backends"]) == set(engines.BACKENDS)
    assert diagnosis["backends"]["openvino"] == {"cannot_build": None, "cannot_run": None}
    for name, problems in diagnosis["backends"].items():
        assert problems["cannot_run"] == engines.BACKENDS[name].can_run()
    assert diagnosis["best"] == engines.best_backend()
    shown = " ".join(gaq("doctor").stdout.split())
    assert f"build-engine takes: {diagnosis['best']}" in shown
    assert diagnosis["machine"]["processor"] in shown
