"""Networks of the benchmark, the schedule of their step size, and the LightningModule for them.

- ``networks``: ``mlp`` and ``cnn``; ``transformer``: a small one.
- ``lr_schedule``: the step size over a run.
- ``classifier``: the LightningModule; the only module here that imports Lightning.
"""
