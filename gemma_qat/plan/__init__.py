"""Before the hardware: a training step compiled for a TPU slice that is not there, its memory, a bound on its time."""

# What to plan, and for what.
from gemma_qat.plan.chips import CHIPS, Chip, Topology, topology_named

# The plan.
from gemma_qat.plan.compile import has_compiler
from gemma_qat.plan.estimate import Place, declared_flops, forecast
from gemma_qat.plan.gpus import GPUS, Cluster, Gpu, cluster_named
from gemma_qat.plan.program import Workload
from gemma_qat.plan.report import Plan, plan, verdict
from gemma_qat.plan.search import Choice, search

__all__ = [
    "CHIPS",
    "GPUS",
    "Chip",
    "Choice",
    "Cluster",
    "Gpu",
    "Place",
    "Plan",
    "Topology",
    "Workload",
    "cluster_named",
    "declared_flops",
    "forecast",
    "has_compiler",
    "plan",
    "search",
    "topology_named",
    "verdict",
]
