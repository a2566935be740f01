"""Training, evaluation and data preparation for `captioner`."""
