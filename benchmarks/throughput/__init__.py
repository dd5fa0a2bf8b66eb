"""How fast is training, against diffusers' own scripts, by size, and by part of a step?

    python -m benchmarks.throughput compare --diffusers_scripts FOLDER
    python -m benchmarks.throughput scaling
    python -m benchmarks.throughput profile --diffusers_scripts FOLDER

On a pipeline of random weights with Stable Diffusion 1.5's proportions of work
(`benchmarks.throughput.pipeline`). Rows are in `benchmarks.throughput.rows`.
"""
