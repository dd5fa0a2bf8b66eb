"""IET-AGC+ for Stable Diffusion: fine-tuning that does not memorize its training images."""
