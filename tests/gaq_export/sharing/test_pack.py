"""A run as one folder, to the Hugging Face hub and back, and an engine built from what comes back."""

import base64
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from calib.errors import CalibError
from calib.plan import load_plan
from calib.records import signed
from engines import EngineFile
from gaq_export import pipeline
from gaq_export import run as runs
from gaq_export.cli.app import app
from gaq_export.cli.options import find_model
from gaq_export.errors import GaqError
from gaq_export.evaluation.scores import Score
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.models.source import WeightSource
from gaq_export.run import Run
from gaq_export.sharing import pack
from gaq_export.sharing.pack import PackOptions

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def gaq(*words: object) -> str:
    """Run one command in this process and return the last line it printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def licensed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model, in a folder with a card and a licence."""
    folder = shutil.copytree(home, tmp_path_factory.mktemp("licensed") / "tiny")
    (folder / "LICENSE.md").write_text("Do as you please.")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: as-you-please\n---\nDigits.")
    return load_model(weights=folder)


@pytest.fixture(scope="module")
def evaluated_run(tiny_run: Path, tiny_step_engine: EngineFile, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the tiny run, whose last engine was evaluated."""
    run = Run(folder=shutil.copytree(tiny_run, tmp_path_factory.mktemp("evaluated") / "run"))
    runs.add_entry(run, "build-engine", engine=os.path.relpath(tiny_step_engine.path, run.folder))
    context = {"images": 9, "features": "digits", "reference": "mnist.npz", "engine_sha256": tiny_step_engine.sha256}
    score = Score(metric="fd", name="Frechet distance", value=3.25, low=3.0, high=3.5, floor=1.0, context=context)
    other = replace(score, value=99.0, context={**context, "engine_sha256": "of another"})
    rows = {"unet": [score.to_json()], "other": [other.to_json()]}
    record = {"rows": rows, "steps": {}, "left out": []}
    (run.folder / "evaluation").mkdir()
    (run.folder / "evaluation" / "evaluation.json").write_bytes(signed(record))
    return run


@pytest.fixture(scope="module")
def packed(evaluated_run: Run, licensed: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of that run."""
    out = tmp_path_factory.mktemp("packed") / "pack"
    made = pack.write_pack(
        evaluated_run, out, PackOptions(evaluation=evaluated_run.folder / "evaluation"), model=licensed
    )
    assert (made.folder, made.whole, made.licence) == (out, True, "other")
    return out


def test_a_pack_has_a_card_with_figures_and_terms_and_no_word_of_this_machine(
    packed: Path, licensed: LoadedModel
) -> None:
    card = ModelCard.load(packed / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "as-you-please")
    assert card.data.tags == ["diffusion", "quantized", "onnx", "W4A8"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("gaq-export", "unconditional-image-generation")
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_name) == ("Frechet distance", 3.25, "mnist.npz")
    assert "| unet | 3.25 [3, 3.5], floor 1 |" in card.text
    assert "as-you-please, as the source model is" in card.text
    assert (packed / "LICENSE.md").read_text() == "Do as you please."
    names = set(pack.read_pack(packed).files) | {"pack.json", "README.md"}
    assert names == {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    assert {"onnx/unet.step.reference.onnx", "unet/config.json", "scheduler/scheduler_config.json"} < names
    here = [str(Path(str(licensed.source)).parents[1]).encode(), str(Path(pack.__file__).parent).encode()]
    for name in names:
        assert not any(place in (packed / name).read_bytes() for place in here), name


def test_an_engine_built_from_a_pack_alone_draws_the_same_bytes(
    packed: Path, tiny_step_engine: EngineFile, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(packed, tmp_path / "fetched")
    words = ("--backend", "openvino", "--threads", 1, "--steps", 5, "--eta", 0.5, "--quiet")
    engine, run = tmp_path / "unet.plan", tmp_path / "run"
    gaq("build-engine", "--weights", elsewhere, "--run", run, "--out", engine, *words)
    for name, file in (("there", tiny_step_engine.path), ("here", engine)):
        pipeline.sample(file, num=2, batch=2, out=tmp_path / name)
    for name in ("000000.png", "000001.png"):
        found, expected = (_pixels(tmp_path / place / name) for place in ("here", "there"))
        assert found == expected
    again = pack.unpack(elsewhere, Run(folder=run))  # the same, so it is no other
    assert again.provenance["model"]["source"] == str(elsewhere.resolve())
    model = find_model(None, str(elsewhere))  # what `calibrate --weights` calibrates
    assert (model.spec.name, model.fingerprint) == ("tiny", again.provenance["model"]["fingerprint"])
    plan = load_plan(elsewhere / "plan.safetensors")
    assert torch.equal(again.scores, plan.scores)


def _pixels(file: Path) -> bytes:
    from PIL import Image

    with Image.open(file) as image:
        return image.tobytes()


def test_a_model_that_the_hub_has_is_not_packed_again(
    evaluated_run: Run, licensed: LoadedModel, tmp_path: Path
) -> None:
    model = replace(licensed, source=WeightSource.hub("google/tiny", COMMIT))
    made = pack.write_pack(evaluated_run, tmp_path / "pack", PackOptions(licence="mit"), model=model)
    assert (made.whole, made.licence) == (False, "mit")
    assert pack.float_model(made.folder) == ("tiny", f"hub:google/tiny@{COMMIT}")
    assert not (made.folder / "unet").exists()
    data = ModelCard.load(made.folder / "README.md").data
    assert (data.base_model, data.base_model_relation, data.license) == ("google/tiny", "quantized", "mit")
    assert "Not evaluated." in (made.folder / "README.md").read_text()


def test_what_is_no_whole_pack_or_would_be_lost_is_refused(packed: Path, evaluated_run: Run, tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run")
    with pytest.raises(GaqError, match=r"nothing is not a pack: it has no pack\.json"):
        pack.unpack(tmp_path / "nothing", run)
    broken = shutil.copytree(packed, tmp_path / "broken")
    (broken / "plan.json").write_text("{}")
    with pytest.raises(GaqError, match=r"plan\.json is not what pack\.json says \(sha256\)"):
        pack.unpack(broken, run)
    (broken / "plan.json").unlink()
    with pytest.raises(GaqError, match=r"has no file plan\.json, which its pack\.json lists"):
        pack.unpack(broken, run)
    record = json.loads((broken / "pack.json").read_text())
    (broken / "pack.json").write_text(json.dumps(record | {"files": {"../pack.json": "0" * 64}}))
    with pytest.raises(GaqError, match=r"The name .\.\./pack\.json. in a record of .* leads out of that folder"):
        pack.read_pack(broken)
    (broken / "pack.json").write_text(json.dumps(record | {"format": 0}))
    with pytest.raises(GaqError, match="is a pack of format 0, this version reads 1"):
        pack.read_pack(broken)
    assert not run.folder.exists()
    with pytest.raises(GaqError, match=r"holds a run with other settings \(model: "):
        pack.unpack(packed, evaluated_run)
    with pytest.raises(GaqError, match=r"run is there and has no pack\.json: choose a folder that is new, empty"):
        pack.write_pack(evaluated_run, evaluated_run.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": []}, "files is "),
        ({"files": {"plan.json": "x"}}, "files.plan.json is 'x'"),
        ({"files": {"/etc/hostname": "0" * 64}}, "leads out of that folder"),
        ({"source": None}, "source is None"),
        ({"source": "a\0"}, "source is "),
        ({"settings": {}}, "settings: model is missing"),
        ({"settings": {"images": 4, "model": {"name": 3}}}, "settings.model: name is 3"),
        ({"colour": 1}, "colour is a field that this version does not know"),
    ],
)
def test_a_record_of_another_form_is_one_line(
    changes: dict[str, Any], message: str, packed: Path, tmp_path: Path
) -> None:
    record = json.loads((packed / "pack.json").read_text())
    (tmp_path / "pack.json").write_text(json.dumps(record | changes))
    with pytest.raises((CalibError, GaqError), match=message) as error:
        pack.read_pack(tmp_path)
    assert "\n" not in str(error.value)


class _Hub(BaseHTTPRequestHandler):
    """What the Hugging Face hub answers when a repository is made, filled in one commit, and fetched."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    made: list[dict[str, Any]]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Stay silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            body = self.files[path.partition(f"/resolve/{COMMIT}/")[2]]
            self._answer(body, ETag=f'"{hashlib.sha256(body).hexdigest()}"')
        elif "/tree/" in path:
            listing = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()]
            self._answer(json.dumps(listing).encode())
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self._answer(json.dumps({"id": "me/digits", "sha": COMMIT, "siblings": siblings}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {}
        if self.path.endswith("/repos/create"):
            self.made.append(json.loads(body))
            answer = {"url": f"http://{self.headers['Host']}/me/digits", "name": "me/digits"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/digits/commit/{COMMIT}", "commitOid": COMMIT}
        self._answer(json.dumps(answer).encode())

    def _answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for key, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, hub_at: Callable[[str], None]) -> Iterator[type[_Hub]]:
    """A server on this machine that answers like the hub, and keeps what it is given."""
    handler = type("Hub", (_Hub,), {"files": {}, "made": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hub_at(f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield handler
        server.shutdown()
        thread.join()


def test_a_pack_goes_to_the_hub_in_private_and_comes_back_whole(
    evaluated_run: Run, hub: type[_Hub], tmp_path: Path
) -> None:
    packed = tmp_path / "pack"
    line = gaq("pack", evaluated_run.folder, "--out", packed, "--license", "mit")
    assert line.startswith(f"{packed} (")
    assert line.endswith(" MB, with the float model)")
    with (packed / "README.md").open("a") as card:
        card.write("Edited by hand.")
    assert "me/digits" in gaq("push", packed, "me/digits")
    (made,) = hub.made
    assert (made["name"], made["organization"], made["visibility"]) == ("digits", "me", "private")
    assert set(hub.files) == {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    line = gaq("pull", "me/digits", "--out", tmp_path / "back")
    assert line == f"{tmp_path / 'back'}; next: gaq-export build-engine --weights {tmp_path / 'back'}"
    assert pack.read_pack(tmp_path / "back") == pack.read_pack(packed)
    assert (tmp_path / "back" / "README.md").read_text().endswith("Edited by hand.")
    hub.files["plan.json"] = b"{}"
    refused = CliRunner().invoke(app, ["pull", "me/digits", "--out", str(tmp_path / "altered")])
    assert refused.exit_code == 2
    assert "plan.json is not what pack.json says" in refused.stderr


def test_a_hub_out_of_reach_is_one_line_either_way(evaluated_run: Run, tmp_path: Path) -> None:
    for words in (
        ("push", evaluated_run.folder, "me/digits", "--license", "mit"),
        ("pull", "me/digits", "--out", tmp_path / "back"),
    ):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert "me/digits" in result.stderr
        assert "the Hugging Face hub" in result.stderr
    assert pack.read_pack(evaluated_run.folder / "pack").source == "pack"  # what was packed is not lost
    assert not (tmp_path / "back").exists()
