"""Runs of notebooks, experiments and studies: one, or the many of a sweep, here or on a
cluster, with nothing lost.

`parameters` checks what a run may be told, `inputs` sums up what decides its result,
`runs` runs a notebook, `jobs` are the things that can be run, `workers` does one job
safely, `sweeps` does many, `summaries` shows what they found.
"""

__all__: list[str] = []
