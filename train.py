"""The main job for launchers: `deepspeed --hostfile hosts train.py --recipe NAME`.

The same program as `stacking-ds train`; `--help` lists its options.
"""

import sys

from stacking_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
