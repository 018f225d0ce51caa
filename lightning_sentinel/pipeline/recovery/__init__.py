"""What follows from the signals that a step received: verdicts, audits by recomputation, and a repeat of the step without liars."""
