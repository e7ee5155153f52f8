"""Real processes, real HTTP: answers, load, token, metrics, stopping."""

import base64
import io
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from tests.ship.serve.conftest import Server, serving

import foveal
from foveal.cli.main import main
from foveal.core.bundle import read_json
from foveal.data.worlds import garbage


@pytest.fixture(scope="module")
def server(small: Path) -> Iterator[Server]:
    with serving(small, "--no-page", "--threads", 2) as running:
        yield running


def send(server: Server, files: list[Path], **given: object) -> httpx.Response:
    return server.post("/predict", files=[("files", (str(file), file.read_bytes())) for file in files], **given)


def same(one: dict, other: dict, tolerance: float = 1e-5) -> bool:
    return (one["label"], one["unknown"]) == (other["label"], other["unknown"]) and np.allclose(
        [p for _, p in one["top"]], [p for _, p in other["top"]], atol=tolerance
    )


def test_answers_as_predict_does(server: Server, small: Path, photos: Path):
    files = sorted(photos.rglob("*.jpg"))[::3]
    expected = foveal.load(small).predict(files)
    rows = send(server, files).json()
    assert [row["image"] for row in rows] == [row["image"] for row in expected]
    assert all(same(row, other, 1e-4) for row, other in zip(rows, expected, strict=True))
    assert {row["label"] for row in rows} == {"blue", "green", "red"}
    assert set(rows[0]) == {"image", "label", "probability", "unknown", "top"}


def test_base64_and_data_urls_are_the_same_images(server: Server, good: list[Path]):
    encoded = [base64.b64encode(file.read_bytes()).decode() for file in good]
    expected = send(server, good).json()
    for images in (encoded, [f"data:image/jpeg;base64,{each}" for each in encoded]):
        rows = server.post("/predict", json={"images": images}).json()
        assert [row["image"] for row in rows] == ["image-0000", "image-0001", "image-0002"]
        assert all(same(row, other) for row, other in zip(rows, expected, strict=True))


def test_images_of_many_requests_and_sizes_share_batches_and_answers_do_not_mix(server: Server, photos: Path):
    contents: list[bytes] = []
    for place, file in enumerate(sorted(photos.rglob("*.jpg"))):
        buffer = io.BytesIO()
        Image.open(file).resize((40 + 11 * (place % 7), 300 - 23 * (place % 5))).save(buffer, "PNG")
        contents.append(buffer.getvalue())

    def ask(content: bytes) -> dict:
        return server.post("/predict", files=[("files", ("a.png", content))]).json()[0]

    alone = [ask(content) for content in contents]
    before = server.metric("foveal_batch_size_count")
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, contents))
    assert server.metric("foveal_batch_size_count") - before < len(contents)
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))


def test_one_damaged_image_of_several_says_so_in_its_row(server: Server, good: list[Path], tmp_path: Path):
    (tmp_path / "cut.jpg").write_bytes(good[1].read_bytes()[:200])
    rows = send(server, [good[0], tmp_path / "cut.jpg", good[2]]).json()
    assert [row["label"] for row in rows] == ["blue", None, "red"]
    assert "truncated or damaged" in rows[1]["error"]


def test_every_request_is_counted(server: Server, good: list[Path]):
    def count(name: str, **labels: str) -> float:
        return server.metric(name, **labels)

    strange = [("files", (f"{i}.png", png(image))) for i, image in enumerate(garbage(8, 96, 5))]
    names = ("foveal_requests_total", "foveal_request_seconds_count", "foveal_batch_size_sum", "foveal_images_total")
    before = {name: count(name, **({"route": "/predict"} if "request" in name else {})) for name in names}
    unknown = count("foveal_images_total", answer="unknown")
    for _ in range(3):
        send(server, good)
    said = server.post("/predict", files=strange).json()
    server.post("/predict", content=b"x", headers={"content-type": "text/plain"})
    after = {name: count(name, **({"route": "/predict"} if "request" in name else {})) for name in names}
    assert [after[name] - before[name] for name in names] == [5, 5, 17, 17]
    assert count("foveal_images_total", answer="unknown") - unknown == sum(row["unknown"] for row in said)
    assert count("foveal_queue_depth") == count("foveal_requests_in_progress") == 0


def png(image: np.ndarray | Image.Image) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_model_is_described_without_a_path_of_the_machine(server: Server, small: Path):
    about = server.get("/model").json()
    assert about["name"] == "colours"
    assert about["classes"] == ["blue", "green", "red"]
    assert about["threads"] == 2
    assert about["explain"] == ["eigen-cam", "sobol-attribution"]
    assert about["metrics"]["accuracy"]["value"] == read_json(small / "metrics.json")["accuracy"]["value"]
    for page in (server.get("/model"), server.get("/openapi.json"), server.get("/metrics")):
        assert page.status_code == 200
        assert str(small.parent) not in page.text
    assert server.get("/health/live").json() == {"status": "live"}
    assert server.get("/health").json() == server.get("/health/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("method", ["sobol-attribution:grid=4,points=8", "eigen-cam"])
def test_explanations(server: Server, good: list[Path], method: str):
    found = server.post(f"/explain?method={method}", files=[("files", ("a.jpg", good[2].read_bytes()))]).json()
    values = np.array(found["map"])
    assert (found["method"], found["target"], found["unknown"]) == (method, "red", False)
    assert values.shape == (28, 28)
    assert 0 <= values.min() < values.max() <= 1
    left, top, right, bottom = found["square"]
    assert 0 <= left < right <= 1
    assert 0 <= top < bottom <= 1
    drawn = Image.open(io.BytesIO(base64.b64decode(found["overlay"].partition(",")[2])))
    assert drawn.size == Image.open(good[2]).size


def test_an_explanation_finds_what_the_answer_comes_from(server: Server, photos: Path):
    canvas = Image.open(photos / "blue" / "04.jpg").resize((160, 160))
    canvas.paste(Image.open(photos / "red" / "04.jpg").resize((80, 160)), (80, 0))
    query = "/explain?method=sobol-attribution:grid=4,points=32&target=red"
    found = server.post(query, files=[("files", ("half.png", png(canvas)))]).json()
    assert found["target"] == "red"
    assert found["map"] != np.zeros((28, 28)).tolist()


def test_more_than_it_takes_is_told_to_come_again(small: Path, good: list[Path]):
    with serving(small, "--no-page", "--max-requests", 2, "--queue", 40, "--threads", 1) as server:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: send(server, good * 10), range(24)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 503}
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert refused.headers["retry-after"] == "1"
        assert "ask again later" in refused.json()["error"]
        assert send(server, good).status_code == 200
        assert server.metric("foveal_requests_total", route="/predict", status="503") == codes.count(503)


def test_a_token(small: Path, good: list[Path]):
    secret = "s3cret-Token_"
    with serving(small, "--no-page", environment={"FOVEAL_TOKEN": secret}) as server:
        assert server.get("/health/live").status_code == 200
        for path in ("/model", "/metrics", "/openapi.json", "/nowhere"):
            assert server.get(path).status_code == 401
        basic = base64.b64encode(f"anyone:{secret}".encode()).decode()
        for header in (f"Bearer {secret}", f"bearer  {secret}", f"Basic {basic}"):
            assert send(server, good, headers={"authorization": header}).status_code == 200, header
        wrong = ["", "Bearer", f"Bearer {secret}x", f"Token {secret}", secret, "Basic !!!", "Basic YTpi"]
        for header in [*wrong, "Bearer \xe9"]:
            done = send(server, good, headers={"authorization": header.encode("latin-1")})
            assert done.status_code == 401, header
            assert done.headers["www-authenticate"] == "Bearer"
            assert secret not in done.text
        assert server.get("/openapi.json", headers={"authorization": f"Bearer {secret}"}).json()["components"][
            "securitySchemes"
        ] == {"token": {"type": "http", "scheme": "bearer"}}


def children(process: int) -> list[int]:
    return [int(line) for line in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_being_stopped_finishes_what_is_in_flight(small: Path, good: list[Path]):
    with serving(small, "--no-page", "--threads", 1) as server, ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(send, server, good * 10) for _ in range(6)]
        end = time.monotonic() + 20
        while server.metric("foveal_requests_in_progress") < 6 and time.monotonic() < end:
            assert not all(answer.done() for answer in answers)
        assert server.stop() == 0
        assert [answer.result().status_code for answer in answers] == [200] * 6
        with pytest.raises(httpx.ConnectError):
            server.get("/health/live")


def test_several_processes_share_the_work_and_the_metrics(small: Path, good: list[Path]):
    with serving(small, "--no-page", "--workers", 2, "--threads", 1) as server:

        def ask(_: int) -> int:
            return send(server, good).status_code

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(40))) == {200}
        assert server.metric("foveal_requests_total", route="/predict", status="200") == 40
        assert server.metric("foveal_images_total") == 120
        assert server.metric("foveal_queue_depth") == 0
        workers = [each for each in children(server.process.pid) if b"spawn_main" in command(each)]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            now = [each for each in children(server.process.pid) if b"spawn_main" in command(each)]
            if len(now) == 2 and workers[0] not in now:
                break
            time.sleep(0.1)
        assert {ask(0) for _ in range(10)} == {200}
        assert server.metric("foveal_requests_total", route="/predict", status="200") == 50
        assert server.stop() == 0


def test_workers_of_a_killed_server_stop(small: Path, good: list[Path]):
    with serving(small, "--no-page", "--workers", 2, "--threads", 1) as server:
        assert send(server, good).status_code == 200
        workers = [each for each in children(server.process.pid) if b"spawn_main" in command(each)]
        assert len(workers) == 2
        os.kill(server.process.pid, signal.SIGKILL)
        assert server.process.wait(30) == -signal.SIGKILL
        end = time.monotonic() + 30
        while any(command(each) for each in workers) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(command(each) for each in workers)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health/live")


def command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must fail with exit code 2; gives its one line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["foveal", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("foveal: ")]
        assert len(lines) == 1
        return lines[0]

    return run


def test_a_port_in_use(say: Callable[..., str], small: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = say(small, "--port", port)
    assert f"cannot listen on 127.0.0.1 port {port} (Address already in use)" in message
    assert "choose another --port" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", 70000], "port 70000"),
        (["--host", "not a host"], "cannot listen on not a host"),
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
        (["--workers", 0], "--workers 0: expected 1 or more"),
        (["--threads", 0], "threads 0: expected 1 or more"),
        (["--max-images", 0], "limit images = 0"),
        (["--body-seconds", -1], "limit body_seconds = -1.0"),
        (["--token", "ü"], "the token is empty or not ASCII"),
    ],
)
def test_options_that_cannot_be(say: Callable[..., str], small: Path, options: list, said: str):
    assert said in say(small, *options)


def test_what_is_no_bundle(say: Callable[..., str], tmp_path: Path):
    assert "is not a Bundle" in say(tmp_path / "nowhere")
    assert "is not a Bundle" in say(tmp_path)


def test_a_model_that_cannot_be_exported_any_more(say: Callable[..., str], small: Path, photos: Path, tmp_path: Path):
    copy = shutil.copytree(small, tmp_path / "b")
    (copy / "model.onnx").write_bytes(b"not a model")
    assert "is not a model that `foveal export` wrote" in say(copy, "--port", 0)


def test_a_bundle_without_an_exported_model_is_exported_first(small: Path, good: list[Path], tmp_path: Path):
    copy = shutil.copytree(small, tmp_path / "b")
    (copy / "model.onnx").unlink()
    with serving(copy, "--no-page") as server:
        assert [row["label"] for row in send(server, good).json()] == ["blue", "green", "red"]
    assert (copy / "model.onnx").is_file()


def test_a_library_that_is_not_installed(say: Callable[..., str], small: Path, monkeypatch: pytest.MonkeyPatch):
    from foveal.ship.serve import run

    find = run.find_spec
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert "gradio, which is not installed: pip install 'foveal[serve]'" in say(small)


def test_the_server_does_not_load_torch(small: Path):
    with serving(small, "--no-page") as server:
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps
