"""`dpt serve`: a page and an HTTP endpoint. What it takes and answers is told by its help, in `arguments`, and by docs/serve.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch

from ..model import DPT
from ..system.endings import FAILED, CommandError, explained, printable
from ..zoo import config_of
from . import running
from .arguments import CARRIED

BATCH_ON_A_GPU, BATCH = 4, 2


def run(args: argparse.Namespace) -> int:
    """Run `dpt serve` until a signal ends it. CommandError where it cannot begin."""
    try:
        import python_multipart  # noqa: F401  # which FastAPI asks for when a route takes a form

        from ..serving import guard, server
        from ..serving.app import Service
    except ImportError as error:
        raise CommandError(f"serving needs FastAPI, uvicorn and python-multipart: pip install '.[serve]' ({error})") from error
    device = running.device_of(args.device)
    names = args.model or ([None] if args.weights else list(CARRIED))
    for name in names:
        if name is not None:
            _check(name)
    try:
        listener = server.listening(args.host, args.port)
    except OSError as error:
        raise CommandError(f"--host {args.host} --port {args.port} cannot be used: {explained(error)}") from error
    with listener:
        host, port = server.address_of(listener)
        loopback = guard.is_loopback(host)
        models = _models(args, names, device)
        limits = guard.Limits(args.max_bytes, args.max_pixels, args.queue)
        batch_size = args.batch_size or (BATCH_ON_A_GPU if device.type == "cuda" else BATCH)
        caution = running.scenes_only(model.config for model in models.values()) if args.weights is None else None
        notes = {name: caution for name, model in models.items() if model.config.carried and caution}
        with closing(Service(models, limits, batch_size=batch_size, loopback=loopback, notes=notes)) as service:
            with server.serving(service.app, listener) as ended:
                if caution:
                    print(f"dpt serve: {caution}", file=sys.stderr)
                if not loopback:
                    print(f"dpt serve: --host {args.host}: whoever reaches this machine can use it; nobody is asked", file=sys.stderr)
                place = f"[{host}]" if ":" in host else host
                print(f"dpt serve: http://{place}:{port} has {printable(', '.join(models))}; Ctrl-C ends it", flush=True)
                ended.wait()
    raise CommandError("the server has ended by itself", FAILED)


def _check(name: str) -> None:
    config = config_of(name)
    if config.decoder.prompt:
        raise CommandError(f"{name} needs a sensor's depth beside each picture, which is not served: dpt predict --prompt takes one")


def _models(args: argparse.Namespace, names: list[str | None], device: torch.device) -> Mapping[str, Any]:
    models: dict[str, DPT] = {}
    for name in names:
        model = running.model_of(args, name, device, getattr(torch, args.dtype))
        if name is None:
            _check(model.config.name)
        models[model.config.name] = model
    return models
