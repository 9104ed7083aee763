"""Aligning a model at one strength: objectives, the training loop, and the build of the digits models."""
