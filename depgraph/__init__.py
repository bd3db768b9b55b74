"""depgraph: make any PyTorch model physically smaller in one call, and prove the result."""

from __future__ import annotations

from .costs.cost import CostModel, count_macs, measure_latency, parameter_count
from .data.calibration import Batch, Calibration
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
from .exploring import pictures
from .exploring.html import write_html
from .exploring.sensitivity import Sensitivity, sensitivity
from .exploring.sweep import Row, Sweep, sweep
from .grouping.graph import DependencyGraph, Frozen, Group, Member
from .grouping.propagate import propagate
from .importance import L1, scores_of
from .inputs import Examples
from .planning.build import build_plan
from .planning.plan import Cut, Plan
from .planning.surgery import apply
from .proof.verify import Verification, verify
from .prune import PruneResult, analyze, prune
from .recover import Reconstruction, Recovery, recover
from .report import Report
from .rules import Site, equation, op_rule
from .select import Budget, Scope, choose
from .store import load, load_plans, save
from .tracing.trace import trace
from .training.optimizer import apply_to_optimizer
from .training.regularise import GroupLasso, GrowingRegularisation, Slimming
from .training.rewind import rewind
from .training.schedule import GradualPruner, GradualResult, prune_gradually
from .training.train import Training, distill, finetune

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
