"""What training needs to be told, as settings and as flags; and all fields there are."""

import dataclasses

from iet_sd.config import Config

NEEDED = {"pretrained_model_name_or_path": "some/model", "train_data_dir": "pictures"}
FLAGS = [part for key, value in NEEDED.items() for part in (f"--{key}", value)]
FIELDS = {f.name: f for cls in Config.sections().values() for f in dataclasses.fields(cls)}
