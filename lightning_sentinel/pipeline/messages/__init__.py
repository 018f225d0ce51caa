"""Messages between the workers of a pipeline: what is due, how it travels, and what is made of one that is not what was due."""
