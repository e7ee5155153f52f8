"""The queue: batches of what waits, all or nothing, errors of one image stay its own."""

import asyncio
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from foveal.core.errors import DataError, UsageError
from foveal.ship.serve.app import Service
from foveal.ship.serve.batching import Batcher, QueueFull
from foveal.ship.serve.limits import Limits, Settings
from foveal.ship.serve.refusal import Busy

SIZE = 4


def prepare(data: bytes) -> np.ndarray:
    if data == b"bad":
        raise DataError("damaged")
    return np.full((SIZE, SIZE, 3), int(data), np.uint8)


class Model:
    """Answers with the value of the image; waits for `gate` before its first batch."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.sizes: list[int] = []
        self.seen: list[int] = []

    def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.gate.wait(10)
        self.sizes.append(len(squares))
        values = squares[:, 0, 0, 0]
        self.seen += values.tolist()
        return np.stack([values, values], 1).astype(np.float32), values.astype(np.float32)


@pytest.fixture
def model():
    model = Model()
    yield model
    model.gate.set()


def start(model: Model, **given) -> Batcher:
    return Batcher(prepare, model, **({"threads": 1, "batch": 4, "wait": 0.0, "capacity": 20} | given))


def scores(futures: list[Future]) -> list[float]:
    return [future.result(10)[1] for future in futures]


def test_what_waits_is_run_together_and_answers_keep_their_places(model):
    batcher = start(model)
    first = batcher.submit([b"1"])
    while batcher._waiting:
        time.sleep(0.001)
    rest = batcher.submit([b"%d" % value for value in range(2, 12)])
    model.gate.set()
    assert scores(first + rest) == list(range(1, 12))
    assert model.sizes == [1, 4, 4, 2]
    batcher.close()


def test_a_batch_waits_for_more_and_no_longer(model):
    model.gate.set()
    batcher = start(model, wait=5.0)
    futures = [batcher.submit([b"%d" % value])[0] for value in range(4)]
    begin = time.monotonic()
    assert scores(futures) == [0, 1, 2, 3]
    assert time.monotonic() - begin < 4
    assert model.sizes == [4]
    batcher.wait = 0.05
    assert scores(batcher.submit([b"7"])) == [7]
    batcher.close()


def test_one_damaged_image_fails_alone(model):
    model.gate.set()
    batcher = start(model)
    good, bad, also = batcher.submit([b"1", b"bad", b"3"])
    assert scores([good, also]) == [1, 3]
    with pytest.raises(DataError, match="damaged"):
        bad.result(10)
    batcher.close()


def test_a_request_that_does_not_fit_leaves_nothing_behind(model):
    batcher = start(model, capacity=5)
    busy = batcher.submit([b"0"])
    while batcher._waiting:
        time.sleep(0.001)
    kept = batcher.submit([b"1", b"2", b"3"])
    with pytest.raises(QueueFull):
        batcher.submit([b"4", b"5", b"6"])
    more = batcher.submit([b"7", b"8"])
    model.gate.set()
    assert scores(busy + kept + more) == [0, 1, 2, 3, 7, 8]
    assert sorted(model.seen) == [0, 1, 2, 3, 7, 8]
    batcher.close()


def test_what_was_cancelled_is_not_computed(model):
    batcher = start(model)
    busy = batcher.submit([b"0"])
    while batcher._waiting:
        time.sleep(0.001)
    kept, dropped = batcher.submit([b"1", b"2"])
    assert dropped.cancel()
    model.gate.set()
    assert scores([*busy, kept]) == [0, 1]
    batcher.close()
    assert 2 not in model.seen


def test_closing_finishes_what_waits_and_takes_no_more(model):
    batcher = start(model, threads=3)
    futures = batcher.submit([b"%d" % value for value in range(20)])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    model.gate.set()
    closing.join(10)
    assert scores(futures) == list(range(20))
    assert not batcher.alive
    with pytest.raises(QueueFull):
        batcher.submit([b"1"])


def test_a_model_that_fails_is_an_error_of_its_batch_and_the_thread_lives(model):
    def run(squares):
        if squares[0, 0, 0, 0] == 9:
            raise RuntimeError("no memory")
        return model(squares)

    model.gate.set()
    batcher = Batcher(prepare, run, threads=1, batch=4, wait=0, capacity=9)
    with pytest.raises(RuntimeError, match="no memory"):
        batcher.submit([b"9"])[0].result(10)
    assert scores(batcher.submit([b"2"])) == [2]
    batcher.close()


def test_an_answer_that_takes_too_long_is_given_up(small, model):
    service = Service(Settings(small, page=False, limits=Limits(request_seconds=0.2)))
    service.batcher = start(model)

    async def ask() -> None:
        with pytest.raises(Busy, match=r"no answer within 0\.2 seconds"):
            await service.predict([("a", b"1"), ("b", b"2")])
        with pytest.raises(Busy, match=r"no answer within 0\.2 seconds"):
            await service.predict([("c", b"3")])

    asyncio.run(ask())
    model.gate.set()
    service.close()
    assert 3 not in model.seen


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"body_mb": 0}, "limit body_mb = 0: expected a positive number"),
        ({"request_seconds": float("nan")}, "limit request_seconds = nan"),
        ({"images": 300}, "300 images in a request do not fit a queue of 256"),
    ],
)
def test_limits_that_limit_nothing(given, said):
    with pytest.raises(UsageError, match=said):
        Limits(**given)


@pytest.mark.parametrize(
    "given", [{"threads": 0}, {"batch": 0}, {"wait_ms": -1}, {"token": " "}, {"token": "schlüssel"}]
)
def test_settings_that_cannot_be(tmp_path, given):
    with pytest.raises(UsageError):
        Settings(tmp_path, **given)
