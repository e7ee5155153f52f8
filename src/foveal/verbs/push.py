"""`foveal push`: a Bundle to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result


def push(
    bundle: Annotated[Path, "Bundle folder made by `foveal fit`."],
    repository: Annotated[str, "Where on the Hub: owner/name; made if it is not there."],
    *,
    private: Annotated[bool, "Make the repository private."] = False,
    license: Annotated[
        str | None, "Licence for the card, as the Hub calls it: apache-2.0, mit, cc-by-4.0, other, ..."
    ] = None,
    report: Annotated[bool, "Send report.html, which shows some test images."] = True,
    revision: Annotated[str | None, "Branch to commit to, made if it is not there; default main."] = None,
    token: Annotated[str | None, "Token that may write; default $HF_TOKEN, or that of `hf auth login`."] = None,
    progress: Progress | None = None,
) -> Result:
    """Send a Bundle to the Hugging Face Hub: its own files and no other, in one commit.

    Anybody with access then writes `hub:owner/name` where a Bundle's folder goes.

    Example: foveal push runs/digits owner/digits --private
    """
    from foveal.ship import hub

    return Result(
        hub.push(
            bundle, repository, private=private, token=token, revision=revision, license=license, report=report,
            progress=progress,
        ),
        text,
    )  # fmt: skip


def text(sent: dict[str, Any]) -> str:
    lines = [
        f"{sent['url']} ({'private' if sent['private'] else 'public'}), {sent['revision']} at {sent['commit'][:12]}: "
        f"{', '.join(sent['files'])}",
    ]
    if sent["removed"]:
        lines.append(f"removed there, of the Bundle it held before: {', '.join(sent['removed'])}")
    if not sent["license"]:
        lines.append("the card names no licence, so others may look at the model but not use it: --license sets one")
    lines.append(f"foveal predict hub:{sent['repository']} image.jpg")
    return "\n".join(lines)
