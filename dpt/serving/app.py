"""The routes: a page, `POST /predict`, what may be asked for, and how the server is doing. Nothing is kept of what was sent."""

from __future__ import annotations

import asyncio
import mimetypes
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, File, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as RouteError

from .. import __version__
from ..config import DPTConfig, HeadConfig
from ..inference.finite import NotFinite
from ..inference.images import FORMATS as PICTURES
from ..inference.images import ImageError, TooManyPixels, load_image
from ..inference.windows import Network
from ..rules import nearest
from ..system.endings import explained, out_of_memory
from . import answers
from .batching import Batcher, Closed, Upload
from .guard import PREDICT, RETRY_SECONDS, Guard, Limits

PAGE = {path.name: path.read_bytes() for path in sorted((Path(__file__).parent / "page").iterdir()) if path.is_file()}
EXAMPLES = {path.name: path for path in sorted((Path(__file__).parents[1] / "examples").glob("*.png"))}
ENCODERS = 4  # threads, at most, that make answers
GONE = 499  # what nginx calls the status of a request whose client has gone: nobody sees it
As = Literal["json", "npy", "png16", "ply", "labels", "colours", "picture"]
Value = TypeVar("Value")


class Service:
    """Models that answer requests.

    Args:
        models: by name, what predicts.
        notes: by name, what the page says of a model.
        loopback: as in `Guard`.

    Attributes:
        app: the ASGI application.
    """

    def __init__(self, models: Mapping[str, Network], limits: Limits, *, batch_size: int, loopback: bool, notes: Mapping[str, str]):
        self.models, self.limits, self.notes = dict(models), limits, notes
        self.batcher = Batcher(models, batch_size=batch_size, max_pixels=limits.max_pixels)
        self.encoders = ThreadPoolExecutor(min(ENCODERS, os.cpu_count() or 1), thread_name_prefix="dpt-answer")
        self.answered = self.failed = 0
        self.app = Guard(_routes(self), limits, loopback)

    def close(self) -> None:
        """Give up what waits."""
        self.batcher.close()
        self.encoders.shutdown(wait=True, cancel_futures=True)

    def asked(self, name: str | None, task: str | None, form: As) -> tuple[str, DPTConfig, HeadConfig]:
        """The model and the task that a request means. HTTPException names what there is not."""
        name = next(iter(self.models)) if name is None else name
        if name not in self.models:
            raise HTTPException(404, f"model={name!r}: this server has {', '.join(self.models)}{nearest(name, self.models)}")
        config = self.models[name].config
        able = [head for head in config.heads if form == "picture" or head.task in answers.FORMATS[form].tasks]
        if not able:
            raise HTTPException(422, f"as={form!r}: {name} predicts {' and '.join(head.task for head in config.heads)}, which has none")
        heads = {head.task: head for head in able}
        if task is not None and task not in heads:
            raise HTTPException(422, f"task={task!r}: as={form} of {name} is of {', '.join(heads)}")
        return name, config, able[0] if task is None else heads[task]

    def described(self) -> dict[str, Any]:
        """What may be asked for, and in what colours it is shown."""
        models = [{"name": name, "note": self.notes.get(name), "tasks": _tasks(model.config)} for name, model in self.models.items()]
        limits = {"bytes": self.limits.max_bytes, "pixels": self.limits.max_pixels, "queue": self.limits.queue}
        return {
            "models": models,
            "limits": limits,
            "formats": list(PICTURES),
            "examples": list(EXAMPLES),
            "colours": answers.colour_table(),
        }

    def status(self) -> dict[str, int]:
        """Counts since the start, and of now."""
        batcher = self.batcher
        counts = {"answered": self.answered, "failed": self.failed, "refused": self.app.refused, "dropped": batcher.dropped}
        return {**counts, "pictures": batcher.pictures, "runs": batcher.runs, "inside": self.app.inside, "waiting": batcher.waiting}


def _tasks(config: DPTConfig) -> list[dict[str, Any]]:
    return [
        {
            "task": head.task,
            "unit": answers.unit_of(head),
            "inverse": head.inverse,
            "classes": list(head.classes),
            "palette": [list(colour) for colour in head.palette],
            "formats": {name: form.suffix for name, form in answers.FORMATS.items() if head.task in form.tasks},
        }
        for head in config.heads
    ]


async def _unless_gone(request: Request, work: Future[Value]) -> Value | None:
    """What is worked out; None where who has asked goes first, and the work, if nobody has begun it, is given up."""
    answer: asyncio.Future[Any] = asyncio.wrap_future(work)
    gone: asyncio.Future[Any] = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        found: Value | None = answer.result() if answer.done() else None
        return found
    finally:
        gone.cancel()
        if not answer.done():
            answer.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _raised(error: Exception) -> HTTPException:
    """The answer to a picture that could not be predicted."""
    if isinstance(error, TooManyPixels):
        return HTTPException(413, str(error))
    if isinstance(error, ImageError | answers.Unanswerable):
        return HTTPException(422, str(error))
    if isinstance(error, Closed) or out_of_memory(error):
        return HTTPException(503, str(error) or explained(error), {"retry-after": str(RETRY_SECONDS)})
    if isinstance(error, NotFinite):
        return HTTPException(500, str(error))
    raise error


def _routes(service: Service) -> FastAPI:
    app = FastAPI(title="dpt", version=__version__, docs_url=None, redoc_url=None)  # those pages want scripts from elsewhere

    @app.post(PREDICT, responses={status: {} for status in (403, 404, 408, 413, 415, 503)})
    async def predict(
        request: Request,
        picture: Annotated[UploadFile, File(description="the picture's file")],
        model: Annotated[str | None, Query(description="a name of GET /models; by default the first")] = None,
        task: Annotated[str | None, Query(description="of a model with several; by default the first that has the format")] = None,
        form: Annotated[As, Query(alias="as", description="what is answered; picture: the picture as a JPEG")] = "json",
        focal: Annotated[float | None, Query(gt=0, lt=1e9, description="pixels; by default what EXIF data say")] = None,
        fov: Annotated[float | None, Query(gt=0, lt=180, description="degrees, of points; by default by the focal length, or 55")] = None,
    ) -> Response:
        """A picture's prediction, in one of the formats of `dpt.serving.answers`."""
        name, config, head = service.asked(model, task, form)
        if focal is not None and head.focal is None:
            raise HTTPException(422, f"focal={focal:g}: {name} takes no focal length; of points, give fov")
        if (picture.size or 0) > service.limits.max_bytes:
            raise HTTPException(413, f"{picture.size} bytes: a picture has at most {service.limits.max_bytes} (--max-bytes)")
        content, called = await picture.read(), picture.filename or "the picture"
        try:
            if form == "picture":
                shown = service.encoders.submit(lambda: answers.picture(load_image(Upload(content, called), service.limits.max_pixels)))
                made, media = await _unless_gone(request, shown), "image/jpeg"
            else:
                result = await _unless_gone(request, service.batcher.submit(name, content, called, focal))
                if result is None:
                    return Response(status_code=GONE)
                if result.error is not None:
                    raise result.error
                asked = answers.Asked(result, config, head, fov)
                made = await _unless_gone(request, service.encoders.submit(answers.FORMATS[form].make, asked))
                media = answers.FORMATS[form].media
        except Exception as error:
            service.failed += 1
            raise _raised(error) from error
        service.answered += made is not None
        return Response(status_code=GONE) if made is None else Response(made, media_type=media, headers={"cache-control": "no-store"})

    @app.get("/models")
    async def models() -> JSONResponse:
        """What may be asked for."""
        return JSONResponse(service.described(), headers={"cache-control": "no-store"})

    @app.get("/status")
    async def status() -> JSONResponse:
        """How the server is doing."""
        return JSONResponse(service.status(), headers={"cache-control": "no-store"})

    @app.get("/examples/{name}", include_in_schema=False)
    async def example(name: str) -> Response:
        if name not in EXAMPLES:
            raise HTTPException(404, f"{name!r}: there are {', '.join(EXAMPLES)}")
        return Response(EXAMPLES[name].read_bytes(), media_type="image/png")

    @app.get("/", include_in_schema=False)
    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str = "index.html") -> Response:
        if name not in PAGE:
            raise HTTPException(404, f"{name!r}: the page has {', '.join(PAGE)}")
        return Response(PAGE[name], media_type=mimetypes.guess_type(name)[0], headers={"cache-control": "no-cache"})

    @app.exception_handler(RouteError)
    async def refused(request: Request, error: RouteError) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": "; ".join(map(_worded, error.errors()))}, 422)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"an error of the server's own, {type(error).__name__}: its terminal says more"}, 500)

    return app


def _worded(found: Mapping[str, Any]) -> str:
    where = found["loc"][-1]
    given = f"={found['input']!r}" if found["loc"][0] == "query" else ""
    return f"{where}{given}: {found['msg'][:1].lower()}{found['msg'][1:]}"
