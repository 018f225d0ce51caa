"""Checkpoints: one file or one part per stage, atomic writes, and the position in the data from which a run resumes."""
