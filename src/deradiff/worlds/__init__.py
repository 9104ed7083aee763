"""Models small enough to be sure with."""
