"""Examples that run from the repository root."""

from __future__ import annotations
