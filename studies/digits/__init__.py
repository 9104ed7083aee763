"""The digits: made again from nothing, measured, and compared with models trained at the target.

`python -m studies.digits` runs it.
"""
