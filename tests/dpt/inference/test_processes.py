"""Processes that are forked from one that has a model, has predicted, or is predicting; and those that are spawned. Blind spots: a fork
while another thread is inside one of PyTorch's own libraries, whose locks nobody here can open; CUDA."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import small, wide
from torch import nn

from dpt.inference import images, prediction, transfer
from dpt.inference.prediction import predict_iter
from dpt.system.forks import held_over_forks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
SECONDS = 60  # after which what should take one is a hang
NOISE = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)


def in_child(ask: Callable[[], Any]) -> Any:
    """What `ask()` gives in a process forked from this one, or the error that it raises; TimeoutError if it hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = ask()
        except BaseException as error:
            found = error
        os.write(writing, pickle.dumps(found))
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        answered, _, _ = select.select([answer], [], [], SECONDS)
        if not answered:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not answered:
            raise TimeoutError("the child hangs")
        return pickle.loads(answer.read())


FORKS = """
import multiprocessing, os, sys, threading
import numpy as np, torch
from torch.utils.data import DataLoader, Dataset
import dpt

threads = 2
torch.set_num_threads(threads)
model = dpt.build("dpt-tiny-depth", weights="pretrained")
picture = np.random.default_rng(0).integers(0, 255, (200, 260, 3), dtype=np.uint8)

model.predict(picture)
assert len(os.listdir("/proc/self/task")) > 1, "PyTorch has no threads: nothing that a fork could lose"
torch.set_num_threads(1)
wanted = model.predict(picture).depth
torch.set_num_threads(threads)

class Predicted(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return model.predict(picture).depth

def predicted(_):
    return model.predict(picture).depth, torch.get_num_threads()

def check(name, found):
    assert np.array_equal(found, wanted), name
    print(name, flush=True)

child = os.fork()
if child == 0:
    check("fork", predicted(0)[0])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
with multiprocessing.get_context("fork").Pool(1) as pool:
    (found, alone), = pool.map(predicted, [0])
    assert alone == 1
    check("pool", found)
for found in DataLoader(Predicted(), batch_size=None, num_workers=1, multiprocessing_context="fork"):
    check("loader", np.asarray(found))
assert torch.get_num_threads() == threads
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads cannot be counted here")
def test_children_of_a_process_that_has_predicted():
    """Blind spot: a child that waits for its parent's threads for ever: GNU's OpenMP begins its next product with those that the fork did
    not copy. In a process of its own, with two threads, whatever the machine; one child by each way of making them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        told, errors = process.communicate(timeout=2 * SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and the child that hangs
        told, errors = process.communicate()
    assert told.split() == ["fork", "pool", "loader", "loader"], errors


def test_spawned_processes_predict():
    """Blind spot: a model that cannot be handed to a process which begins anew: locks, generators, what is kept by size."""
    model = wide()
    wanted = model.predict(NOISE).depth
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map_async(model.predict, [NOISE]).get(2 * SECONDS)
    np.testing.assert_allclose(found[0].depth, wanted, rtol=1e-5, atol=1e-5 * wanted.max())  # its threads are the machine's


@pytest.mark.parametrize("lock", [prediction._evaluating_lock, images._limit_lock, held_over_forks(threading.Lock())])
def test_locks_that_other_threads_hold(lock):
    """Blind spot: a lock that another thread holds when the process is forked, which in the copy nobody will open."""
    held, opened = threading.Event(), []

    def hold() -> None:
        with lock:
            held.set()
            time.sleep(0.2)
            opened.append(True)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert in_child(lambda: (lock.acquire(timeout=5), list(opened))) == (True, [True])
    thread.join()
    assert lock.acquire(blocking=False)
    lock.release()


def test_a_fork_while_a_thread_predicts():
    """Blind spot: a child that waits for what its parent's other thread was making by size; its model left in evaluation for good, by a
    prediction that will not end there; and the parent's, whose thread goes on."""
    model = wide().train()
    inside, go_on = threading.Event(), threading.Event()
    resize = model.encoder._resized

    def resized(grid: tuple[int, int]) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(SECONDS)
        return resize(grid)

    model.encoder._resized = resized
    thread = threading.Thread(target=model.predict, args=(NOISE,))
    thread.start()
    assert inside.wait(SECONDS) and not model.training

    def ask() -> tuple[bool, np.ndarray, bool]:
        before = all(module.training for module in model.modules())
        return before, model.predict(NOISE).depth, all(module.training for module in model.modules())

    before, depth, after = in_child(ask)
    assert not model.training
    go_on.set()
    thread.join()
    assert before and after and all(module.training for module in model.modules()) and not prediction._evaluating_now
    np.testing.assert_array_equal(depth, model.predict(NOISE).depth)


def test_a_fork_inside_a_prediction():
    """Blind spot: a process forked by somebody's hook, whose own prediction goes on in both: a count that is cleared under it."""
    model = small().train()
    found = []

    def fork(*_: object) -> None:
        if not found:
            found.append(None)
            found[0] = in_child(lambda: (model.training, len(prediction._evaluating_now) > 0))

    model.encoder.register_forward_hook(fork)
    model.predict(NOISE)
    assert found == [(False, True)] and model.training and not prediction._evaluating_now


def test_predictions_begun_before_the_fork():
    """Blind spot: an iterator of predictions carried into a child, which waits for pictures that no thread reads."""
    model = small()
    results = predict_iter(model, [NOISE] * 4)
    next(results)
    error = in_child(lambda: next(results))
    assert isinstance(error, RuntimeError) and "begun before this process was forked" in str(error)
    assert [result.error for result in results] == [None] * 3


def test_cuda_in_a_forked_process(monkeypatch):
    """Blind spot: the error of CUDA, which a forked process cannot use, taken for memory that ran out, or lost. PyTorch's own says what to
    do; that it comes is stubbed."""
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(transfer, "_page_locked", lambda shape, dtype: torch.empty(shape, dtype=dtype))  # which is CUDA's
    model = small()
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)

    class OnGPU(nn.Module):
        config = model.config

        def parameters(self, recurse: bool = True):
            return iter([on_gpu])

    with pytest.raises(RuntimeError, match="forked subprocess.*'spawn'"):
        prediction.predict(OnGPU(), NOISE)
    with pytest.raises(RuntimeError, match="forked subprocess.*'spawn'"):
        model.to("cuda")
