"""The papers' mathematics on tensors: it knows no pipeline."""
