"""Data loading for pipeline stages: reading batches, splitting them into micro-batches, and exchanging samples between lanes."""
