"""Realignment compared with the exact answer, in worlds where there is one: `python -m studies.closed_forms`."""
