"""Run the command `resnet56` with `python -m resnet56`."""

import sys

from resnet56.cli import main

if __name__ == "__main__":
    sys.exit(main())
