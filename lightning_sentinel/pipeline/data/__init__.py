"""What the stages of a pipeline read, and whose samples they work on."""
