"""Fine-tune Stable Diffusion with IET-AGC+.

accelerate launch train_iet_sd.py --config configs/demo.yaml
"""

import sys

from iet_sd.cli.train import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
