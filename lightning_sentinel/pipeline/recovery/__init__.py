"""What follows from what was received: verdicts, audits by recomputation, and a step done again without liars."""
