"""`python -m specexit` is the `specexit` command."""

import sys

from specexit.cli import main

sys.exit(main())
