"""The page at /: drop or paste an image, see what the model says of it and where it looked."""

from __future__ import annotations

import asyncio
import html
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from foveal.ship.serve.explain import DEFAULT
from foveal.ship.serve.refusal import Refused

if TYPE_CHECKING:
    from fastapi import FastAPI

    from foveal.ship.serve.app import Service

T = TypeVar("T")
FORGET_SECONDS = 600
"""After which an image that was dropped on the page is deleted."""
STYLE = """
.gradio-container { --quiet: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
.foveal-head h1 { margin: 0; font-size: 1.5rem; font-weight: 650; }
.foveal-head p { margin: .25rem 0 0; color: var(--quiet); }
.foveal-answer { padding: .9rem 1.1rem; border-radius: var(--radius-lg); border: 1px solid var(--border-color-primary);
  background: var(--block-background-fill); min-height: 5.2rem; }
.foveal-answer strong { display: block; font-size: 1.45rem; line-height: 1.3; overflow-wrap: anywhere; }
.foveal-answer span { color: var(--quiet); }
.foveal-answer.unknown { border-color: #b7791f; border-left-width: 5px; }
.foveal-bars { display: grid; grid-template-columns: minmax(5rem, 11rem) 1fr 3.6rem; gap: .45rem .7rem;
  align-items: center; margin: .4rem 0; }
.foveal-bars i { height: .7rem; border-radius: .35rem; background: var(--border-color-primary); overflow: hidden; }
.foveal-bars i b { display: block; height: 100%; background: #2563a8; }
.foveal-bars.unknown i b { background: #a0a7b0; }
.foveal-bars span { overflow-wrap: anywhere; }
.foveal-bars em { font-style: normal; text-align: right; font-variant-numeric: tabular-nums; }
.foveal-map img { width: 100%; max-height: 26rem; object-fit: contain; border-radius: var(--radius-lg); }
.foveal-map figure { margin: 0; } .foveal-map figcaption { color: var(--quiet); margin-top: .4rem; }
"""
EMPTY = '<div class="foveal-answer"><span>Drop an image on the left, paste one, or click to choose a file.</span></div>'


def build_page(service: Service, loop: asyncio.AbstractEventLoop) -> FastAPI:
    """The page as an application of its own; its lifespan is the caller's to run.

    Args:
        loop: where the server runs; the page's functions run in threads.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio as gr
    from fastapi import FastAPI
    from gradio import themes

    limits = service.settings.limits

    def wait(task: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(task, loop).result()

    def look(file: str | None) -> tuple[str, str]:
        if file is None:
            return EMPTY, ""
        try:
            row = wait(service.predict([("the image", Path(file).read_bytes())]))[0]
        except Refused as refused:
            return told("no answer", refused.detail, " unknown"), ""
        return answered(row, service.runtime.task == "multi-label"), BUSY

    def explain(file: str | None, said: str) -> str:
        if file is None or not said:
            return ""
        try:
            return drawn(wait(service.explainer.explain("the image", Path(file).read_bytes(), DEFAULT, None)))
        except Refused as refused:
            return f'<p class="foveal-head">No heat map: {html.escape(refused.detail)}</p>'

    about = service.describe()
    with gr.Blocks(
        title=f"{about['name']}: foveal", analytics_enabled=False, delete_cache=(60, FORGET_SECONDS)
    ) as blocks:
        gr.HTML(head(about), padding=False)
        with gr.Row(equal_height=False):
            with gr.Column():
                image = gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"], show_label=False, height=416
                )
            with gr.Column():
                said = gr.HTML(EMPTY, padding=False)
                map = gr.HTML(elem_classes="foveal-map", padding=False)
        looked = image.change(look, image, [said, map], queue=False, api_visibility="private")
        looked.success(explain, [image, map], map, queue=False, show_progress="full", api_visibility="private")
        looked.failure(lambda: (NO_IMAGE, ""), None, [said, map], queue=False, api_visibility="private")
    theme = themes.Default(
        primary_hue="blue",
        font=["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
        radius_size=themes.sizes.radius_md,
    )
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=limits.body_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=STYLE,
    )


BUSY = '<p class="foveal-head">Looking for what mattered ...</p>'


def told(large: str, small: str, kind: str = "") -> str:
    large, small = html.escape(large), html.escape(small)
    return f'<div class="foveal-answer{kind}"><strong>{large}</strong><span>{small}</span></div>'


NO_IMAGE = told("no answer", "This is no image, or a damaged one.", " unknown")


def head(about: dict[str, Any]) -> str:
    measured = about["metrics"].get("balanced_accuracy")
    said = f"{about['method']} on {about['backbone']}, {len(about['classes'])} classes"
    if measured:
        said += f"; balanced accuracy {measured['value']:.3f} on test images"
        if measured["low"] is not None:
            said += f" (95% interval {measured['low']:.3f} to {measured['high']:.3f})"
    return f'<div class="foveal-head"><h1>{html.escape(about["name"])}</h1><p>{html.escape(said)}</p></div>'


def answered(row: dict[str, Any], several: bool) -> str:
    """The answer in large letters, and the bars of the top five."""
    label = row["label"].replace("|", ", ") or "no label"
    kind = " unknown" if row["unknown"] else ""
    if row["unknown"]:
        said = told("unknown", f"It resembles no image the model was trained on; the nearest: {label}.", kind)
    elif several:
        said = told(label, "Every label of at least 50%.")
    else:
        said = told(label, f"{percent(row['probability'])}, calibrated.")
    bars = "".join(
        f'<span>{html.escape(name)}</span><i><b style="width:{100 * p:.1f}%"></b></i><em>{percent(p)}</em>'
        for name, p in row["top"]
    )
    return f'{said}<div class="foveal-bars{kind}">{bars}</div>'


def percent(p: float) -> str:
    return f"{100 * p:.1f}%"


def drawn(found: dict[str, Any]) -> str:
    target = html.escape(found["target"])
    return (
        f'<figure><img src="{found["overlay"]}" alt="Heat map over the image"><figcaption>What speaks for {target} '
        f"({percent(found['probability'])}): the brighter, the more the answer depends on it; what the model does "
        f"not see is dark. Drawn by {html.escape(found['method'].partition(':')[0])}.</figcaption></figure>"
    )
