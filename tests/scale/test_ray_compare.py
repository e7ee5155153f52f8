"""A comparison on a Ray cluster of two nodes: its driver killed, then a node; the table is that of a local run."""

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from tests.scale.conftest import Start, wait_until

from foveal.core.errors import MissingExtra, UsageError
from foveal.verbs import _ray
from foveal.verbs._ray import cluster as reach
from foveal.verbs._ray import share
from foveal.verbs.reproduce import versions

MEASURED = ("method", "seed", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece", "trained_params")
METHODS = "linear,naive-bayes-probe,full:epochs=2,batch_size=16"
TRIALS = 9


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, one processor each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}
    made = Cluster(initialize_head=True, head_node_args={**node, "_system_config": soon})
    made.add_node(**{key: value for key, value in node.items() if key != "include_dashboard"})
    yield made
    made.shutdown()


def rows(out: Path) -> list[list[Any]]:
    return [[row[key] for key in MEASURED] for row in json.loads((out / "comparison.json").read_text())["rows"]]


def working(node: Any) -> bool:
    """Whether a trial runs on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("ray::trial" in " ".join(child.cmdline()) for child in raylet.children(recursive=True))


def test_the_driver_is_killed_and_then_one_of_two_nodes(
    two_nodes: Any, foveal: Start, photos: Path, tiny: str, tmp_path: Path
) -> None:
    asked = ["compare", photos, "--methods", METHODS, "--seeds", 3, "--backbone", tiny, "--device", "cpu"]
    local = foveal(*asked, "--out", tmp_path / "local")
    assert local.wait() == 0, local.communicate()

    out = tmp_path / "ray"
    on_ray = [*asked, "--out", out, "--ray", two_nodes.address]
    ledger = tmp_path / "ray.work" / "rows.jsonl"

    def kept() -> list[str]:
        return ledger.read_text().splitlines() if ledger.exists() else []

    driver = foveal(*on_ray)
    wait_until(lambda: len(kept()) >= 2, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = kept()
    assert len(before) < TRIALS

    driver = foveal(*on_ray)
    (doomed,) = two_nodes.worker_nodes
    wait_until(lambda: len(kept()) > len(before) and working(doomed), driver)
    two_nodes.remove_node(doomed, allow_graceful=False)
    assert len(kept()) < TRIALS
    _, told = driver.communicate()
    assert driver.returncode == 0, told
    assert f"{TRIALS - len(before)} trials on 2 nodes" in told
    assert "1 of 2 nodes lost" in told
    assert rows(out) == rows(tmp_path / "local")
    finished = json.loads((out / "comparison.json").read_text())["rows"]
    assert all(json.loads(line) in finished for line in before)
    assert not ledger.parent.exists()


def test_no_cluster_is_one_clear_message_at_once(foveal: Start, photos: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        process = foveal("compare", photos, "--out", tmp_path / "c", "--ray", address)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"--ray {address}: no Ray cluster answers there" in told
    assert "--ray local" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["nonsense", "http://1.2.3.4:80", "host:port", ":6379"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(UsageError, match="expected local, auto or HOST:PORT"), reach(address):
        pass


def test_a_server_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        answering = Thread(target=lambda: server.accept()[0].sendall(b"220 mail.example ready\r\n"))
        answering.start()
        with pytest.raises(UsageError, match="something else listens"), reach(f"127.0.0.1:{server.getsockname()[1]}"):
            pass
        answering.join()
        monkeypatch.setattr(_ray, "REACH_S", 0.2)
        with pytest.raises(UsageError, match="no Ray cluster"), reach(f"127.0.0.1:{server.getsockname()[1]}"):
            pass


def test_without_ray_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"--ray needs ray, which is not installed: pip install 'foveal\[ray\]'"):
        reach("local").__enter__()


def test_nodes_of_other_versions_are_refused() -> None:
    here = versions()
    _ray.check_versions(here)
    with pytest.raises(
        UsageError, match=rf"has torch {re.escape(here['torch'])} \(expected 1\.0\): install the versions"
    ):
        _ray.check_versions({**here, "torch": "1.0"})
    told = _ray.unreachable("10.0.0.1:6379", RuntimeError("Version mismatch: The cluster was started with Ray: 2.0"))
    assert "the cluster runs other versions than this machine" in str(told)


def test_processors_are_shared_out() -> None:
    nodes = [{"Resources": {"CPU": 8.0}}, {"Resources": {"CPU": 4.0, "GPU": 1.0}}, {"Resources": {}}]
    assert share(nodes, 3, "cpu") == (4, 0)
    assert share(nodes, 1, "auto") == (8, 1)
    assert share(nodes, 100, "auto") == (1, 1)
