"""``python -m clusterfusion.hub NAME``: prints the folder of a checkpoint."""

import sys

from clusterfusion.hub import main

if __name__ == "__main__":
    sys.exit(main())
