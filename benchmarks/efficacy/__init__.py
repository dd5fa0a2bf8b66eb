"""The efficacy study: does the method memorize less at equal quality, and by how much?

    python -m benchmarks.efficacy run --minutes 55     missing cells, one process each
    python -m benchmarks.efficacy report               RESULTS.md and its pictures

A cell is one training run with readings at round boundaries (`readings`), by the command line of
`iet_sd` in a process of its own. What it measured is one parquet file under ``results/``, which is
committed; `study` says which cells there are and in which order, `methods` what a method is,
`controls` what some of them swap out. `analysis` has the numbers as functions of arrays.
"""
