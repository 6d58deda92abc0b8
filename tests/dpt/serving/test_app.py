"""The endpoint over HTTP: what it answers, what it refuses and how it says so. Blind spot: an address that is not loopback's."""

from __future__ import annotations

import functools
import io
import json
import re
import socket
import struct
import threading
import time
import zlib
from typing import get_args
from urllib.parse import urlsplit

import numpy as np
import pytest
import serving
from PIL import ExifTags, Image
from serving import asked, error_of, post, until
from small import config as small_config

import dpt
from bench.serving import form
from dpt.commands import single
from dpt.commands.demo import PICTURES
from dpt.commands.main import main
from dpt.inference import outputs
from dpt.inference.points import VERTEX, as_distance, flying
from dpt.serving import answers, app, batching, guard

DEPTH, SCENES = "dpt-tiny-depth", "dpt-tiny-scenes"
CONTENT = PICTURES[0].read_bytes()
HOST = {"Host": "example.org"}


@pytest.fixture(scope="module")
def predicted(models):
    """As `dpt predict` has them; a batch of two has other bits than one of one."""
    return {name: model.predict(PICTURES[0], batch_size=2) for name, model in models.items()}


def test_depth_is_the_models(address, predicted, models):
    """Blind spot: a file that is not what `model.predict` says, or not that of `dpt predict`."""
    depth, head = predicted[DEPTH].depth, models[DEPTH].config.head
    status, headers, content = post(address, CONTENT, f"model={DEPTH}&as=npy")
    assert status == 200 and np.array_equal(np.load(io.BytesIO(content)), depth)
    assert headers["content-type"] == "application/octet-stream" and headers["cache-control"] == "no-store"
    status, headers, content = post(address, CONTENT, "as=png16")  # the first model that there is
    picture = Image.open(io.BytesIO(content))
    spread = (depth.astype(np.float64) - depth.min()) / (depth.max() - np.float64(depth.min()))
    assert np.array_equal(np.asarray(picture), np.rint(65535 * spread)) and picture.text["depth"] == outputs.meaning(head)
    assert headers["content-type"] == "image/png"
    _, _, content = post(address, CONTENT, "as=colours")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), outputs.colored(depth, head.inverse))
    _, headers, content = post(address, CONTENT)
    told = json.loads(content)
    assert told == {"model": DEPTH, "task": "depth", "width": 384, "height": 384, "unit": "inverse depth", "lowest": float(depth.min()),
                    "highest": float(depth.max()), "focal": None} and headers["content-type"] == "application/json"  # fmt: skip


def test_labels_are_the_models(address, predicted, models):
    """Blind spot: as depth."""
    labels, head = predicted[SCENES].labels, models[SCENES].config.head
    _, _, content = post(address, CONTENT, f"model={SCENES}&as=labels")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), labels) and labels.dtype == np.uint8
    _, _, content = post(address, CONTENT, f"model={SCENES}&as=npy")
    assert np.array_equal(np.load(io.BytesIO(content)), labels)
    _, _, content = post(address, CONTENT, f"model={SCENES}&as=colours")
    image = np.asarray(Image.open(PICTURES[0]).convert("RGB"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(outputs.tinted(image, labels, head)))
    told = json.loads(post(address, CONTENT, f"model={SCENES}")[2])
    assert {one["name"]: one["share"] for one in told["classes"]} == {
        head.classes[index]: (labels == index).mean() for index in np.unique(labels)
    }


def test_points_are_those_of_the_command(address, models, tmp_path, monkeypatch):
    """Blind spot: another camera than `dpt points` takes, by default, by `fov`, and by EXIF data. The command, which predicts one picture
    at a time, is given the server's batch of two here, and then writes the same bytes."""
    file = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 20
    Image.open(PICTURES[0]).convert("RGB").crop((0, 0, 384, 256)).save(file, exif=exif)
    monkeypatch.setattr(single, "predict_iter", functools.partial(single.predict_iter, batch_size=2))
    found = {}
    for query, picture in (("", PICTURES[0]), ("&fov=90", PICTURES[0]), ("", file), ("&fov=90", file)):
        options = ["--fov", "90"] if query else []
        assert main(["points", str(picture), "-o", str(tmp_path / "a.ply"), "--device", "cpu", *options]) == 0
        found[query, picture] = post(address, picture.read_bytes(), f"as=ply{query}")[2]
        assert found[query, picture] == (tmp_path / "a.ply").read_bytes()
    assert len(set(found.values())) == 4
    distance = as_distance(models[DEPTH].predict(PICTURES[0], batch_size=2).depth, models[DEPTH].config.head)
    assert np.array_equal(vertices(found["", PICTURES[0]])["z"], distance[~flying(distance)])


def vertices(ply: bytes) -> np.ndarray:
    return np.frombuffer(ply.partition(b"end_header\n")[2], VERTEX)


def test_the_picture_is_what_the_model_saw(address):
    """Blind spot: a picture on its side, for a browser that cannot read its file."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(PICTURES[0]).convert("RGB").crop((0, 0, 384, 100)).save(file, "TIFF", exif=exif)
    status, headers, content = post(address, file.getvalue(), "as=picture")
    shown = Image.open(io.BytesIO(content))
    assert status == 200 and headers["content-type"] == "image/jpeg" and shown.size == (100, 384)
    wanted = np.asarray(Image.open(PICTURES[0]).convert("RGB").crop((0, 0, 384, 100)).transpose(Image.Transpose.ROTATE_270))
    assert abs(np.asarray(shown).astype(int) - wanted).mean() < 5


def test_a_model_of_several_tasks():
    """Blind spot: the first task alone."""
    config = small_config("tipsv2-base", classes=3)
    with serving.started({"small": dpt.DPT(config).eval()}) as (address, service):
        found = {}
        for task, kind in (("depth", "npy"), ("segmentation", "npy"), ("normals", "npy")):
            found[task] = np.load(io.BytesIO(post(address, CONTENT, f"task={task}&as={kind}")[2]))
        wanted = service.models["small"].predict(PICTURES[0], batch_size=2)
        for task, values in (("depth", wanted.depth), ("segmentation", wanted.labels), ("normals", wanted.normals)):
            assert np.array_equal(found[task], values), task
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(post(address, CONTENT, "as=labels")[2]))), wanted.labels)
        assert json.loads(post(address, CONTENT, "task=normals")[2])["unit"] == "normal"
        millimetres = np.asarray(Image.open(io.BytesIO(post(address, CONTENT, "as=png16")[2])))
        assert np.array_equal(millimetres, np.rint(wanted.depth.astype(np.float64) * config.head.depth_scale).clip(0, 65535))
        status, _, content = post(address, CONTENT, "task=normals&as=ply")
        assert status == 422 and error_of(content) == "task='normals': as=ply of small is of depth"


@pytest.mark.parametrize(
    ("query", "content", "status", "says"),
    [
        ("model=dpt-tiny-dept", CONTENT, 404, "model='dpt-tiny-dept': this server has dpt-tiny-depth, dpt-tiny-scenes (did you mean"),
        ("as=jpg", CONTENT, 422, "as='jpg': input should be 'json'"),
        ("as=labels", CONTENT, 422, "as='labels': dpt-tiny-depth predicts depth, which has none"),
        (f"model={SCENES}&as=ply", CONTENT, 422, "as='ply': dpt-tiny-scenes predicts segmentation, which has none"),
        ("task=normals", CONTENT, 422, "task='normals': as=json of dpt-tiny-depth is of depth"),
        ("fov=180", CONTENT, 422, "fov='180': input should be less than 180"),
        ("focal=100", CONTENT, 422, "focal=100: dpt-tiny-depth takes no focal length"),
        ("focal=nan", CONTENT, 422, "focal='nan'"),
        ("", b"", 422, "a.png: the file is empty"),
        ("", b"text", 422, "a.png: not a picture in a format that is read here: JPEG"),
        ("", CONTENT[: len(CONTENT) // 2], 422, "a.png: "),
        ("as=picture", b"text", 422, "a.png: not a picture"),
    ],
)
def test_what_cannot_be_answered_is_said(address, query, content, status, says):
    """Blind spot: a page of HTML, a traceback, a status that says nothing; a server that goes on no more."""
    found, headers, body = post(address, content, query)
    assert (found, headers["content-type"]) == (status, "application/json") and error_of(body).startswith(says)
    assert post(address, CONTENT)[0] == 200


def test_a_body_that_is_no_form(address):
    assert asked(address, "/predict", CONTENT, {"Content-Type": "image/png"}, "POST")[::2] == (
        415, b'{"error":"Content-Type: image/png: it must be multipart/form-data, with the picture in the field \'picture\'"}',
    )  # fmt: skip
    body, headers = form(CONTENT)
    status, _, content = asked(address, "/predict", body.replace(b'name="picture"', b'name="image"'), headers, "POST")
    assert status == 422 and error_of(content) == "picture: field required"
    status, _, content = asked(address, "/predict", b"nothing of the kind", headers, "POST")
    assert 400 <= status < 500 and error_of(content)
    status, _, content = asked(address, "/predict")
    assert status == 405 and error_of(content) == "Method Not Allowed"
    assert asked(address, "/nothing")[0] == 404


def test_the_name_of_a_file_opens_nothing(address, tmp_path):
    """Blind spot: a path that the client chose, read on the server."""
    (tmp_path / "there.png").write_bytes(CONTENT)
    for name in (str(tmp_path / "there.png"), "../../../../etc/passwd", "/etc/passwd"):
        status, _, content = post(address, b"text", name=name)
        assert status == 422 and "not a picture" in error_of(content)
    for path in ("/page/..%2Fapp.py", "/page/../app.py", "/examples/..%2F..%2F__init__.py", "/examples/%2Fetc%2Fpasswd"):
        assert asked(address, path)[0] == 404


def head(length: int, kind: str, *others: str) -> bytes:
    """What a POST begins with, of a client that writes it itself."""
    lines = ["POST /predict HTTP/1.1", "Host: localhost", f"Content-Length: {length}", f"Content-Type: {kind}", *others]
    return "\r\n".join([*lines, "", ""]).encode()


def chunks(total: int, read: list[int]):
    """A body in pieces, of no known length; keeps how much was taken."""
    body, _ = form(b"", "a.png")
    start, tail = body.split(b"\r\n\r\n", 1)
    yield start + b"\r\n\r\n"
    for _ in range(total // 65536):
        read.append(65536)
        yield bytes(65536)
    yield tail


def test_too_many_bytes(models):
    """Blind spot: a limit that is asked after all is read; a body of no stated length; a picture of the limit's very size."""
    limit = len(CONTENT)
    with serving.started(models, max_bytes=limit) as (address, service):
        assert post(address, CONTENT)[0] == 200
        status, _, content = post(address, CONTENT + b"\0")
        assert status == 413 and error_of(content) == f"{limit + 1} bytes: a picture has at most {limit} (--max-bytes)"
        _, headers = form(b"")
        place, started = urlsplit(address), time.monotonic()
        with socket.create_connection((place.hostname, place.port)) as client:  # which sends nothing of what it announces
            client.sendall(head(10**12, "multipart/form-data; boundary=x", "Expect: 100-continue"))
            assert client.recv(100).startswith(b"HTTP/1.1 413")
        assert time.monotonic() - started < guard.LINGER_SECONDS
        kept = []
        parse = service.app._app.__call__
        read: list[int] = []

        async def counted(scope, receive, send):
            async def seen():
                message = await receive()
                kept.append(len(message.get("body", b"")))
                return message

            await parse(scope, seen, send)

        service.app._app = counted
        status, _, content = asked(address, "/predict", chunks(8 * limit, read), headers, "POST")
        assert status == 413 and error_of(content).startswith("more than ") and sum(read) > 7 * limit
        assert sum(kept) <= limit + guard.FORM_BYTES  # the rest was thrown away as it came
        assert post(address, CONTENT)[0] == 200 and until(lambda: service.app.inside == 0)


def test_too_many_pixels(models):
    """Blind spot: a small file that announces a huge picture, decoded to see how large it is."""
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"x")
    with serving.started(models, max_pixels=384 * 384) as (address, _):
        for content in (huge, png(385, 384)):
            for query in ("", "as=picture"):
                status, _, body = post(address, content, query)
                assert status == 413 and "more than the limit of 0.1 million" in error_of(body) and "--max-pixels" in error_of(body)
        assert post(address, CONTENT)[0] == 200


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


class Held:
    """A network that waits until it is let go."""

    def __init__(self, model):
        self._model, self.entered, self.go, self.error = model, threading.Event(), threading.Event(), None

    def __call__(self, x):
        self.entered.set()
        assert self.go.wait(30)
        if self.error:
            raise self.error
        return self._model(x)

    def __getattr__(self, name):
        return getattr(self._model, name)


@pytest.fixture
def held(models):
    return Held(models[DEPTH])


def test_a_full_queue(held):
    """Blind spot: pictures without end in memory; a place that is not given back."""
    with serving.started({DEPTH: held}, queue=3, batch_size=1) as (address, service):
        found = []
        threads = [threading.Thread(target=lambda: found.append(post(address, CONTENT)[0])) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert until(lambda: service.app.inside == 3)
        status, headers, content = post(address, CONTENT)
        assert status == 503 and headers["retry-after"] == "1" and "3 pictures are in work or wait: no more than 3 may" in error_of(content)
        assert asked(address, "/status")[0] == 200 and service.status()["refused"] == 1
        held.go.set()
        for thread in threads:
            thread.join(30)
        assert found == [200] * 3 and post(address, CONTENT)[0] == 200 and until(lambda: service.app.inside == 0)


def test_who_has_gone_is_dropped(held):
    """Blind spot: pictures predicted for nobody; their places in the queue."""
    with serving.started({DEPTH: held}, queue=4, batch_size=1) as (address, service):
        first = threading.Thread(target=post, args=(address, CONTENT))
        first.start()
        assert held.entered.wait(30)
        place, (body, headers) = urlsplit(address), form(CONTENT)
        with socket.create_connection((place.hostname, place.port)) as client:
            client.sendall(head(len(body), headers["Content-Type"]) + body)
            assert until(lambda: service.batcher.waiting == 1)
        assert until(lambda: service.app.inside == 1)
        held.go.set()
        first.join(30)
        assert post(address, CONTENT)[0] == 200
        assert service.status()["dropped"] == 1 and service.status()["pictures"] == 2


def test_a_body_that_does_not_come(models, monkeypatch):
    """Blind spot: a place in the queue that is held for ever by who sends nothing."""
    monkeypatch.setattr(guard, "READ_SECONDS", 0.3)
    with serving.started(models) as (address, service):
        place = urlsplit(address)
        with socket.create_connection((place.hostname, place.port)) as client:
            client.sendall(head(1000, "multipart/form-data; boundary=x") + b"--x")
            assert b"408" in client.recv(100)
        assert post(address, CONTENT)[0] == 200 and until(lambda: service.app.inside == 0)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (RuntimeError("out of memory"), 503, "memory ran out"),
        (RuntimeError("a mistake"), 500, "an error of the server's own, RuntimeError"),
    ],
)
def test_what_goes_wrong_in_the_network(held, error, status, says):
    """Blind spot: a message of ours that hides that it is; a server that answers nobody afterwards."""
    held.error = error
    held.go.set()
    with serving.started({DEPTH: held}) as (address, _):
        found, _, content = post(address, CONTENT)
        assert found == status and says in error_of(content)
        held.error = None
        assert post(address, CONTENT)[0] == 200


def test_who_may_ask(models):
    """Blind spot: a page of somebody else's, by a name that was made to point here, or by a form that is sent here."""
    with serving.started(models) as (address, _):
        port = urlsplit(address).port
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert asked(address, "/models", headers={"Host": host})[0] == 200
        for host in ("example.org", f"127.0.0.1.example.org:{port}", "192.168.0.1", "", "[x"):
            for path in ("/", "/models"):
                assert asked(address, path, headers={"Host": host})[0] in (400, 403), host
        for origin in ("http://example.org", "null", f"http://127.0.0.1:{port + 1}"):
            status, headers, content = post(address, CONTENT, Origin=origin)
            assert status == 403 and error_of(content).startswith(f"Origin: {origin}")
        status, headers, _ = post(address, CONTENT, Origin=f"http://127.0.0.1:{port}")
        assert status == 200 and not [name for name in headers if name.startswith("access-control")]
    with serving.started(models, loopback=False) as (address, _):
        assert asked(address, "/models", headers=HOST)[0] == 200


def test_the_page_is_whole_and_asks_nobody_else(address):
    """Blind spot: a script from elsewhere, without which nothing is seen where there is no network; headers that are left out."""
    status, headers, content = asked(address, "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in headers["content-security-policy"]
    for name, kind in {"page.js": "javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}.items():
        assert f"page/{name}".encode() in content
        status, headers, part = asked(address, f"/page/{name}")
        assert status == 200 and kind in headers["content-type"] and headers["x-content-type-options"] == "nosniff"
        content += part
    assert set(re.findall(rb"//[^\s/][^/\"]*", content)) == {b"//www.w3.org"}  # the name of SVG
    for name in app.EXAMPLES:
        assert asked(address, f"/examples/{name}")[2] == app.EXAMPLES[name].read_bytes()


def test_what_is_said_of_the_server(address, models):
    """Blind spot: a format that the table has and the address does not take; limits, classes and colours that are others."""
    told = json.loads(asked(address, "/models")[2])
    assert [model["name"] for model in told["models"]] == list(models) and told["models"][0]["note"] == "knows rendered scenes"
    assert told["limits"] == {"bytes": 1 << 20, "pixels": 1 << 20, "queue": 16}
    (scenes,) = told["models"][1]["tasks"]
    assert scenes["classes"] == list(models[SCENES].config.head.classes) and scenes["formats"]["labels"] == "_labels.png"
    assert get_args(app.As) == (*answers.FORMATS, "picture")
    shades = np.arange(256, dtype=np.float32)[None]
    assert told["colours"] == [*outputs.colored(shades, True)[0].tolist(), [128, 128, 128]]
    schema = json.loads(asked(address, "/openapi.json")[2])
    assert "/predict" in schema["paths"] and "picture" in json.dumps(schema["components"])
    assert post(address, CONTENT)[0] == 200
    counts = json.loads(asked(address, "/status")[2])
    assert counts["inside"] == counts["waiting"] == 0 and counts["pictures"] >= counts["runs"] > 0


def test_pictures_of_many_at_once_are_batched(held):
    """Blind spot: requests that are served one after the other; answers that are swapped."""
    held.go.clear()
    with serving.started({DEPTH: held}, queue=16, batch_size=4) as (address, service):
        found: dict[int, bytes] = {}
        contents = [path.read_bytes() for path in PICTURES]
        threads = [threading.Thread(target=lambda n=n: found.update({n: post(address, contents[n % 3], "as=npy")[2]})) for n in range(9)]
        threads[0].start()
        assert held.entered.wait(30)
        for thread in threads[1:]:
            thread.start()
        assert until(lambda: service.batcher.waiting == 8)
        held.go.set()
        for thread in threads:
            thread.join(60)
        assert (service.status()["pictures"], service.status()["runs"]) == (9, 3)
        wanted = [held._model.predict(path, batch_size=4).depth for path in PICTURES]
        assert all(np.array_equal(np.load(io.BytesIO(found[n])), wanted[n % 3]) for n in range(9))


def test_an_upload_has_its_clients_name():
    assert batching.Upload(b"x", "a").name == "a" and batching.Upload(b"x", "a").read() == b"x"
