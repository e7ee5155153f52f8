"""`foveal serve` under load, beside the loop a person would write: the table between the marks `serve` of
docs/benchmarks.md (`python benchmarks/run.py --only serve`; `python benchmarks/serve.py BUNDLE IMAGES REQUESTS` for a
model of yours).

The server and the loop have one core and one thread each, in turn; the clients, a process of their own, have another
core. So what is compared is what serving costs, and not who gets the processor.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

CLIENTS, REQUESTS, EARLY, PICTURES, ROUNDS = 16, 10_000, 2_000, 256, 3

PREPARE = """
import sys, foveal
from pathlib import Path
from foveal.data.open import open_dataset
folder = Path(sys.argv[1])
bundle = foveal.fit("sample:elpv", method="linear", out=folder / "elpv", offline=True)
foveal.export(bundle.path)
data = open_dataset("sample:elpv")
(folder / "pictures").mkdir()
for index in range(0, len(data), len(data) // int(sys.argv[2])):
    (folder / "pictures" / f"{index:05d}.png").write_bytes(data.read(index))
"""

LOOP = """
import json, sys, time
from pathlib import Path
import numpy as np
from foveal.data.images import decode, to_pixels
from foveal.ship.runtime import open_runtime
runtime = open_runtime(sys.argv[1])
encoded = [file.read_bytes() for file in sorted(Path(sys.argv[2]).iterdir())]
squares = np.stack([to_pixels(decode(data), runtime.preprocessing) for data in encoded])

def whole(batch):
    for at in range(0, len(encoded), batch):
        runtime(np.stack([to_pixels(decode(data), runtime.preprocessing) for data in encoded[at : at + batch]]))

def session(batch):
    for at in range(0, len(squares), batch):
        runtime(squares[at : at + batch])

def rate(work, batch):
    start = time.perf_counter()
    work(batch)
    return len(encoded) / (time.perf_counter() - start)

whole(8)
print(json.dumps({
    "engine": f"{runtime.engine}, {runtime.precision}",
    "whole": {batch: rate(whole, batch) for batch in (1, 8)},
    "session": {batch: rate(session, batch) for batch in (1, 8)},
}))
"""

CLIENT = """
import asyncio, json, sys, time
from pathlib import Path
port, folder, clients, requests = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def message(file):
    part = b'--x\\r\\nContent-Disposition: form-data; name="files"; filename="%s"\\r\\n\\r\\n' % file.name.encode()
    body = part + file.read_bytes() + b"\\r\\n--x--\\r\\n"
    head = "POST /predict HTTP/1.1\\r\\nhost: localhost\\r\\ncontent-type: multipart/form-data; boundary=x\\r\\n"
    return head.encode() + b"content-length: %d\\r\\n\\r\\n" % len(body) + body

messages = [message(file) for file in sorted(folder.iterdir())]
latencies, errors, left = [], 0, iter(range(requests))

async def client():
    global errors
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for turn in left:
        start = time.perf_counter()
        writer.write(messages[turn % len(messages)])
        head = await reader.readuntil(b"\\r\\n\\r\\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\\r")[0])
        answer = await reader.readexactly(length)
        latencies.append(time.perf_counter() - start)
        errors += not head.startswith(b"HTTP/1.1 200") or b'"error"' in answer
    writer.close()

async def main():
    start = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(clients)])
    seconds = time.perf_counter() - start
    latencies.sort()
    at = lambda share: latencies[min(len(latencies) - 1, int(share * len(latencies)))]
    print(json.dumps({"rate": requests / seconds, "errors": errors, "p50": at(0.5), "p95": at(0.95), "p99": at(0.99),
                      "max": latencies[-1]}))

asyncio.run(main())
"""


def on_core(core: int, code: str, *arguments: object) -> dict[str, Any]:
    """Run code in a fresh process on one core; its last line of output is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    return json.loads(done.stdout.splitlines()[-1])


def start_server(bundle: Path, core: int) -> tuple[subprocess.Popen[str], int]:
    """`foveal serve` as a person starts it, on one core, once its page is there."""
    server = subprocess.Popen(
        [sys.executable, "-m", "foveal", "serve", str(bundle), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert server.stderr is not None
    port = int(re.search(r":(\d+):", server.stderr.readline())[1])  # type: ignore[index]
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/"):
                return server, port
        except OSError:
            time.sleep(0.2)


def resident(process: int) -> float:
    """MiB of memory in use."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1024  # type: ignore[index]


def served(folder: Path) -> list[str]:
    """Rows of the table, of a model of solar cells."""
    subprocess.run(
        [sys.executable, "-c", PREPARE, str(folder), str(PICTURES)],
        env={**os.environ, "FOVEAL_CACHE": str(folder / "cache")},
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return load_test(folder / "elpv", folder / "pictures", REQUESTS)


def load_test(bundle: Path, pictures: Path, requests: int) -> list[str]:
    """Throughput, latency, errors and memory of a server."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RuntimeError("the load test needs two cores: one for the server, one for the clients")
    server, port = start_server(bundle, cores[0])
    try:
        client = lambda n: on_core(cores[1], CLIENT, port, pictures, CLIENTS, n)  # noqa: E731
        client(200)
        bare, loads = [], []
        for _ in range(ROUNDS):
            bare.append(on_core(cores[0], LOOP, bundle, pictures))
            loads.append(client((EARLY - 200) // ROUNDS))
        early = resident(server.pid)
        long = client(requests - EARLY)
        late = resident(server.pid)
    finally:
        server.terminate()
        code = server.wait()
    whole = [max(each["whole"].values()) for each in bare]
    session = [max(each["session"].values()) for each in bare]
    rates = [each["rate"] for each in loads]
    ratio = statistics.median(rate / loop for rate, loop in zip(rates, whole, strict=True))
    alone = statistics.median(rate / loop for rate, loop in zip(rates, session, strict=True))
    errors = long["errors"] + sum(each["errors"] for each in loads)
    return [
        f"| throughput over a bare loop (decode + preprocess + {bare[0]['engine']}, batch 1 or 8, the faster) "
        f"| at least 0.80 | **{ratio:.2f}** ({statistics.median(rates):.0f} against {statistics.median(whole):.0f} "
        "images/s) |",
        f"| throughput over the session alone (images decoded before) | | {alone:.2f} "
        f"({statistics.median(session):.0f} images/s) |",
        f"| errors in {requests:,} requests | 0 | **{errors}** |",
        f"| p99 over p50 of the latency | at most 4 | **{long['p99'] / long['p50']:.2f}** (p50 "
        f"{1000 * long['p50']:.0f} ms, p95 {1000 * long['p95']:.0f} ms, p99 {1000 * long['p99']:.0f} ms, longest "
        f"{1000 * long['max']:.0f} ms) |",
        f"| memory after {requests:,} requests over after {EARLY:,} | flat | **{late / early:.3f}** "
        f"({late:.0f} MiB against {early:.0f} MiB) |",
        f"| exit code after SIGTERM | 0 | **{code}** |",
    ]


if __name__ == "__main__":
    print("\n".join(load_test(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
