"""The mechanism inside a pipeline: `realign()`, the dial, and what a step evaluates."""
