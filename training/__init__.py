"""Training, evaluation and data preparation for `captioner`."""

# What its commands begin with: the name of the package differs between a checkout and an installation.
COMMAND = f"python -m {__name__}"
