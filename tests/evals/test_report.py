"""The report: deterministic, self-contained, escaped, whole with any section missing."""

import copy
import html.parser
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from gemma_qat.evals import (
    Resamples,
    TokenRecords,
    console_table,
    figures_digest,
    headline,
    html_page,
    kl_counts,
    paired_difference,
    recovered,
    summarize,
    write_report,
)

RESAMPLES = Resamples(7, draws=100, seed=0)
NASTY = "<script>alert('x')</script> & \"quoted\""


def records(scale, seed):
    rng = np.random.default_rng(seed)
    document = np.arange(210) % 7
    reference = 1 + np.abs(np.random.default_rng(9).normal(size=210))
    return TokenRecords(
        document=document.astype(np.int32),
        position=np.arange(document.size) % 5 + 1,
        nll=reference + scale * (1 + 0.1 * rng.normal(size=210)),
        reference_nll=reference,
        kl=scale * (1 + rng.random(210)),
        agree=rng.random(210) > scale,
        document_bytes=np.full(7, 90),
    )


def report_data():
    models = {"rtn": records(0.4, 1), "mse": records(0.3, 2), "qat": records(0.1, 3)}
    other = {"qat_ce": records(0.2, 4), "float_control": records(0.05, 5)}
    recipe = {
        "coverage": [
            {
                "site": "embed<der>",
                "format": "q4_0",
                "bits": 4.5,
                "bytes": 900,
                "share": 0.9,
                "count": 1,
            },
            {
                "site": "norm",
                "format": "float16",
                "bits": 16,
                "bytes": 100,
                "share": 0.1,
                "count": 9,
            },
        ],
        "bytes": 1000,
        "float_bytes": 4000,
        "methods": {name: summarize(model, RESAMPLES) for name, model in models.items()},
        "differences": {
            f"qat-{name}": paired_difference(models["qat"], models[name], RESAMPLES)
            for name in ("rtn", "mse")
        },
        "recovered": {
            name: recovered(models["qat"], models[name], RESAMPLES) for name in ("rtn", "mse")
        },
        "cross_entropy": {
            "methods": {name: summarize(model, RESAMPLES) for name, model in other.items()},
        },
        "export": {"gguf": {"codes_equal": True, "scales_equal": False, "note": NASTY}},
    }
    reference = summarize(records(0.0, 6), RESAMPLES)
    return {
        "title": f"Tiny {NASTY}",
        "model": {"size": "tiny_e2b", "parameters": 1234567},
        "environment": {"jax": "0.10.2"},
        "float": {**reference, "bigram": {"nll": {"value": 3.25, "low": 3.0, "high": 3.5}}},
        "recipes": {"q4_0": recipe},
        "curves": {"qat": [[0, 1.0], [10, 0.5]]},
        "curve_panels": {"Float <training>.": {"ylabel": "loss", "curves": {"float": [[1, 2.0]]}}},
        "kl_histograms": {name: kl_counts(model.kl) for name, model in models.items()},
        "decode": {
            "prompt": "def f(",
            "packed_text": "x) -> list[<T>]:",
            "fake_quant_text": "x) -> list[<T>]:",
            "tokens_equal": True,
        },
        "timing": {"train_seconds": 12.5},
    }


class Reader(html.parser.HTMLParser):
    """Collects tags, text and everything a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.loads = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v[:1] != "#"]
        if tag not in ("meta", "path", "use", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def test_json_is_sorted_and_deterministic(tmp_path):
    """If this fails, two runs that measured the same thing cannot be compared byte by byte."""
    data = report_data()
    json_path, html_path = write_report(data, tmp_path / "a" / "b")
    again = copy.deepcopy(data)
    again["recipes"] = dict(reversed(list(again["recipes"].items())))
    other_json, other_html = write_report(again, tmp_path / "c")
    assert json_path.read_bytes() == other_json.read_bytes()
    assert html_path.read_bytes() == other_html.read_bytes()
    text = json_path.read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert (
        json.loads(text)["recipes"]["q4_0"]["methods"]["qat"]
        == data["recipes"]["q4_0"]["methods"]["qat"]
    )
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["report.html", "report.json"]


def test_times_and_machine_do_not_change_the_digest():
    """If this fails, the digest says two equal runs differ; or that two different runs agree."""
    data = report_data()
    elsewhere = {**data, "timing": {"train_seconds": 99.0}, "environment": {"jax": "0.12"}}
    assert figures_digest(data) == figures_digest(elsewhere)
    changed = copy.deepcopy(data)
    changed["recipes"]["q4_0"]["methods"]["qat"]["nll"]["value"] += 1e-9
    assert figures_digest(data) != figures_digest(changed)


def test_page_loads_nothing_and_is_well_formed():
    """If this fails, the page is not one file: it fetches something or its tags do not close."""
    page = html_page(report_data())
    assert "http" not in page and "url(" not in page.replace("url(#", "")
    reader = read(page)
    assert reader.open == [] and reader.loads == []
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_all_text_is_escaped():
    """If this fails, a title, a site name or decoded text is run as markup."""
    reader = read(html_page(report_data()))
    text = "".join(reader.text)
    assert text.count(NASTY) == 3
    assert "x) -> list[<T>]:" in text and "embed<der>" in text and "Float <training>." in text
    assert not {"t", "der", "training"} & set(reader.tags)


def test_element_names_of_figures_do_not_collide():
    """If this fails, one figure draws another's marks."""
    page = html_page(report_data())
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names)) > 20


def test_every_model_is_in_both_tables():
    """If this fails, a method was measured and is not shown."""
    data = report_data()
    page = "".join(read(html_page(data)).text)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(console_table(data))
    shown = console.export_text()
    for name, words in (
        ("bigram", "bigram counts"),
        ("float", "float"),
        ("rtn", "round to nearest"),
        ("mse", "least squares scales"),
        ("qat", "QAT"),
        ("qat_ce", "QAT, cross entropy"),
        ("float_control", "float control"),
    ):
        assert words in page and re.search(rf"\b{name}\b", shown)
    for summary in data["recipes"]["q4_0"]["methods"].values():
        gap = summary["loss_gap"]
        assert f"{gap['value']:+.4f}" in shown and f"{gap['low']:+.4f}" in shown
        assert f"{gap['value']:+.4f}" in page and f"{gap['high']:+.4f}" in page


@pytest.mark.parametrize(
    "path",
    [(key,) for key in report_data()]
    + [("recipes", "q4_0", key) for key in report_data()["recipes"]["q4_0"]]
    + [("recipes", "q4_0", "methods", "qat", "kl_mean"), ("float", "bigram")],
    ids="/".join,
)
def test_any_section_may_be_missing(path, tmp_path):
    """If this fails, a run without that section ends in a traceback instead of a report."""
    data = report_data()
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    write_report(data, tmp_path)
    console_table(data)


def test_an_empty_report_is_a_page():
    """If this fails, the smallest report does not open."""
    assert read(html_page({"title": "Empty"})).open == []
    assert console_table({"title": "Empty"}).row_count == 0


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        ({"value": 78.4, "low": 70.0, "high": 85.0}, "wins back 78% (70 to 85) of the loss that"),
        ({"value": 8.0, "low": -5.0, "high": 20.0}, "did not measurably win back the loss"),
        ({"value": -30.0, "low": -40.0, "high": -20.0}, "costs 30% (20 to 40) larger, in 25% of"),
    ],
)
def test_headline_says_what_was_found(estimate, words):
    """If this fails, the page leads with a claim that the figures do not carry."""
    section = {"bytes": 1, "float_bytes": 4, "recovered": {"rtn": {"loss_gap": estimate}}}
    assert words in headline({"recipes": {"q4_0": section}})


def test_headline_without_a_loss():
    """If this fails, a recipe that lost nothing is said to have won something back."""
    nothing = {"value": None, "reason": "small"}
    section = {"recovered": {"rtn": {"loss_gap": nothing, "kl_mean": nothing}}}
    assert "lost nothing measurable" in headline({"recipes": {"q4_0": section}})


def test_numbers_without_json_form_are_named(tmp_path):
    """If this fails, a NaN is written to a file that JSON readers refuse, or nobody knows where."""
    with pytest.raises(ValueError, match="report/float/nll: nan is not a finite number"):
        write_report({"title": "t", "float": {"nll": float("nan")}}, tmp_path)
    with pytest.raises(ValueError, match="report/model/size: object has no JSON form"):
        write_report({"title": "t", "model": {"size": object()}}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_numpy_values_become_plain(tmp_path):
    """If this fails, a report made from arrays cannot be written."""
    data = {"title": "t", "model": {"a": np.float32(0.5), "b": np.arange(2), "c": np.bool_(True)}}
    path, _ = write_report(data, tmp_path)
    assert json.loads(path.read_text())["model"] == {"a": 0.5, "b": [0, 1], "c": True}


def test_cross_entropy_needs_its_methods():
    """If this fails, models are dropped from the table without a word."""
    data = {"title": "t", "recipes": {"q4_0": {"cross_entropy": {"qat_ce": {}}}}}
    with pytest.raises(ValueError, match="recipes/q4_0/cross_entropy: has qat_ce, expected 'meth"):
        html_page(data)
