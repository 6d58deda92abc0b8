"""Models by their name on the hub: downloaded once, read from the cache offline, and errors that say what to do by hand.

A server on this machine stands in for the hub, so huggingface_hub's own client and cache run.
"""

import http.server
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from small import TRANSFORMERS_FIELDS, config, randomise

import dpt
from dpt.checkpoints import CheckpointError, hub

transformers = pytest.importorskip("transformers")
constants = pytest.importorskip("huggingface_hub.constants")
CONFIG = config("dpt-large-midas")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """`/owner/name/resolve/main/file` as the hub answers it, out of a folder `root`."""

    root: Path
    requests: list[tuple[str, str]]

    def do_HEAD(self) -> None:
        self.requests.append(("HEAD", self.path))
        self.answer(body=False)

    def do_GET(self) -> None:
        self.requests.append(("GET", self.path))
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name, _, file = self.path.lstrip("/").partition("/resolve/")
        folder, path = self.root / name, self.root / name / file.partition("/")[2]
        if not folder.is_dir() or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if folder.is_dir() else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hash(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models on the hub, one whole and one in shards, and the model itself."""
    root = tmp_path_factory.mktemp("hub")
    model = randomise(transformers.DPTForDepthEstimation(transformers.DPTConfig(**TRANSFORMERS_FIELDS)))
    model.save_pretrained(root / "owner" / "whole")
    model.save_pretrained(root / "owner" / "shards", max_shard_size="100KB")
    shutil.copytree(root / "owner" / "whole", root / "owner" / "empty").joinpath("model.safetensors").unlink()
    return root, model


@pytest.fixture
def served(models, tmp_path, monkeypatch):
    """The requests of a server that is the hub for this test, with a cache of its own."""
    handler = type("HandlerOfTest", (Handler,), {"root": models[0], "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield handler.requests
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["owner/whole", "owner/shards"])
def test_a_name_is_downloaded_once_and_then_works_offline(served, models, monkeypatch, name):
    """Blind spot: a second download; a cache that only works online."""
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = models[1](x).predicted_depth
        loaded = dpt.load(name)
        assert (loaded(x) - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert loaded.config.name == name.removeprefix("owner/") and loaded.config.encoder.norm_eps == 1e-12
        fetched = [path for method, path in served if method == "GET" and path.endswith(".safetensors")]
        assert len(fetched) == len(set(fetched)) == (1 if name == "owner/whole" else len(fetched)) > 0
        served.clear()
        dpt.load(name)
        assert served == []  # neither asked for nor asked after
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert torch.equal(dpt.load(name)(x), loaded(x))


def test_the_address_of_a_file_there(served, models, monkeypatch):
    """Blind spot: files of one name in two models, kept as one; a second download; what the address of a page or a query adds."""
    address = "https://huggingface.co/owner/whole/resolve/main/model.safetensors"
    first = hub.fetched(f"{address}?download=true")
    assert first.read_bytes() == (models[0] / "owner" / "whole" / "model.safetensors").read_bytes()
    served.clear()
    assert hub.fetched(address) == first and served == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(dpt.load(address, CONFIG).head.conv1.weight, models[1].head.head[0].weight)
    with pytest.raises(OSError, match=r"owner/shards/resolve/main/model\.safetensors could not be downloaded: .*HF_HUB_OFFLINE.*--weights"):
        dpt.load(address.replace("whole", "shards"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("owner/nothing", "RepositoryNotFoundError"), ("owner/empty", "EntryNotFoundError"), ("offline/model", "OfflineModeIsEnabled")],
)
def test_errors_name_the_model_the_reason_and_the_way_by_hand(served, monkeypatch, name, reason):
    """Blind spot: a traceback from an HTTP client; a name that is really a path, without a word that no such file is here."""
    if name.startswith("offline"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = (
        rf"{name}: no such file or folder here, and .*{reason}: .*; by hand: download config.json, .*https://huggingface.co/{name}/.*FOLDER"
    )
    with pytest.raises(CheckpointError, match=message):
        dpt.load(name)
    with pytest.raises(CheckpointError, match=message) as caught:
        dpt.build("dpt-large-midas", weights=name)
    assert name != "offline/model" or ("HF_HUB_OFFLINE" in str(caught.value) and "check your connection" not in str(caught.value))


def test_a_processor_that_cannot_be_had_is_not_guessed(served, monkeypatch):
    """Blind spot: a cache that somebody filled with the model alone, and pictures prepared by defaults because the network is away."""
    from huggingface_hub import hf_hub_download

    for file in ("config.json", "model.safetensors"):
        hf_hub_download("owner/whole", file)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match="owner/whole: .*preprocessor_config.json is not in the cache and cannot be downloaded now: .*HF_HUB_OFFLINE"
    ):
        dpt.load("owner/whole")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert dpt.load("owner/whole").config.input.size == (64, 64)


def test_without_the_package(monkeypatch):
    """Blind spot: ModuleNotFoundError without the name of what was asked for."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="owner/model: models on the hub need the package huggingface_hub"):
        dpt.load("owner/model")


@pytest.mark.parametrize(
    "path", ["a/model.pth", "/owner/model", "./owner/model", "owner/model/file", "model", "../model", "a b/c", "a/x.safetensors"]
)
def test_paths_are_not_names(path):
    """Blind spot: a mistyped path that is looked for on the network."""
    assert not hub.is_name(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        dpt.load(path)


def test_a_folder_here_goes_before_the_hub(served, models, tmp_path):
    """Blind spot: the hub's model in the place of the folder of that name."""
    shutil.copytree(models[0] / "owner" / "whole", tmp_path / "owner" / "whole")
    assert dpt.load("owner/whole").config.name == "whole" and served == []
