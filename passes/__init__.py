"""Policy: one transformation per file; `pipelines.py` is the list, in order, with a reason for each."""
