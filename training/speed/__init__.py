"""What `python -m training.benchmark` measures, and what it compares with."""
