"""Fine-tune Stable Diffusion with IET-AGC+.

accelerate launch train_iet_sd.py --config configs/demo.yaml
"""

import sys

from iet_sd.cli.train import train
from iet_sd.engine.stopping import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()
    sys.exit(train(sys.argv[1:]))
