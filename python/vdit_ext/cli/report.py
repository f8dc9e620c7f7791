"""A comparison as one HTML file that needs nothing else: pictures and clips are inside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from ..compare import Run
from . import text

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2026; --faint: #667080; --line: #dfe3e8; --paper: #ffffff;
  --card: #f6f7f9; --bar: #3c78d8; --soft: #dbe6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --faint: #98a2b0; --line: #333a44;
  --paper: #15181d; --card: #1e2229; --bar: #6fa0ee; --soft: #28384f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 40px 28px 64px; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 4px 0 6px; font-weight: 650; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 44px 0 14px; font-weight: 650; }
p { margin: 0 0 10px; } .faint { color: var(--faint); } .small { font-size: 14px; }
.clips { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 18px;
  margin-top: 26px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; max-width: 384px; }
figure video { display: block; width: 100%; aspect-ratio: var(--shape); background: #000; }
figcaption { padding: 11px 14px 13px; }
figcaption b { display: block; font-size: 17px; }
figcaption span { color: var(--faint); font-size: 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 14px 9px 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: 14px; }
th:first-child, td:first-child { text-align: left; } td:first-child { font-weight: 600; }
.meter { display: inline-block; width: 88px; height: 8px; border-radius: 4px; background: var(--soft);
  overflow: hidden; vertical-align: middle; }
.share { display: inline-block; min-width: 74px; }
.meter i { display: block; height: 100%; background: var(--bar); }
img { display: block; width: 100%; border: 1px solid var(--line); border-radius: 10px; background: #fff; }
.settings td { text-align: left; vertical-align: top; white-space: normal; }
.settings td:first-child { width: 150px; white-space: nowrap; }
code { font: 14px/1.6 ui-monospace, "DejaVu Sans Mono", monospace; }
"""

# Clips start each round together, so that they can be compared by eye.
_SCRIPT = """
const clips = [...document.querySelectorAll("video")];
clips.forEach((clip) => { clip.loop = false; });
clips[0].addEventListener("ended", () => clips.forEach((clip) => { clip.currentTime = 0; clip.play(); }));
"""


def html_report(runs: Sequence[Run], about: dict[str, Any], clips: dict[str, bytes], sheet: bytes) -> str:
    """The page.

    Args:
        runs: the dense run first.
        about: prompt, model, seed, steps, guidance, machine (str) and versions (dict).
        clips: the mp4 file of each run, by method.
        sheet: the contact sheet as a PNG file, without the title that the page has already.
    """
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    conditions = (
        f"{about['model']} model, seed {about['seed']}, {about['steps']} steps, guidance {about['guidance']:g}"
    )
    body = [
        f'<p class="faint small">vdit compare</p><h1>{escape(about["prompt"])}</h1>',
        f'<p class="faint">{escape(conditions)}</p>',
        f'<div class="clips">{"".join(_card(run, clips[run.method]) for run in runs)}</div>',
        f"<h2>Figures</h2>{_table(runs)}",
        '<p class="faint small" style="margin-top:12px">Density: share of the query-key pairs that attention '
        "computes, in the sparse steps (layers that stay dense counted in) and in all steps. PSNR and SSIM are "
        "against the dense clip from the same noise. Seconds are one run each, loading left out.</p>",
        f"<h2>Frames and differences</h2>{_image(sheet)}",
        f"<h2>Settings</h2>{_settings(runs)}",
        f'<h2>Made on</h2><p>{escape(about["machine"])}</p><p class="faint">{escape(versions)}</p>',
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(about['prompt'])}: vdit compare</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _card(run: Run, clip: bytes) -> str:
    if run.method == "dense":
        note = f"the reference, {text.seconds(run.seconds)}"
    else:
        kept = "no step was sparse" if run.density is None else f"{text.percent(run.density)} kept"
        note = f"{kept}, {text.psnr(run.quality)} dB, {text.seconds(run.seconds)}"
    height, width = run.clip.shape[1:3]
    return (
        f'<figure><video style="--shape:{width}/{height}" autoplay loop muted playsinline '
        f'src="data:video/mp4;base64,{_inline(clip)}"></video>'
        f"<figcaption><b>{escape(run.method)}</b><span>{note}</span></figcaption></figure>"
    )


def _table(runs: Sequence[Run]) -> str:
    heads = ("method", "density, sparse steps", "density overall", "PSNR, dB", "SSIM", "seconds", "speedup")
    rows = []
    for run in runs:
        share = 100 * (run.density or 0)
        meter = (
            f'<span class="meter"><i style="width:{share:.1f}%"></i></span>' if run.density is not None else ""
        )
        cells = (
            escape(run.method),
            f'{meter}<span class="share">{text.percent(run.density)}</span>',
            text.percent(run.density_overall),
            text.psnr(run.quality),
            text.ssim(run.quality),
            f"{run.seconds:.2f}",
            f"{runs[0].seconds / run.seconds:.2f}x",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _settings(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        if run.settings:
            values = ", ".join(f"{key} = {value}" for key, value in run.settings.items())
            rows.append(f"<tr><td>{escape(run.method)}</td><td><code>{escape(values)}</code></td></tr>")
    return f'<table class="settings">{"".join(rows)}</table>' if rows else "<p>Dense only.</p>"


def _image(data: bytes) -> str:
    source = f"data:image/png;base64,{_inline(data)}"
    return f'<img alt="Frames of all clips and their differences from dense" src="{source}">'


def _inline(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
