"""`python -m qpo_sim` is `qpo-sim`."""

import sys

from qpo_sim.app import main

if __name__ == "__main__":
    sys.exit(main())
