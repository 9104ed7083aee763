"""Experiments: a plan, its store, its runners and its report."""
