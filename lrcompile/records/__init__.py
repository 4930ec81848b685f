"""The frozen values that travel between the stages.

Arrays are never inside a plan: only names, numbers and sentences are. Names of types follow the stages:
``Source`` (load), ``Site`` and ``Group`` (find), ``InputStatistics`` (calibrate), ``Candidate``, ``Decision``
and ``Plan`` (plan), ``Evidence`` (verify), ``Result`` (publish).

sites.py       load and find      statistics.py  calibrate
plans.py       plan               evidence.py    verify and publish
engines.py     build
"""

from __future__ import annotations

from lrcompile.records.engines import STORED, Built, EngineOptions, Precision, ShapeRange, flag_of
from lrcompile.records.evidence import (
    Evidence,
    OutputEvidence,
    Result,
    SiteReport,
    Speed,
    Totals,
    Tradeoff,
    TradeoffPoint,
)
from lrcompile.records.plans import FOLD, Amount, Budget, Candidate, Cost, Decision, Limit, Plan
from lrcompile.records.sites import (
    Bias,
    Finding,
    Follower,
    Group,
    Kind,
    Layout,
    Refusal,
    Site,
    Source,
    Step,
    Width,
    Window,
    Wiring,
)
from lrcompile.records.statistics import InputStatistics, Reaction

__all__ = [
    "FOLD",
    "STORED",
    "Amount",
    "Bias",
    "Budget",
    "Built",
    "Candidate",
    "Cost",
    "Decision",
    "EngineOptions",
    "Evidence",
    "Finding",
    "Follower",
    "Group",
    "InputStatistics",
    "Kind",
    "Layout",
    "Limit",
    "OutputEvidence",
    "Plan",
    "Precision",
    "Reaction",
    "Refusal",
    "Result",
    "ShapeRange",
    "Site",
    "SiteReport",
    "Source",
    "Speed",
    "Step",
    "Totals",
    "Tradeoff",
    "TradeoffPoint",
    "Width",
    "Window",
    "Wiring",
    "flag_of",
]
