"""Networks of the benchmark, their learning-rate schedule, and the LightningModule that trains them.

- ``networks``: ``mlp`` and ``cnn``; ``transformer``: a small one.
- ``lr_schedule``: the step size over a run.
- ``classifier``: the LightningModule; the only module here that imports Lightning.
"""
