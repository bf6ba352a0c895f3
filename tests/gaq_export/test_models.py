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
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models import hub
from gaq_export.models.architectures import condition_inputs_of
from gaq_export.models.diffusers_folder import INDEX, PICKLE, SAFETENSORS, build_network, fingerprint
from gaq_export.models.loader import load_model, random_model, wrap
from gaq_export.models.registry import MODELS, reduced

SIZES = {
    "ddpm-mnist": 1_112_801,
    "ddpm-mnist-labels": 1_112_801 + 11 * 128,
    "ddpm-cifar10": 35_746_307,
    "ddpm-church": 113_673_219,
    "ldm-celebahq-256": 274_056_163,
    "imagenet-ldm": 400_920_579 + 1001 * 512,
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "dit-xl-2-256": 749_826_464,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_table_knows_the_published_architectures() -> None:
    for name, size in SIZES.items():
        with torch.device("meta"):
            unet = build_network(MODELS[name].config, name)
        assert sum(p.numel() for p in unet.parameters()) == size
    assert MODELS["ddpm-bedroom"].config == MODELS["ddpm-church"].config
    assert all(name == row.name for name, row in MODELS.items())


@pytest.mark.parametrize("name", ["ldm-bedrooms", "imagenet-ldm", "sdxl", "dit-xl-2-256"])
def test_a_known_model_at_reduced_width_has_the_same_kinds_of_blocks(name: str) -> None:
    row = MODELS[name]
    model = random_model(reduced(row))
    assert (model.random_weights, str(model.source), model.shape[1:]) == (True, "module", (16, 16))
    assert sum(p.numel() for p in model.module.parameters()) < 2_000_000
    with torch.device("meta"):
        whole = build_network(row.config, name)
    assert {type(m) for m in model.module.modules()} == {type(m) for m in whole.modules()}
    assert model.condition_inputs.keys() == condition_inputs_of(whole).keys()
    assert (model.spec.sampler, model.spec.guidance) == (row.sampler, row.guidance)


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


def test_the_bundled_model_loads_by_name_alone() -> None:
    model = load_model("ddpm-mnist")
    assert (str(model.source), model.random_weights, model.shape) == ("bundled", False, (1, 32, 32))
    assert model.spec.sampler == SamplerSpec(name="ddim", steps=50, spacing="uniform")
    assert model.schedule.num_train == 1000
    assert not model.module.training
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert load_model("ddpm-mnist", model.source).fingerprint == model.fingerprint


def test_the_bundled_model_predicts_the_noise_in_a_noisy_stroke() -> None:
    model = load_model("ddpm-mnist")
    clean = torch.full((1, 1, 32, 32), -1.0)
    clean[..., 6:26, 15:18] = 1.0
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    a = model.schedule.alpha_bar[200].float()
    with torch.no_grad():
        predicted = model.module(a.sqrt() * clean + (1 - a).sqrt() * noise, torch.tensor([200])).sample
    assert (predicted - noise).square().mean() < 0.05


def test_a_folder_decides_structure_name_and_schedule(tiny_folder: Path, tiny_unet: UNet2DModel) -> None:
    model = load_model(None, tiny_folder)
    assert (model.spec.name, str(model.source), model.shape) == ("tiny", str(tiny_folder.resolve()), (1, 16, 16))
    assert model.schedule.num_train == 100
    assert model.spec.sampler == SamplerSpec()
    for name, value in tiny_unet.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], value)
    assert load_model(model.spec.name, model.source).fingerprint == model.fingerprint


def test_a_folder_under_a_known_name_borrows_its_sampler_and_not_its_structure(tiny_folder: Path) -> None:
    model = load_model("ddpm-cifar10", tiny_folder)
    assert model.spec.sampler == MODELS["ddpm-cifar10"].sampler
    assert model.shape == (1, 16, 16)
    (tiny_folder / "scheduler_config.json").unlink()
    assert load_model("ddpm-cifar10", tiny_folder).schedule.num_train == 1000


def test_a_pipeline_folder_is_read_from_its_subfolders(tiny_unet: UNet2DModel, tmp_path: Path) -> None:
    tiny_unet.save_pretrained(tmp_path / "pipe" / "unet")
    DDPMScheduler(num_train_timesteps=40, beta_end=0.5).save_pretrained(tmp_path / "pipe" / "scheduler")
    model = load_model(weights=tmp_path / "pipe")
    assert (model.spec.name, model.schedule.num_train) == ("pipe", 40)


def test_half_precision_weights_become_float32(tiny_folder: Path) -> None:
    _rewrite(tiny_folder, lambda state: {name: value.half() for name, value in state.items()})
    assert {p.dtype for p in load_model(weights=tiny_folder).module.parameters()} == {torch.float32}


def test_random_weights_are_seeded_and_marked_and_leave_the_random_stream_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (load_model("ddpm-mnist", weights) for weights in ("random", "random:0", "random:7"))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.random_weights
    assert str(first.source) == "random"
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert load_model("ddpm-mnist", other.source).fingerprint == other.fingerprint


def test_a_module_of_the_callers_own_becomes_a_model_as_it_is(tiny_schedule: NoiseSchedule) -> None:
    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.conv(x))

    module = Linear()
    model = wrap(module, shape=(3, 8, 12), schedule=tiny_schedule)
    assert model.network is module
    assert not module.training
    assert (model.shape, str(model.source), model.spec.sampler) == ((3, 8, 12), "module", SamplerSpec())
    assert model.fingerprint == fingerprint(module)


def test_the_environment_variable_comes_before_the_bundled_model(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAQ_EXPORT_MODELS", str(tiny_folder.parent))
    assert str(load_model("ddpm-mnist").source) == "bundled"
    tiny_folder.rename(tiny_folder.with_name("ddpm-mnist"))
    model = load_model("ddpm-mnist")
    assert (str(model.source), model.shape) == (str((tiny_folder.parent / "ddpm-mnist").resolve()), (1, 16, 16))
    monkeypatch.setenv("GAQ_EXPORT_MODELS", str(tiny_folder.parent / "gone"))
    with pytest.raises(GaqError, match=r"GAQ_EXPORT_MODELS names .*gone, which is not a folder"):
        load_model("ddpm-mnist")


def test_a_fingerprint_is_the_hash_of_names_shapes_and_bytes() -> None:
    layer = torch.nn.Linear(2, 1)
    state = {name: value.detach().numpy().tobytes() for name, value in layer.state_dict().items()}
    expected = hashlib.sha256(b"bias(1,)" + state["bias"] + b"weight(1, 2)" + state["weight"]).hexdigest()
    assert fingerprint(layer) == expected
    with torch.no_grad():
        layer.weight[0, 0] += 1e-6
    assert fingerprint(layer) != expected


def test_an_unknown_model_is_answered_with_the_list_and_the_nearest_name() -> None:
    with pytest.raises(GaqError, match=r"Unknown model 'ddpm-cifar'\. Did you mean 'ddpm-cifar10'\?.*'ddpm-bedroom'"):
        load_model("ddpm-cifar")
    with pytest.raises(GaqError, match=r"No model was named.*'ddpm-mnist'"):
        load_model()
    with pytest.raises(GaqError, match=r"'ddpm-church' are not bundled. Bundled models: \['ddpm-mnist', 'ddpm-m"):
        load_model("ddpm-church", "bundled")
    with pytest.raises(GaqError, match="random:x must be a whole number"):
        load_model("ddpm-mnist", "random:x")


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / SAFETENSORS)), folder / SAFETENSORS)


def _config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def _truncate(folder: Path) -> None:
    data = (folder / SAFETENSORS).read_bytes()
    (folder / SAFETENSORS).write_bytes(data[: len(data) // 2])


def _only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / SAFETENSORS), folder / PICKLE)
    (folder / SAFETENSORS).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object, not a list"),
    "wrong class": (
        lambda f: _config(f, _class_name="VQModel"),
        "a 'VQModel'; supported are .*'UNet2DModel'",
    ),
    "odd block": (lambda f: _config(f, down_block_types=["Down", "Down"]), "cannot build the architecture"),
    "odd type": (lambda f: _config(f, block_out_channels="wide"), "cannot build the architecture"),
    "times for classes": (lambda f: _config(f, class_embed_type="timestep"), r"class_embed_type 'timestep'.*\[None\]"),
    "odd channels": (lambda f: _config(f, out_channels=3), "turns 1 channels into 3"),
    "no size": (lambda f: _config(f, sample_size=None), "has no sample_size"),
    "no weights": (lambda f: (f / SAFETENSORS).unlink(), "has no weights beside its config.json"),
    "only a pickle": (_only_pickle, "are a pickle.*save_pretrained"),
    "truncated": (_truncate, "are damaged"),
    "not safetensors": (lambda f: (f / SAFETENSORS).write_bytes(b"version https://git-lfs"), "are damaged"),
    "missing": (
        lambda f: _rewrite(f, lambda s: {k: v for k, v in s.items() if k != "conv_in.bias"}),
        r"1 tensors missing \[conv_in.bias\], 0 unexpected \[\]",
    ),
    "unexpected": (
        lambda f: _rewrite(f, lambda s: s | {f"extra.{i}": torch.zeros(1) for i in range(5)}),
        r"0 tensors missing \[\], 5 unexpected \[extra.0, extra.1, extra.2, \.\.\.\]",
    ),
    "shape": (
        lambda f: _rewrite(f, lambda s: s | {"conv_in.bias": torch.zeros(7)}),
        r"'conv_in.bias' .* shape \(7,\), .* asks for \(16,\)",
    ),
    "integers": (
        lambda f: _rewrite(f, lambda s: s | {"conv_in.bias": torch.zeros(16, dtype=torch.int32)}),
        "is torch.int32",
    ),
    "nan": (lambda f: _rewrite(f, lambda s: s | {"conv_in.bias": torch.full((16,), torch.nan)}), "'conv_in.bias'.*NaN"),
    "no scheduler": (lambda f: (f / "scheduler_config.json").unlink(), "has no scheduler_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(tiny_folder: Path, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    break_it(tiny_folder)
    with pytest.raises(GaqError, match=message) as caught:
        load_model(weights=tiny_folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GaqError, match=r"There is no model folder .*gone"):
        load_model(weights=tmp_path / "gone")


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
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "Retrying" not in done.stderr
    assert "GaqError: Cannot fetch google/ddpm-church-256 from the Hugging Face hub" in done.stderr


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


def test_a_hub_model_records_its_commit_and_is_found_again_offline(
    local_hub: Path, tiny_unet: UNet2DModel, hub_at: Callable[[str], None]
) -> None:
    model = load_model("ddpm-church")
    assert str(model.source) == f"hub:google/ddpm-church-256@{COMMIT}"
    assert model.fingerprint == fingerprint(tiny_unet)
    hub_at("http://127.0.0.1:9")
    assert load_model("ddpm-church", model.source).fingerprint == model.fingerprint
    assert load_model("ddpm-church").source == model.source


def test_a_hub_checkpoint_in_the_old_format_loads_with_its_old_attention_names(
    local_hub: Path, tiny_unet: UNet2DModel
) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(local_hub / SAFETENSORS)
    for new_name, old_name in old.items():
        state = {name.replace(f".{new_name}.", f".{old_name}."): value for name, value in state.items()}
    assert any(".proj_attn." in name for name in state)
    torch.save(state, local_hub / PICKLE)
    (local_hub / SAFETENSORS).unlink()
    assert load_model("ddpm-church").fingerprint == fingerprint(tiny_unet)


def test_a_pickle_that_would_run_code_is_refused(local_hub: Path) -> None:
    torch.save({"conv_in.bias": subprocess.run}, local_hub / PICKLE)
    (local_hub / SAFETENSORS).unlink()
    with pytest.raises(GaqError, match="are damaged"):
        load_model("ddpm-church")
