"""The browser demo: `python -m app`."""
