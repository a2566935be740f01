"""The browser demo: `captioner-demo`, or `python -m app` in a checkout. It is installed as `captioner_app`."""
