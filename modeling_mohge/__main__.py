"""`python -m mohge`: see `mohge.commands`."""

import sys

from mohge.commands.main import main


sys.exit(main())
