import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from gaq_export.errors import GaqError
from gaq_export.models import hub
from gaq_export.models.diffusers_folder import fingerprint
from gaq_export.models.loader import load_model
from gaq_export.models.weight_files import DIFFUSERS, SAFETENSORS

COMMIT = "0123456789abcdef0123456789abcdef01234567"

INDEX, PICKLE = f"{SAFETENSORS}.index.json", DIFFUSERS.pickle


def test_of_a_pipelines_repository_each_part_is_fetched_once() -> None:
    files = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "v1-5.ckpt"]
    files += [f"{place}/{name}" for place in ("unet", "vae") for name in (SAFETENSORS, PICKLE)]
    files += ["text_encoder/model.safetensors", "tokenizer/merges.txt", "safety_checker/model.safetensors"]
    shards = ["transformer/diffusion_pytorch_model-00001-of-00002.safetensors", f"transformer/{INDEX}"]
    assert set(hub.wanted(files + shards)) == {
        "model_index.json",
        "unet/config.json",
        f"unet/{SAFETENSORS}",
        f"vae/{SAFETENSORS}",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        *shards,
    }


class _Hub(BaseHTTPRequestHandler):
    """The four answers of the Hugging Face hub that a download needs, for whatever lies in `folder`."""

    folder: Path

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Stay silent."""

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, *, send_body: bool) -> None:
        names = sorted(path.name for path in self.folder.iterdir())
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        if "/resolve/" in path:
            body = (self.folder / path.rpartition("/")[2]).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        elif "/tree/" in path:
            listing = [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in names]
            body = json.dumps(listing).encode()
        else:
            siblings = [{"rfilename": n} for n in names]
            body = json.dumps({"id": "google/ddpm-church-256", "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)


@pytest.fixture
def local_hub(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, hub_at: Callable[[str], None]) -> Iterator[Path]:
    """A server on this machine that answers like the hub with the files of the tiny model."""
    handler = type("Hub", (_Hub,), {"folder": tiny_folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hub_at(f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield tiny_folder
        server.shutdown()
        thread.join()


def test_a_hub_out_of_reach_is_one_error_that_names_every_way_out() -> None:
    with pytest.raises(GaqError) as caught:
        load_model("ddpm-cifar10")
    for way in ("google/ddpm-cifar10-32", "--weights", "GAQ_EXPORT_MODELS", "--weights random", "'ddpm-mnist'"):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_out_of_reach_is_known_within_seconds() -> None:
    code = "from gaq_export.models.loader import load_model; load_model('ddpm-church')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "Retrying" not in done.stderr
    assert "GaqError: Cannot fetch google/ddpm-church-256 from the Hugging Face hub" in done.stderr


def test_a_hub_model_records_its_commit_and_is_found_again_offline(
    local_hub: Path, tiny_unet: UNet2DModel, hub_at: Callable[[str], None]
) -> None:
    model = load_model("ddpm-church")
    assert str(model.source) == f"hub:google/ddpm-church-256@{COMMIT}"
    assert model.fingerprint == fingerprint(tiny_unet)
    hub_at("http://127.0.0.1:9")
    assert load_model("ddpm-church", model.source).fingerprint == model.fingerprint
    assert load_model("ddpm-church").source == model.source


def test_without_the_hub_the_nearest_model_in_the_cache_is_named(
    local_hub: Path, tiny_unet: UNet2DModel, hub_at: Callable[[str], None]
) -> None:
    load_model("ddpm-church")
    hub_at("http://127.0.0.1:9")
    way = f"hub:google/ddpm-church-256@{COMMIT}"
    with pytest.raises(GaqError) as caught:
        load_model(weights=f"hub:google/ddpm-church-256@{'f' * 40}")
    assert f"({'f' * 40}" not in str(caught.value)
    assert f"). In the cache is another commit of it: --weights {way}. Give" in str(caught.value)
    assert load_model(weights=way).fingerprint == fingerprint(tiny_unet)
    with pytest.raises(GaqError, match=rf"In the cache is google/ddpm-church-256: --weights {way}\. Give") as caught:
        load_model(weights="hub:google/ddpm-ema-church-256")
    assert "\n" not in str(caught.value)
    with pytest.raises(GaqError) as caught:
        load_model(weights="hub:someone/else")
    assert "In the cache" not in str(caught.value)


def test_a_hub_checkpoint_in_the_old_format_loads_with_its_old_attention_names(
    local_hub: Path, tiny_unet: UNet2DModel, caplog: pytest.LogCaptureFixture
) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(local_hub / SAFETENSORS)
    for new_name, old_name in old.items():
        state = {name.replace(f".{new_name}.", f".{old_name}."): value for name, value in state.items()}
    assert any(".proj_attn." in name for name in state)
    torch.save(state, local_hub / PICKLE)
    (local_hub / SAFETENSORS).unlink()
    assert load_model("ddpm-church").fingerprint == fingerprint(tiny_unet)
    assert f"{PICKLE} is a pickle: it is read as tensors only, and no code in it is run" in caplog.text


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_a_repository_with_a_variant_alone_is_fetched_and_found_again_offline(
    variant: str, local_hub: Path, tiny_unet: UNet2DModel, hub_at: Callable[[str], None]
) -> None:
    (local_hub / SAFETENSORS).rename(local_hub / f"{DIFFUSERS.stem}.{variant}.safetensors")
    assert load_model("ddpm-church").fingerprint == fingerprint(tiny_unet)
    hub_at("http://127.0.0.1:9")
    assert load_model("ddpm-church").fingerprint == fingerprint(tiny_unet)


def test_weights_in_several_files_are_read_through_the_links_of_the_cache(
    local_hub: Path, tiny_unet: UNet2DModel
) -> None:
    state = load_file(local_hub / SAFETENSORS)
    part = f"{DIFFUSERS.stem}-00001-of-00001.safetensors"
    (local_hub / SAFETENSORS).rename(local_hub / part)
    (local_hub / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, part)}))
    assert load_model("ddpm-church").fingerprint == fingerprint(tiny_unet)


def test_a_pickle_that_would_run_code_is_refused(local_hub: Path) -> None:
    torch.save({"conv_in.bias": subprocess.run}, local_hub / PICKLE)
    (local_hub / SAFETENSORS).unlink()
    with pytest.raises(
        GaqError, match=r"hold more than tensors \(\S+\.run\), which could run code, so they were not read"
    ):
        load_model("ddpm-church")
