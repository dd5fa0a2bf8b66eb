"""Stable Diffusion as trained here: loading, what of it is trainable, attention kernels, saving."""
