"""Makes one page of any number of runs and evaluations: report.html, report.json with every number, figures as PNG."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--out", metavar="DIR",
        help="where the report is written (default: in the run's folder, when there is one run only)",
    )  # fmt: skip
    parser.add_argument(
        "--evaluation", nargs="+", action="extend", default=[], metavar="FILE",
        help="what 'gemma-qat evaluate --json' wrote; those in a run's folder are found there",
    )  # fmt: skip
    parser.add_argument(
        "--bench", nargs="+", action="extend", default=[], metavar="FILE",
        help="what 'gemma-qat bench --json' wrote",
    )  # fmt: skip
    parser.add_argument(
        "--title", default="", help="heading of the page (default: the runs' names)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Gathers, draws and writes the report, and prints where it is."""
    from gemma_qat.errors import InputError
    from gemma_qat.evals import gather, headline, write_figures, write_report

    if arguments.out is None and (len(arguments.runs) != 1 or not Path(arguments.runs[0]).is_dir()):
        raise InputError("--out DIR is expected, unless there is one run, whose folder it is")
    out = Path(arguments.runs[0] if arguments.out is None else arguments.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file, a directory to write the report in expected")
    runs, evaluations, benches = (
        [Path(name) for name in names]
        for names in (arguments.runs, arguments.evaluation, arguments.bench)
    )
    data = gather(runs, evaluations, benches, arguments.title)
    for words in data.get("left_aside", []):
        print(f"left aside: {words}")
    json_path, html_path = write_report(data, out)
    figures = write_figures(data, out)
    lead = headline(data)
    if lead:
        print(lead)
    print(f"{html_path}: the page; {json_path.name} and {len(figures)} figures beside it")
    return 0


def page_of(folder: Path) -> str:
    """Writes report.html and report.json into a run's folder and returns a line that says so, or why not.

    Never raises: a run that trained well has not failed because of its page.
    """
    from gemma_qat.cli.secrets import safe
    from gemma_qat.evals import gather, write_report

    try:
        _, page = write_report(gather([folder]), folder)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return safe(f"{folder / 'report.html'}: not written ({why})")
    return f"{page}: the page of this run"
