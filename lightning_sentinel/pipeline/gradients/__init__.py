"""From the gradients of a stage's workers to the gradient of the step."""
