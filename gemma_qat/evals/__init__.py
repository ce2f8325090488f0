"""What a quantized model kept: records per token, intervals, a floor, figures, the report.

matplotlib and rich are imported when a figure or a table is made, so importing this package costs
numpy only.
"""

# The floor: what counting pairs can predict.
from gemma_qat.evals.bigram import BigramModel

# Intervals by resampling documents.
from gemma_qat.evals.bootstrap import Resamples, interval, quantile, resampled_quantile
from gemma_qat.evals.page import html_page

# Figures.
from gemma_qat.evals.plot_methods import methods_by_recipe
from gemma_qat.evals.plot_quality import kl_histogram, quality_against_bytes
from gemma_qat.evals.plot_sites import bits_per_site
from gemma_qat.evals.plots import loss_curves

# What scoring leaves behind. Scoring itself (`score.py`, with jax) exports its names here too.
from gemma_qat.evals.records import TokenRecords
from gemma_qat.evals.report import write_figures, write_report
from gemma_qat.evals.results import console_table, figures_digest, headline

# The report.
from gemma_qat.evals.run_files import gather

# The numbers of the report.
from gemma_qat.evals.summary import (
    kl_counts,
    paired_difference,
    recovered,
    summarize,
    summarize_part,
)

__all__ = [
    "BigramModel",
    "Resamples",
    "TokenRecords",
    "bits_per_site",
    "console_table",
    "figures_digest",
    "gather",
    "headline",
    "html_page",
    "interval",
    "kl_counts",
    "kl_histogram",
    "loss_curves",
    "methods_by_recipe",
    "paired_difference",
    "quality_against_bytes",
    "quantile",
    "recovered",
    "resampled_quantile",
    "summarize",
    "summarize_part",
    "write_figures",
    "write_report",
]
