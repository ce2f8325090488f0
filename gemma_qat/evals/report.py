"""The report of a run: report.json for programs, report.html for people, a table for the console.

`data` is one dictionary of plain values. Only `title` is needed; a section that is missing is not
shown. A *summary* is what `summary.summarize` returns; an *estimate* is {"value", "low", "high"};
names in capitals are chosen by the caller.

    title           the heading
    headline        a sentence to lead with; written from the figures when missing
    model           {KEY: value}: size, parameters, vocab, ...
    environment     {KEY: value}: versions, device, ...
    float           a summary, with "bigram": {"nll": estimate or number} beside it
    recipes         {RECIPE: {
        bytes, float_bytes     stored bytes of the recipe and of the float model
        coverage               rows {site, format, bits, bytes, share, count}
        methods                {"rtn" | "mse" | "qat" | METHOD: summary}
        differences            {"qat-rtn" | "qat-mse" | NAME: summary.paired_difference}
        recovered              {"rtn" | "mse": summary.recovered}, QAT against that method
        cross_entropy          {"methods": {"qat_ce", "float_control": summary},
                                "differences", "recovered"}: the same, trained without a teacher
        export                 {KEY: value}, nested as deep as needed
    }}
    curves          {LABEL: [[step, value], ...]};  curves_ylabel names their unit
    curve_panels    {CAPTION: {"ylabel", "curves", "logx" (optional)}}: further figures of curves
    kl_histograms   {LABEL: {"edges", "counts"}} as summary.kl_counts makes them
    decode          {"prompt", "packed_text", "fake_quant_text", "tokens_equal"}
    timing          {KEY: value}: seconds, tokens per second

What `run_files.gather` adds of runs and of files:

    runs            {RUN: {
        config, about          what config.json and run.json of its folder hold
        coverage               rows as above, classes of sites in place of sites; bytes, float_bytes
        curves                 {METRIC: [[step, value], ...]}; curves_every: of how many lines one is kept
        codes                  {"sites": {PATH: {"format", "layer", "relative_error", "clipped"}},
                                "code_use": {FORMAT: {"codes", "counts"}}, "expert_load": {LAYER: [number]}}
        exports                {FILE: {KEY: value}}
    }}
    evaluations     [as `evaluations.py` describes them]
    benches         {LABEL: what `gemma-qat bench --json` writes}
    left_aside      [words]: files that were found and are none of these

report.json holds `data` with sorted keys, plus `figures_sha256`: the digest of everything but
`timing` and `environment`. Two runs that measured the same thing have the same digest; the file
differs in those two sections only.

The page is one file with inline styles and inline figures: it loads nothing and can be mailed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_qat.evals.figures import figures_of
from gemma_qat.evals.page import html_page
from gemma_qat.evals.results import figures_digest, plain


def write_report(data: Mapping[str, Any], out_dir: Path) -> tuple[Path, Path]:
    """Writes report.json and report.html into `out_dir` and returns their paths.

    Each file is written beside its name and moved over it, so a reader never sees half a report.
    Raises: ValueError, naming the place in `data`, for a number that is not finite or a value that
    JSON has no form for.
    """
    report = plain(data)
    report["figures_sha256"] = figures_digest(report)
    page = html_page(report)
    text = json.dumps(report, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    json_path, html_path = out_dir / "report.json", out_dir / "report.html"
    out_dir.mkdir(parents=True, exist_ok=True)
    _replace(json_path, (text + "\n").encode())
    _replace(html_path, page.encode())
    return json_path, html_path


def write_figures(data: Mapping[str, Any], out_dir: Path) -> list[Path]:
    """Writes the report's figures as PNG files into `out_dir`/figures and returns their paths.

    Raises: as `write_report` does.
    """
    drawn = {figure.name: figure.draw("png") for figure in figures_of(plain(data))}
    folder = out_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, image in drawn.items():
        _replace(folder / f"{name}.png", image)
        paths.append(folder / f"{name}.png")
    return paths


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
