"""`python -m stacking_ds`, which launchers can start where there is no checkout (`--module`)."""

import sys

from stacking_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
