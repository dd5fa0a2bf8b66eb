"""The command line: one module a command; see `iet_sd.__main__` and train_iet_sd.py."""
