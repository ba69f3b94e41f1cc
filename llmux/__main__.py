"""``python -m llmux`` is the command ``llmux``."""

import sys

from llmux.cli.main import main

sys.exit(main())
