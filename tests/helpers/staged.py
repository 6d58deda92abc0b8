"""A CPU that takes the way of a device which works while the host goes on: what is copied, and when it is waited for, is told."""

from __future__ import annotations

import itertools

import pytest
import torch

from dpt.inference import transfer


def stage(monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> list[str]:
    """From here on `device` is one that copies beside the host; "recorded N" and "waited N" of its events are added to the list."""
    told: list[str] = []
    numbers = itertools.count()

    class Event:
        def __init__(self, blocking: bool):
            assert blocking
            self.number = next(numbers)

        def record(self, stream: object) -> None:
            assert stream == f"the stream of {device}"
            told.append(f"recorded {self.number}")

        def synchronize(self) -> None:
            told.append(f"waited {self.number}")

    monkeypatch.setattr(transfer, "STAGED", {device})
    monkeypatch.setattr(transfer, "_page_locked", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: f"the stream of {of.type}")
    return told
