"""Signals in, verdicts out: pure torch, no processes, neither Lightning nor DeepSpeed."""

from lightning_sentinel.verification.ledger import Ledger
from lightning_sentinel.verification.table import COLUMNS, SignalTable
from lightning_sentinel.verification.verdicts import Detection, StepVerdict, judge
from lightning_sentinel.verification.verifier import BoundaryVerifier, Inspection

__all__ = ["COLUMNS", "BoundaryVerifier", "Detection", "Inspection", "Ledger", "SignalTable", "StepVerdict", "judge"]
