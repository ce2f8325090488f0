"""`python -m gemma_qat`: the same as the command `gemma-qat`."""

import sys

from gemma_qat.cli.main import main

sys.exit(main())
