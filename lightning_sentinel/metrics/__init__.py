"""Anomaly scores and the quality of detection as torchmetrics: scalars from ``compute()``, figures from ``plot()``.

``AnomalyScore`` needs no ground truth; the others compare the detected workers with the workers that tampered.
"""

from __future__ import annotations

from lightning_sentinel.metrics.anomaly_score import AnomalyScore
from lightning_sentinel.metrics.detection import (
    DetectionDelay,
    DetectionF1,
    DetectionPrecision,
    DetectionRecall,
    FalsePositiveRate,
)

__all__ = [
    "AnomalyScore",
    "DetectionDelay",
    "DetectionF1",
    "DetectionPrecision",
    "DetectionRecall",
    "FalsePositiveRate",
]
