"""``python -m fast_prompt``: the same as ``fast-prompt``."""

import sys

from fast_prompt.cli import main

sys.exit(main())
