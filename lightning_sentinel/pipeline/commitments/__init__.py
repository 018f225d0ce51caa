"""What workers bind themselves to in each step: what they sent, what they received, and which table of the step they saw."""
