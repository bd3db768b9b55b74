"""depgraph: make any PyTorch model physically smaller in one call, and prove the result.

`prune` is the one call. It is a sequence of functions, each of which takes what the one before returned; other tools use them
one by one (docs/guides/inside-another-tool.md):

| stage | functions | what they take and return |
|---|---|---|
| trace | `trace`, `propagate`, `op_rule`, `equation` | `Examples`, `Trace`, `DimFacts`, `OpCall`, `Axis`, `Rule` |
| group | `analyze` | `DependencyGraph`, `Group`, `Member`, `Frozen`, `Reason`, `Constraint`, `Place` |
| rank | `scores_of` | `CRITERIA`, `Importance`, `Prepared`, `L1`, `Scores`, `Calibration`, `Batch` |
| choose | `choose`, `register_budget` | `Masks`, `Scope`, `Budget`, `BudgetKind`, `CostModel` |
| plan, apply | `build_plan`, `apply` | `Plan`, `Cut`, `Repair`, `Rewrite` |
| verify | `verify` | `Verification` |
| depth | `branches` | `Branch`, `Depth`, `Removal` |
| all of these | `prune` | `PruneResult`, `Report`, `Layer` |
| recover | `recover`, `finetune`, `distill` | `Recovery`, `Reconstruction`, `Training` |
| while training | `prune_gradually`, `rewind`, `apply_to_optimizer` | `GradualPruner`, `GradualResult`, `GroupLasso`, `GrowingRegularisation`, `Slimming` |
| widths, depth and ranks, whichever is best | `compress` | |
| other ways | `fuse`, `factorise`, `mask`, `mask_gradually`, `mask_checkpoint`, `import_masks`, `export_masks`, `graphs` | `Simplified`, `GradualMask`, `Summary` |
| save | `save`, `load`, `load_plans` | |
| larger than memory | `checkpoint` | all of these, from file to file |
| one model, many widths | `Elastic` | `Cascade` |
| a whole job | `Recipe` | `RecipeResult` |
| explore | `sweep`, `sensitivity`, `write_html`, `pictures`, `count_macs`, `measure_latency`, `parameter_count` | `Sweep`, `Row`, `Sensitivity` |

Errors are `DepgraphError`: `InputError`, `TraceError`, `UnknownOpError`, `NothingToPruneError`, `BudgetError`, `PlanError`,
`StoreError`, `VerificationError`. Whichever is raised, the model is as it was.

These names are stable: from 1.0 on, a change in them warns for one minor version first. So are the criteria in
`depgraph.importance`, what is in `depgraph.integrations`, and the JSON of a plan, which later versions will still read.
Everything else (modules in the folders, names that begin with an underscore) may change at any time.

The folders are a staircase: they stand in the order in which data goes through them, and none imports one that stands below
it in this list (`make check` holds that).

* `base`: what every stage uses, such as errors, example inputs, messages between processes and the modes that a run is put into.
* `tracing`: runs the model on the example inputs and records it.
* `axes`: the algebra in which rules are stated.
* `plan`: the plan as data, and what needs nothing else.
* `rules`: what each op does to the dims of its arguments and result.
* `surgery`: makes the smaller model of a plan and a model.
* `config`: what a model was built from, and how those numbers are repaired.
* `grouping`: finds groups, the constraints between their sizes, and what is frozen and why.
* `costs`: parameters, MACs, bytes, memory and seconds, as functions of the widths and as measured.
* `data`: runs the user's batches, or some that it makes up, and shows what each weight consumes on them.
* `importance`: the criteria, one score per unit.
* `recover`: sets the kept weights anew from calibration data.
* `verify`: compares the smaller model with the masked original.
* `depth`: finds the branches that can go, and ranks them.
* `select`: chooses the units that stay.
* `search`, `comparing`, `shorten`: plan, apply, verify, freeze what was wrong, plan again; which of two results; depth beside widths.
* `report`, `prune`: the report; the one call, its checks and its result.
* `training`: training before, between and after prunings.
* `simplify`: other ways than fewer units, such as fused norms and zeros.
* `graphs`: fewer edges in the graphs that a model runs on.
* `exploring`: trade-off curves, sensitivity, pictures and pages.
* `elastic`: one set of weights, and a sub-model of every size on it.
* `store`: saves a smaller model to a folder, and loads it.
* `integrations`: inside other libraries' training runs, their folders, and models that they have offloaded.
* `checkpoint`: prunes files without holding their model.
* `distributed`: over several processes.
* `recipe`: a pipeline as plain data.
* `cli`: the command line.
"""

from __future__ import annotations

from . import checkpoint, graphs
from .axes.axes import Axis, Reason
from .axes.op_call import DimFacts
from .base.errors import (  # fmt: skip
    BudgetError,
    DepgraphError,
    InputError,
    NothingToPruneError,
    PlanError,
    StoreError,
    TraceError,
    UnknownOpError,
    VerificationError,
)
from .base.inputs import Examples
from .base.version import __version__ as __version__
from .costs.cost import CostModel, count_macs, parameter_count
from .costs.latency import measure_latency
from .data.calibration import Batch, Calibration
from .depth import Branch, branches
from .depth.request import Depth
from .elastic import Cascade, Elastic
from .exploring import pictures
from .exploring.html import write_html
from .exploring.sensitivity import Sensitivity, sensitivity
from .exploring.sweep import Row, Sweep, sweep
from .grouping.build import build_plan
from .grouping.given import Place
from .grouping.graph import DependencyGraph, Frozen, Group, Member
from .grouping.propagate import propagate
from .importance import CRITERIA, L1, Importance, Prepared, Scores, scores_of
from .plan.optimizer import apply_to_optimizer
from .plan.plan import Cut, Masks, Plan, Removal, Repair, Rewrite
from .prune import Constraint, PruneResult, analyze, prune
from .recipe import Recipe, RecipeResult
from .recover import Reconstruction, Recovery, recover
from .report import Layer, Report
from .rules import OpCall, Rule, equation, op_rule
from .select import Budget, BudgetKind, Scope, choose, register_budget
from .simplify.compress import compress
from .simplify.fusion import fuse
from .simplify.gradual import GradualMask, mask_gradually
from .simplify.low_rank import factorise
from .simplify.masking import mask
from .simplify.on_disk import mask_checkpoint
from .simplify.result import Simplified, Summary
from .simplify.torch_masks import export_masks, import_masks
from .store import load, load_plans, save
from .surgery.apply import apply
from .tracing.trace import Trace, trace
from .training.regularise import GroupLasso, GrowingRegularisation, Slimming
from .training.rewind import rewind
from .training.schedule import GradualPruner, GradualResult, prune_gradually
from .training.train import Training, distill, finetune
from .verify.verify import Verification, verify

__all__ = [
    "CRITERIA",
    "L1",
    "Axis",
    "Batch",
    "Branch",
    "Budget",
    "BudgetError",
    "BudgetKind",
    "Calibration",
    "Cascade",
    "Constraint",
    "CostModel",
    "Cut",
    "DependencyGraph",
    "DepgraphError",
    "Depth",
    "DimFacts",
    "Elastic",
    "Examples",
    "Frozen",
    "GradualMask",
    "GradualPruner",
    "GradualResult",
    "Group",
    "GroupLasso",
    "GrowingRegularisation",
    "Importance",
    "InputError",
    "Layer",
    "Masks",
    "Member",
    "NothingToPruneError",
    "OpCall",
    "Place",
    "Plan",
    "PlanError",
    "Prepared",
    "PruneResult",
    "Reason",
    "Recipe",
    "RecipeResult",
    "Reconstruction",
    "Recovery",
    "Removal",
    "Repair",
    "Report",
    "Rewrite",
    "Row",
    "Rule",
    "Scope",
    "Scores",
    "Sensitivity",
    "Simplified",
    "Slimming",
    "StoreError",
    "Summary",
    "Sweep",
    "Trace",
    "TraceError",
    "Training",
    "UnknownOpError",
    "Verification",
    "VerificationError",
    "analyze",
    "apply",
    "apply_to_optimizer",
    "branches",
    "build_plan",
    "checkpoint",
    "choose",
    "compress",
    "count_macs",
    "distill",
    "equation",
    "export_masks",
    "factorise",
    "finetune",
    "fuse",
    "graphs",
    "import_masks",
    "load",
    "load_plans",
    "mask",
    "mask_checkpoint",
    "mask_gradually",
    "measure_latency",
    "op_rule",
    "parameter_count",
    "pictures",
    "propagate",
    "prune",
    "prune_gradually",
    "recover",
    "register_budget",
    "rewind",
    "save",
    "scores_of",
    "sensitivity",
    "sweep",
    "trace",
    "verify",
    "write_html",
]
