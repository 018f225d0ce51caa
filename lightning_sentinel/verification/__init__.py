"""Signals in, verdicts out: pure torch, no processes, neither Lightning nor DeepSpeed."""

from lightning_sentinel.verification.calibration import Calibration
from lightning_sentinel.verification.ledger import Ledger
from lightning_sentinel.verification.table import COLUMNS, SignalTable
from lightning_sentinel.verification.verdicts import Audit, Detection, StepVerdict, judge, judge_with_audits
from lightning_sentinel.verification.verifier import BoundaryVerifier, Inspection

__all__ = [
    "COLUMNS",
    "Audit",
    "BoundaryVerifier",
    "Calibration",
    "Detection",
    "Inspection",
    "Ledger",
    "SignalTable",
    "StepVerdict",
    "judge",
    "judge_with_audits",
]
