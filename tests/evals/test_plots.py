"""Figures: they draw, the same bytes every time, in colours that follow the method."""

import subprocess
import sys

import numpy as np
import pytest

from gemma_qat.evals import (
    bits_per_site,
    kl_histogram,
    loss_curves,
    plot_quality,
    plots,
    quality_against_bytes,
)
from gemma_qat.evals.plot_quality import by_category, by_position, pareto_front
from gemma_qat.evals.plot_sites import code_use, error_per_layer, expert_load

CURVES = {"qat q4_0": [[0, 2.0], [1, 1.5], [10, 1.25]], "rtn": [[0, 2.0], [10, 2.0]], "odd": []}
POINTS = [
    {
        "label": "a",
        "recipe": "q4_0",
        "method": "rtn",
        "bytes": 2e6,
        "kl": 0.1,
        "low": 0.0,
        "high": 0.2,
    },
    {
        "label": "b",
        "recipe": "w2",
        "method": "qat",
        "bytes": 2e6,
        "kl": 0.05,
        "low": 0.04,
        "high": 0.06,
    },
    {"label": "float", "recipe": "", "method": "float", "bytes": 8e6, "kl": 0.0},
]
ROWS = [
    {"site": "embedding", "format": "q4_0", "bits": 4.5, "share": 0.75, "bytes": 3, "count": 1},
    {"site": "norm", "format": "float16", "bits": 16.0, "share": 0.25, "bytes": 1, "count": 9},
]
SAMPLES = {"rtn": np.array([0.1, 0.2, 0.0]), "qat": {"edges": [0.01, 0.1, 1.0], "counts": [3, 1]}}
KL = {"value": 0.1, "low": 0.05, "high": 0.2}
POSITIONS = {
    "qat": [{"from": 0, "to": 7, "kl_mean": KL}, {"from": 7, "to": 11, "kl_mean": 0.2}],
    "rtn": [{"from": 0, "to": 7, "kl_mean": {"value": 5}}],
}
CATEGORIES = {"qat": {"code": KL, "prose": 0.2}, "rtn": {"prose": {"value": 1.5}}}
USE = {
    "a": {"int2": {"codes": [-2, -1, 0, 1], "counts": [1, 2, 3, 0]}},
    "b": {"ternary": {"codes": [1, 0, -1], "counts": [0, 0, 0]}},
}
FIGURES = {
    "loss_curves": lambda form: loss_curves(CURVES, "loss (nats per token)", form=form),
    "loss_curves_logx": lambda form: loss_curves(CURVES, "loss", logx=True, form=form),
    "quality_against_bytes": lambda form: quality_against_bytes(POINTS, form),
    "kl_histogram": lambda form: kl_histogram(SAMPLES, form),
    "bits_per_site": lambda form: bits_per_site(ROWS, form),
    "by_position": lambda form: by_position(POSITIONS, "kl_mean", "KL", form),
    "by_category": lambda form: by_category(CATEGORIES, "KL", form),
    "error_per_layer": lambda form: error_per_layer(
        {"attn/q": [(0, 7), (1, 6.5)]}, form, ylabel="%"
    ),
    "code_use": lambda form: code_use(USE, form),
    "expert_load": lambda form: expert_load({"layer 0": [3, 1, 2], "layer 1": [0, 0]}, form),
}


@pytest.mark.parametrize("name", FIGURES)
def test_svg_is_the_same_every_time(name):
    """If this fails, a report differs between two runs that measured the same thing."""
    first = FIGURES[name]("svg")
    assert first.startswith(b"<?xml") and first == FIGURES[name]("svg")


def test_png_is_a_png():
    """If this fails, figures cannot be used outside a page."""
    assert FIGURES["kl_histogram"]("png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: loss_curves({}, "loss"),
        lambda: kl_histogram({}),
        lambda: quality_against_bytes([]),
        lambda: bits_per_site([]),
        lambda: by_position({}, "kl_mean", "KL"),
        lambda: by_category({}, "KL"),
        lambda: error_per_layer({}, ylabel="%"),
        lambda: code_use({}),
        lambda: expert_load({}),
    ],
)
def test_nothing_to_draw_draws_an_empty_figure(draw):
    """If this fails, a report of a run without that section crashes at its end."""
    assert draw().startswith(b"<?xml")


def test_colour_follows_the_method():
    """If this fails, one method has two colours, or two methods share one, across figures."""
    styles = plots.line_styles(["qat_ce q4_0", "q4_0 qat", "qat w2", "Round to nearest", "other"])
    colours = [style["color"] for style in styles]
    names = ("qat_ce", "qat", "qat", "rtn")
    assert colours[:4] == [plots.COLOURS[name] for name in names]
    assert colours[4] not in plots.COLOURS.values()
    assert styles[1]["linestyle"] != styles[2]["linestyle"]


def test_recipes_of_equal_bytes_stand_apart():
    """If this fails, one recipe's points hide another's."""
    shifts = plot_quality._shifts(POINTS[:2], 10.0)
    assert shifts[0] == -shifts[1] != 0


def test_the_front_is_what_nothing_betters():
    """If this fails, a model is shown as a good choice though another is smaller and nearer, or a good one is not."""
    points = [
        {"bytes": 3, "kl": 0.1},  # bettered by the next in one, equal in the other
        {"bytes": 3, "kl": 0.05},
        {"bytes": 2, "kl": 0.2},
        {"bytes": 5, "kl": 0.05},
        {"bytes": 4, "kl": 0.3},
        {"bytes": 7, "kl": 0.01},
    ]
    assert pareto_front(points) == [2, 1, 5]


def test_styles_tell_models_apart():
    """If this fails, two models of one evaluation look the same, or a method has not its own colour."""
    named = plots.styles_of(["q4_0-rtn", "q4_0-qat", "mobile-qat"])
    assert named["q4_0-rtn"]["color"] == plots.COLOURS["rtn"]
    assert named["q4_0-qat"] != named["mobile-qat"]
    for names in (["one_qat", "two_qat"], ["a-rtn", "b"], list("abcdefghijk")):
        styles = [tuple(style.values()) for style in plots.styles_of(names).values()]
        assert len(set(styles)) == len(names)


def test_inline_svg_loads_nothing_and_takes_the_page_colour():
    """If this fails, a page fetches something, or figures are black on black in the dark theme."""
    text = plots.inline_svg(FIGURES["bits_per_site"]("svg"), "p1", 'A "title" <b>')
    assert "http" not in text and plots.INK not in text and "currentColor" in text
    assert 'aria-label="A &quot;title&quot; &lt;b&gt;"' in text
    assert text.count("<svg") == text.count("</svg>") == 1
    assert 'href="#p1-' in text and 'id="p1-' in text


def test_unknown_form_is_named():
    """If this fails, a wrong form is passed on to matplotlib."""
    with pytest.raises(ValueError, match="plot form 'gif': expected 'svg' or 'png'"):
        loss_curves(CURVES, "loss", form="gif")


def test_importing_the_package_does_not_import_matplotlib():
    """If this fails, training pays for a drawing library it does not use."""
    code = "import sys, gemma_qat.evals; print(*{'matplotlib', 'rich'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
