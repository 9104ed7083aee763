"""Realignment inside other people's programs. A module here imports its host only when the host calls it."""
