"""depgraph: make any PyTorch model physically smaller in one call, and prove the result."""

from __future__ import annotations

from . import pictures
from .build import build_plan
from .calibration import Batch, Calibration
from .cost import CostModel, count_macs, measure_latency, parameter_count
from .errors import (
    BudgetError,
    DepgraphError,
    InputError,
    NothingToPruneError,
    PlanError,
    StoreError,
    TraceError,
    UnknownOpError,
    VerificationError,
)  # fmt: skip
from .graph import DependencyGraph, Frozen, Group, Member
from .html import write_html
from .importance import L1, scores_of
from .inputs import Examples
from .optimizer import apply_to_optimizer
from .plan import Cut, Plan
from .propagate import propagate
from .prune import PruneResult, analyze, prune
from .recover import Reconstruction, Recovery, recover
from .regularise import GroupLasso, GrowingRegularisation, Slimming
from .report import Report
from .rewind import rewind
from .rules import Site, equation, op_rule
from .schedule import GradualPruner, GradualResult, prune_gradually
from .select import Budget, Scope, choose
from .sensitivity import Sensitivity, sensitivity
from .store import load, load_plans, save
from .surgery import apply
from .sweep import Row, Sweep, sweep
from .trace import trace
from .train import Training, distill, finetune
from .verify import Verification, verify

__version__ = "0.1.0"
__all__ = [
    "L1",
    "Batch",
    "Budget",
    "BudgetError",
    "Calibration",
    "CostModel",
    "Cut",
    "DependencyGraph",
    "DepgraphError",
    "Examples",
    "Frozen",
    "GradualPruner",
    "GradualResult",
    "Group",
    "GroupLasso",
    "GrowingRegularisation",
    "InputError",
    "Member",
    "NothingToPruneError",
    "Plan",
    "PlanError",
    "PruneResult",
    "Reconstruction",
    "Recovery",
    "Report",
    "Row",
    "Scope",
    "Sensitivity",
    "Site",
    "Slimming",
    "StoreError",
    "Sweep",
    "TraceError",
    "Training",
    "UnknownOpError",
    "Verification",
    "VerificationError",
    "analyze",
    "apply",
    "apply_to_optimizer",
    "build_plan",
    "choose",
    "count_macs",
    "distill",
    "equation",
    "finetune",
    "load",
    "load_plans",
    "measure_latency",
    "op_rule",
    "parameter_count",
    "pictures",
    "propagate",
    "prune",
    "prune_gradually",
    "recover",
    "rewind",
    "save",
    "scores_of",
    "sensitivity",
    "sweep",
    "trace",
    "verify",
    "write_html",
]
