"""``python -m iet_sd COMMAND``, also as ``accelerate launch -m iet_sd COMMAND``."""

import sys

from iet_sd.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
