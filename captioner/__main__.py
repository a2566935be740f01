"""`python -m captioner` is the `captioner` command."""

import sys

from captioner.cli import main

sys.exit(main())
