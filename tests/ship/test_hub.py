"""A Bundle to a stand-in for the Hugging Face Hub and back; every refusal is one clear message that loses nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants
from tests.ship.stand_in import TOKEN, StandIn, stand_in

import foveal
from foveal.backbones.adapter import normalise
from foveal.core.errors import BundleError, FovealError, HubError, UsageError
from foveal.data.images import decode, to_pixels
from foveal.ship.hub import OWN, split_name, with_licence


@pytest.fixture
def bundle(colours: foveal.Bundle) -> foveal.Bundle:
    return colours


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """The only Hub there is, with an empty cache of this machine's."""
    with stand_in() as hub:
        point_at(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


def point_at(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def elsewhere(tmp_path: Path) -> None:
    """As on another machine: nothing in the cache."""
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_pushed_and_loaded_elsewhere_it_answers_the_same(bundle, photos, server, tmp_path):
    sent = foveal.push(bundle.path, "me/colours")
    held = server.repositories["me/colours"]
    assert len(held.commits) == 2, "one commit after the empty first one"
    assert set(sent["files"]) == {name for name in OWN if (bundle.path / name).exists()}
    there = foveal.load("hub:me/colours")
    assert there.path != bundle.path
    assert (there.path / "model.safetensors").read_bytes() == (bundle.path / "model.safetensors").read_bytes()
    rows, expected = there.predict(photos), bundle.predict(photos)
    assert rows == expected
    measured = foveal.evaluate("hub:me/colours", str(photos))
    assert measured["accuracy"] == foveal.evaluate(bundle.path, str(photos))["accuracy"]


def test_nothing_but_the_bundles_own_files_is_sent(bundle, server, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    for name in ("secret.txt", ".env", "model.safetensors.bak", "notes/private.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    foveal.push(folder, "me/colours")
    held = server.repositories["me/colours"]
    assert set(held.commits[held.branches["main"]]) <= {*OWN, ".gitattributes"}
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_what_is_sent_names_no_folder_of_this_machine(bundle, photos, server):
    assert str(photos) in (bundle.path / "bundle.json").read_text()
    foveal.push(bundle.path, "me/colours")
    held = server.repositories["me/colours"]
    for name, content in held.commits[held.branches["main"]].items():
        assert str(photos.parent).encode() not in content, name
    assert json.loads(held.commits[held.branches["main"]]["bundle.json"])["data"]["source"] == photos.name


def test_a_second_push_replaces_the_first_and_its_left_overs(bundle, photos, server, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    foveal.export(folder, images=photos)
    assert "model.onnx" in foveal.push(folder, "me/colours")["files"]
    sent = foveal.push(bundle.path, "me/colours", report=False)
    assert sent["removed"] == ["model.onnx", "report.html"]
    there = foveal.load("hub:me/colours")
    assert not (there.path / "model.onnx").exists()


def test_branches_and_private_repositories(bundle, server, tmp_path, monkeypatch):
    sent = foveal.push(bundle.path, "me/colours", private=True, revision="v2")
    assert sent["private"]
    assert sent["revision"] == "v2"
    assert foveal.load("hub:me/colours@v2").classes == bundle.classes
    assert foveal.load(f"hub:me/colours@{sent['commit']}").classes == bundle.classes
    with pytest.raises(BundleError, match="hub:me/colours holds no Bundle"):
        foveal.load("hub:me/colours")
    with pytest.raises(HubError, match="no such revision"):
        foveal.load("hub:me/colours@v3")
    elsewhere(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        HubError, match=r"no such repository, or a private one \(401\): check the name, and set HF_TOKEN"
    ):
        foveal.load("hub:me/colours@v2")


def test_a_public_repository_is_not_taken_for_a_private_one(bundle, server):
    foveal.push(bundle.path, "me/colours")
    with pytest.raises(UsageError, match="me/colours is public already"):
        foveal.push(bundle.path, "me/colours", private=True)


def test_the_cache_answers_when_the_hub_does_not(bundle, photos, server, monkeypatch):
    foveal.push(bundle.path, "me/colours")
    expected = foveal.load("hub:me/colours").predict(photos)
    asked = len(server.log)
    assert foveal.evaluate("hub:me/colours", str(photos), offline=True)["n"] == len(expected)
    assert len(server.log) == asked, "offline opened a connection"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert foveal.load("hub:me/colours").predict(photos) == expected
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.shutdown()
    server.server_close()
    assert foveal.load("hub:me/colours").predict(photos) == expected


def test_offline_and_not_in_the_cache(server):
    with pytest.raises(HubError, match="hub:me/nothing: not in the Hugging Face cache, and foveal is offline"):
        foveal.evaluate("hub:me/nothing", "sample:digits", offline=True)
    assert server.log == []


def test_a_damaged_download_is_refused(bundle, server):
    foveal.push(bundle.path, "me/colours")
    held = server.repositories["me/colours"]
    files = dict(held.commits[held.branches["main"]])
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    held.commit("main", {**files, "model.safetensors": bytes(weights)})
    with pytest.raises(BundleError, match=r"model\.safetensors in Bundle .* was edited or is damaged"):
        foveal.load("hub:me/colours")


def test_another_kind_of_repository_is_neither_loaded_nor_overwritten(bundle, server):
    foveal.push(bundle.path, "me/other")
    held = server.repositories["me/other"]
    commit = held.commit("main", {"config.json": b"{}", "model.safetensors": b"x" * 100, "README.md": b"mine"})
    with pytest.raises(BundleError, match=r"hub:me/other holds no Bundle \(no bundle\.json\)"):
        foveal.load("hub:me/other")
    assert not any("resolve" in path and path.endswith("model.safetensors") for _, path, _ in server.log)
    with pytest.raises(UsageError, match=r"me/other holds something else than a Bundle \(config\.json, model\.safe"):
        foveal.push(bundle.path, "me/other")
    assert held.branches["main"] == commit


REFUSALS: dict[str, tuple[dict[str, int], str]] = {
    "token refused": ({"api/": 401}, r"the Hub refused the token \(401\): make one that may write"),
    "no right to write": (
        {"commit": 403},
        r"the token has no right to it \(403\): use one of its owner, with the right",
    ),
    "hub down": ({"api/repos": 503}, r"the Hub answers 503: try again later"),
    "bad card": ({"commit": 400}, r"the Hub refused it \(400: .*the same command sends what is missing"),
    "cut while sending": ({"lfs/": 0}, r"cannot be reached at .*: check the network; the Bundle is as it was"),
    "cut at the commit": ({"commit": 0}, r"cannot be reached at .*: check the network; the Bundle is as it was"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_while_pushing_change_nothing(bundle, server, monkeypatch, case):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    foveal.push(bundle.path, "me/colours", revision="other")
    held = server.repositories["me/colours"]
    server.blobs.clear()
    before = dict(held.branches)
    server.fail, message = dict(REFUSALS[case][0]), REFUSALS[case][1]
    with pytest.raises(HubError, match=message) as refused:
        foveal.push(bundle.path, "me/colours")
    assert TOKEN not in str(refused.value)
    assert held.branches == before
    server.fail = {}
    foveal.push(bundle.path, "me/colours")
    assert foveal.load("hub:me/colours").classes == bundle.classes


def test_a_refusal_by_the_hubs_chunk_store(bundle, server, monkeypatch):
    """Where hf_xet is installed, large files go through it; its errors carry no response, only words."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    server.fail = {"xet-write-token": 403}
    with pytest.raises(HubError, match=r"the token has no right to it \(403\)"):
        foveal.push(bundle.path, "me/colours")
    assert server.repositories["me/colours"].commits.keys() == {server.repositories["me/colours"].branches["main"]}


def test_an_unreachable_hub(bundle, monkeypatch, tmp_path):
    with stand_in() as gone:
        url = gone.url
    point_at(monkeypatch, url, tmp_path / "cache")
    with pytest.raises(HubError, match=f"cannot push to me/colours: the Hub cannot be reached at {url}"):
        foveal.push(bundle.path, "me/colours")
    with pytest.raises(HubError, match=f"hub:me/colours: the Hub cannot be reached at {url} .*: check the network"):
        foveal.load("hub:me/colours")


def test_missing_repository_and_wrong_token(server, monkeypatch):
    with pytest.raises(HubError, match=r"hub:me/nothing: no such repository, or a private one \(404\)"):
        foveal.load("hub:me/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"\(401\): check the name, and set HF_TOKEN"):
        foveal.load("hub:me/nothing")


def test_wrong_input_opens_no_connection(bundle, server, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, name, options, message in (
        (tmp_path / "empty", "me/x", {}, "is not a Bundle"),
        (bundle.path, "just-a-name", {}, "'just-a-name' does not name a repository .*: expected owner/name"),
        (bundle.path, "../etc/x", {}, "expected owner/name"),
        (bundle.path, "me/x@v1", {}, "give the branch as --revision v1"),
        (bundle.path, "me/x", {"license": "Apache 2!"}, "--license Apache 2!: expected an identifier of the Hub"),
    ):
        with pytest.raises(FovealError, match=message):
            foveal.push(folder, name, **options)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="no token for the Hugging Face Hub: make one that may write"):
        foveal.push(bundle.path, "me/x")
    with pytest.raises(UsageError, match="'a' does not name a repository"):
        foveal.load("hub:a")
    assert server.log == []


def test_exporting_a_bundle_of_the_hub_writes_into_a_copy(bundle, photos, server, tmp_path, monkeypatch):
    foveal.push(bundle.path, "me/colours")
    monkeypatch.chdir(tmp_path)
    record = foveal.export("hub:me/colours", images=photos)
    assert Path(record["path"]) == Path("runs/colours/model.onnx")
    assert foveal.load("runs/colours").cost["onnx"]["opset"] == record["opset"]
    assert not list((tmp_path / "cache").rglob("model.onnx"))
    foveal.export("hub:me/colours", images=photos)
    (tmp_path / "runs" / "colours" / "bundle.json").write_text("{}")
    with pytest.raises(UsageError, match="runs/colours exists and holds something else than hub:me/colours"):
        foveal.export("hub:me/colours", images=photos)


def test_the_command_line(bundle, photos, server, tmp_path):
    """In processes of their own, with the Hub and its token named by the environment alone."""
    here = {
        **os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    here.pop("HF_HUB_CACHE", None)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "foveal", *arguments]
        return subprocess.run(command, env=here, cwd=tmp_path, capture_output=True, text=True, check=False)

    pushed = run("push", str(bundle.path), "me/colours", "--license", "mit", "--private", "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["license"] == "mit"
    image = str(photos / "red" / "00.jpg")
    answered = run("predict", "hub:me/colours", image, "--json")
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)[0]["label"] == bundle.predict(image)[0]["label"]
    missing = run("predict", "hub:me/nothing", image)
    assert missing.returncode == 2
    assert len(missing.stderr.strip().splitlines()) == 1
    assert not any("telemetry" in path for _, path, _ in server.log)
    for _, _, agent in server.log:
        assert not re.search(r"torch|session", str(agent)), "the Hub was told about this machine"


# The card


def card_of(text: str) -> Any:
    card = ModelCard(text)
    assert card.data.eval_results, "no results in the front matter"
    return card.data


def test_the_front_matter_is_what_the_hub_reads(bundle):
    text = (bundle.path / "README.md").read_text()
    data = card_of(text)
    assert data.library_name == "foveal"
    assert data.pipeline_tag == "image-classification"
    assert data.get("license") is None
    assert "None has been chosen" in text.split("## Licence")[1]
    value = {result.metric_type: result.metric_value for result in data.eval_results}
    assert value["accuracy"] == pytest.approx(bundle.metrics["accuracy"]["value"], abs=1e-4)


def test_a_licence_reaches_front_matter_and_text_and_the_last_one_counts(bundle, server):
    foveal.push(bundle.path, "me/colours", license="apache-2.0")
    held = server.repositories["me/colours"]
    text = held.commits[held.branches["main"]]["README.md"].decode()
    assert card_of(text).license == "apache-2.0"
    assert "None has been chosen" not in text
    again = with_licence(text, "mit")
    assert card_of(again).license == "mit"
    assert len(re.findall(r"^license:", again, re.MULTILINE)) == 1
    assert with_licence("# Mine\n", "mit").startswith('---\nlicense: "mit"\n---\n')


def test_a_licence_written_by_hand_is_kept_and_told(bundle, server, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    card = folder / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: cc-by-4.0\n", 1))
    sent = foveal.push(folder, "me/colours")
    assert sent["license"] == "cc-by-4.0"
    assert "names no licence" not in sent.to_text()
    assert "names no licence" in foveal.push(bundle.path, "me/colours").to_text()


def lines_of(bundle: foveal.Bundle) -> str:
    section = (bundle.path / "README.md").read_text().split("## Without foveal\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return blocks[0] if blocks else section


BLOCKED = "import sys\nsys.modules['foveal'] = None\n"
TOLD = "\nprint(json.dumps({'logits': logits.tolist(), 'probabilities': probabilities.tolist()}))"


def answers_of_the_card(bundle: foveal.Bundle, image: Path, folder: Path) -> dict[str, np.ndarray]:
    shutil.copytree(bundle.path, folder)
    shutil.copy(image, folder / "image.jpg")
    code = BLOCKED + lines_of(bundle) + TOLD
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: np.array(value) for name, value in json.loads(done.stdout).items()}


def answers_of_foveal(bundle: foveal.Bundle, image: Path) -> dict[str, np.ndarray]:
    look = bundle.preprocessing
    pixels = torch.from_numpy(to_pixels(decode(image.read_bytes()), look).copy())[None]
    with torch.inference_mode():
        logits = bundle.model.classifier(normalise(pixels, look))
        probabilities = bundle.model(normalise(pixels, look))[0]
    return {"logits": logits.numpy(), "probabilities": probabilities.numpy()}


def small_weights(name: str, folder: Path) -> str:
    from safetensors.torch import save_file

    torch.manual_seed(1)
    save_file(timm.create_model(name, num_classes=0).state_dict(), folder / f"{name}.safetensors")
    return f"{name}@{folder / name}.safetensors"


@pytest.mark.parametrize("method", ["linear", "lora:epochs=1,rank=2", "full:epochs=1"])
def test_the_cards_lines_load_it_in_plain_timm(method, photos, cache, tmp_path):
    """For `linear` on the default backbone, whose weights come from a package."""
    chosen = {} if method == "linear" else {"backbone": small_weights("test_vit", tmp_path)}
    made = foveal.fit(str(photos), method=method, out=tmp_path / "runs", offline=True, **chosen)
    assert len([line for line in lines_of(made).splitlines() if line and "import" not in line]) <= 10
    image = photos / "green" / "03.jpg"
    got, expected = answers_of_the_card(made, image, tmp_path / "alone"), answers_of_foveal(made, image)
    for name, value in expected.items():
        assert np.abs(got[name] - value).max() < 1e-4, name


def test_a_multi_label_card_uses_sigmoids(photos, cache, tiny, tmp_path):
    rows = [f"{path},{path.parent.name}|{'odd' if int(path.stem) % 2 else 'even'}" for path in photos.glob("*/*.jpg")]
    (tmp_path / "table.csv").write_text("image,label\n" + "\n".join(rows) + "\n")
    table, out = str(tmp_path / "table.csv"), tmp_path / "runs"
    made = foveal.fit(table, method="linear", backbone=tiny, out=out, offline=True)
    image = photos / "green" / "03.jpg"
    got, expected = answers_of_the_card(made, image, tmp_path / "alone"), answers_of_foveal(made, image)
    assert np.abs(got["probabilities"] - expected["probabilities"]).max() < 1e-4


def test_a_card_says_when_plain_timm_cannot_load_it(photos, cache, tiny, tmp_path):
    made = foveal.fit(
        str(photos), method="vpt:epochs=1", backbone=small_weights("test_vit", tmp_path), out=tmp_path / "runs",
        offline=True,
    )  # fmt: skip
    assert "timm alone cannot load this model: its features are computed in another way" in lines_of(made)
    mixed, out = "nn-revisit:mix=0.5,k=3", tmp_path / "mixed"
    made = foveal.fit(str(photos), method=mixed, backbone=tiny, out=out, offline=True)
    assert "timm alone cannot load this model: its head is more than a linear layer (NeighbourMix)" in lines_of(made)


def test_names_of_the_hub():
    assert split_name("hub:owner/name@v1.0") == ("owner/name", "v1.0")
    assert split_name(Path("hub:owner/name")) == ("owner/name", None)
