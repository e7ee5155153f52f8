"""Bundles on the Hugging Face Hub: sent in one commit, fetched into the Hub's own cache. Nothing goes unless asked."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from foveal.core.bundle import BundleFiles, atomic_folder, open_bundle, read_json
from foveal.core.errors import BundleError, FovealError, HubError, UsageError
from foveal.core.folders import unwritable
from foveal.core.progress import Progress
from foveal.data.dataset import inside

OWN: tuple[str, ...] = (
    "bundle.json",
    "model.safetensors",
    "calibration.json",
    "metrics.json",
    "cost.json",
    "report.html",
    "README.md",
    "model.onnx",
    "model.int8.onnx",
    "tokenizer.json",
    "text.onnx",
)
"""The files of a Bundle: what is sent, and what is fetched. Anything else in a folder stays where it is."""
HUB_ADDS = {".gitattributes", "README.md"}
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")


def on_hub(path: str | Path) -> bool:
    """Whether this names a Bundle of the Hub, hub:owner/name[@revision], rather than a folder."""
    return Path(path).as_posix().startswith("hub:")


def split_name(path: str | Path) -> tuple[str, str | None]:
    """'hub:owner/name@revision' -> ('owner/name', 'revision').

    Raises:
        UsageError: of another form.
    """
    name, _, revision = Path(path).as_posix().removeprefix("hub:").partition("@")
    if not NAME.fullmatch(name):
        raise UsageError(f"'{name}' does not name a repository of the Hugging Face Hub: expected owner/name")
    return name, revision or None


def fetch(path: str | Path, *, offline: bool = False) -> Path:
    """The folder of a Bundle of the Hub in the Hugging Face cache, downloaded unless it is there.

    When the Hub cannot be reached or is down, what the cache holds is used.

    Args:
        path: hub:owner/name, or hub:owner/name@revision (a branch, tag or commit).
        offline: open no connection.

    Raises:
        UsageError: a name of another form.
        BundleError: the repository holds no Bundle.
        HubError: no such repository or revision, no access, no network, or not in the cache while offline.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    name, revision = split_name(path)
    offline = offline or constants.is_offline_mode()
    with asking(f"hub:{name}" + (f"@{revision}" if revision else ""), offline=offline):
        try:
            if not offline:  # fails at once where a download would retry for half a minute
                hub.get_hf_file_metadata(hub.hf_hub_url(name, "bundle.json", revision=revision), timeout=10)
        except errors.RemoteEntryNotFoundError:
            raise BundleError(
                f"hub:{name} holds no Bundle (no bundle.json): expected a repository made by `foveal push`"
            ) from None
        except Exception as error:
            cached = hub.try_to_load_from_cache(name, "bundle.json", revision=revision)
            if (status_of(error) or 500) < 500 or not isinstance(cached, str):
                raise
            offline = True
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(OWN), local_files_only=offline))


def own_copy(path: str | Path, progress: Progress) -> Path:
    """The folder of a Bundle that may be written to: of hub:owner/name a copy in runs/NAME, of a folder itself.

    Raises:
        UsageError: runs/NAME holds something else.
        HubError, BundleError: as `fetch`.
    """
    path = Path(path)
    if not on_hub(path):
        return path
    cached = fetch(path)
    made = open_bundle(cached, any_task=True)
    target = Path("runs") / split_name(path)[0].split("/")[1]
    if target.exists():
        if not (target / "bundle.json").is_file() or read_json(target / "bundle.json") != made.manifest:
            raise UsageError(f"{target} exists and holds something else than {path.as_posix()}: move it away")
        return target
    with atomic_folder(target) as folder:
        for file in filter(Path.is_file, (cached / name for name in OWN)):
            shutil.copyfile(file, folder / file.name)
    progress.say(f"{path.as_posix()}: copied to {target}")
    return target


def push(
    path: Path,
    name: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    report: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Send a Bundle's own files to the repository owner/name, all in one commit; the repository is made if need be.

    Of the files in the repository that belong to an older Bundle, those that this one lacks are removed. Absolute
    paths of this machine are cut to their last part in what is sent; the Bundle itself is not changed.

    Args:
        private: only the owner may see it.
        token: of the Hub, with the right to write; default $HF_TOKEN, or that of `hf auth login`.
        revision: branch to commit to, made if need be; default main.
        license: identifier of the Hub, such as apache-2.0; written into the card.
        report: send report.html, which shows test images.

    Returns:
        repository, url, commit, revision, private, license, files (bytes by name), removed.

    Raises:
        BundleError: not a Bundle, or damaged.
        UsageError: a name of another form, no token, a repository that holds something else, or is public when
            `private` was asked for.
        HubError: the Hub cannot be reached, or refuses.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    progress = progress or Progress()
    bundle = open_bundle(path, any_task=True)
    if on_hub(name):
        name = name.removeprefix("hub:")
    repository, extra = split_name(name)
    if extra:
        raise UsageError(f"{name}: give the branch as --revision {extra}")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise UsageError(
            f"--license {license}: expected an identifier of the Hub, such as apache-2.0, mit or cc-by-4.0"
        )
    token = token or hub.get_token()
    if not token:
        raise UsageError(
            "no token for the Hugging Face Hub: make one that may write at https://huggingface.co/settings/tokens, "
            "then set HF_TOKEN, or run `hf auth login`"
        )
    if constants.is_offline_mode():
        raise HubError(f"cannot push to {repository}: HF_HUB_OFFLINE is set")
    api = hub.HfApi(token=token, library_name="foveal", library_version=version("foveal"))
    sent = contents(bundle, license, report)
    sizes = {file: len(what) if isinstance(what, bytes) else what.stat().st_size for file, what in sent.items()}
    with asking(f"cannot push to {repository}", writing=True):
        url = str(api.create_repo(repository, private=private or None, exist_ok=True))
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        info = api.model_info(repository, revision=revision)
        there = {item.rfilename for item in info.siblings or []}
        strange = sorted(there - HUB_ADDS)
        if strange and "bundle.json" not in there:
            raise UsageError(
                f"{repository} holds something else than a Bundle ({', '.join(strange[:3])}): choose another name"
            )
        if private and info.private is False:
            raise UsageError(f"{repository} is public already: make it private on the Hub, or choose another name")
        removed = sorted(there & set(OWN) - set(sent))
        progress.say(f"sending {len(sent)} files, {sum(sizes.values()) / 2**20:.1f} MiB, to {url}")
        commit = api.create_commit(
            repository,
            [
                *(hub.CommitOperationAdd(file, what) for file, what in sent.items()),
                *(hub.CommitOperationDelete(file) for file in removed),
            ],
            commit_message=f"{bundle.manifest['data']['name']}: {bundle.manifest['method']['name']}",
            revision=revision,
            parent_commit=info.sha,
        )
    return {
        "repository": repository,
        "url": url,
        "commit": commit.oid,
        "revision": revision or "main",
        "private": bool(info.private),
        "license": licence_of(sent["README.md"]) if "README.md" in sent else license,
        "files": sizes,
        "removed": removed,
    }


def contents(bundle: BundleFiles, license: str | None, report: bool) -> dict[str, Path | bytes]:
    """What is sent: files as they are, except that texts name no folder of this machine and the card its licence."""
    from huggingface_hub import constants

    sent: dict[str, Path | bytes] = {}
    for name in OWN:
        file = bundle.path / name
        if not file.is_file() or (name == "report.html" and not report):
            continue
        if not inside(str(file), [bundle.path, constants.HF_HUB_CACHE]):
            raise BundleError(f"{file} is a link that leads out of the Bundle: put a copy in its place")
        sent[name] = file
        if name in ("bundle.json", "README.md", "report.html"):
            text = without_paths(file.read_text(encoding="utf-8"), bundle.manifest)
            if name == "README.md" and license:
                text = with_licence(text, license)
            sent[name] = text.encode("utf-8")
    return sent


def without_paths(text: str, manifest: Mapping[str, Any]) -> str:
    """Text with the absolute paths that a Bundle remembers cut to their last part."""
    from foveal.evaluate.card import markdown

    data, request, backbone = (manifest.get(key) or {} for key in ("data", "request", "backbone"))
    told = [data.get("source"), request.get("data"), backbone.get("origin"), request.get("backbone")]
    paths = {part for each in filter(None, told) for part in (str(each), str(each).partition("@")[2])}
    for path in sorted((path for path in paths if Path(path).is_absolute()), key=len, reverse=True):
        for write in (str, markdown, html.escape, as_json):
            text = text.replace(write(path), write(Path(path).name))
    return text


def as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def with_licence(card: str, license: str) -> str:
    """A model card with `license` in its front matter, and in its text where it said that there was none."""
    from foveal.evaluate.card import NO_LICENCE

    front = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    if front is None:
        return f'---\nlicense: "{license}"\n---\n\n{card}'
    kept = re.sub(r"^license:.*\n", "", front[1], flags=re.MULTILINE)
    body = card[front.end() :].replace(NO_LICENCE, f"{license}, as whoever published this model chose.")
    return f'---\nlicense: "{license}"\n{kept}---\n{body}'


def licence_of(card: Path | bytes) -> str | None:
    """The licence that a card's front matter names."""
    text = (card if isinstance(card, bytes) else card.read_bytes()).decode("utf-8")
    front = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([^\"'\s]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


@contextmanager
def asking(what: str, *, offline: bool = False, writing: bool = False) -> Generator[None]:
    """Errors of the Hub, its client and the network as one clear message; the client shows no bars and tells the Hub
    nothing about this machine.

    Raises:
        HubError: any of them.
    """
    from huggingface_hub import constants, utils

    silent, told = utils.are_progress_bars_disabled(), constants.HF_HUB_DISABLE_TELEMETRY
    utils.disable_progress_bars()
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    except FovealError:
        raise
    except Exception as error:  # the Hub's client raises its own, its transports' and the system's errors
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise unwritable(Path(str(error.filename or what)), error) from error
        raise HubError(f"{what}: {reason(error, offline, writing)}") from None
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = told
        if not silent:
            utils.enable_progress_bars()


def reason(error: BaseException, offline: bool, writing: bool) -> str:
    """What went wrong, and what to do."""
    chain = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None and deeper not in chain:
        chain.append(deeper)
    status = next((code for each in chain if (code := status_of(each))), None)
    kind = {type(each).__name__ for each in chain}
    again = "; the Bundle is as it was, and the same command sends what is missing" if writing else ""
    if offline:
        return "not in the Hugging Face cache, and foveal is offline: run once with a network"
    if "RevisionNotFoundError" in kind:
        return "there is no such revision: check what follows the @"
    if status == 401 and writing:
        return "the Hub refused the token (401): make one that may write at https://huggingface.co/settings/tokens"
    if status == 403:
        return "the token has no right to it (403): use one of its owner" + (", with the right to write" * writing)
    if status in (401, 404):
        return f"no such repository, or a private one ({status}): check the name, and set HF_TOKEN if it is private"
    if status is not None and status < 500 and status != 429:
        return f"the Hub refused it ({status}: {first_line(error)}){again}"
    if status is not None:
        return f"the Hub answers {status}: try again later{again}"
    if any(type(each).__module__.partition(".")[0] in NETWORK or isinstance(each, ConnectionError) for each in chain):
        from huggingface_hub import constants

        return f"the Hub cannot be reached at {constants.ENDPOINT} ({first_line(chain[-1])}): check the network{again}"
    return f"{first_line(error)}{again}"


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of the Hub's client carries, or that one of its uploader names."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and (
        named := re.search(r"\b(?:status(?: code)?|HTTP(?: status)?)\D{0,20}([45]\d\d)\b", str(error))
    ):
        status = int(named[1])
    return status


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
