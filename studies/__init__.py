"""What was measured: run by hand, `python -m studies.NAME`, and written to studies/results."""
