"""From the gradients of a stage's workers to the gradients that the optimizer steps with."""
