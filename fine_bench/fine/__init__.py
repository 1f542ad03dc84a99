"""f-INE: how well a test can tell a model trained with an example from one trained without it.

Formulas and what carries them out; Lightning stands one floor up, in ``fine_bench.callback``.

What is computed:

- ``effects``: an example's effect on one step's statistic, and the noise it stands out from.
- ``accumulator``: effects of all steps summed to μ; ``snapshot_accumulator``: the same for
  snapshots.
- ``standard_error``: the error of μ that a run shows of itself; ``group_parts``: that of a group's.
- ``kernel_scores``: for queries, from a regression that stands for the average run;
  ``kernel_system``: what is solved; ``kernel_states``: at which parameters its kernels are taken.
- ``geometry``: in which product gradients are compared; ``geometry_optimiser``: in the optimiser's
  own.

A run that is watched:

- ``options``: everything that can be asked for, with defaults and refusals.
- ``setup``: what a run needs before its first step; ``first_batch``: what is taken for granted of
  it, looked at once. ``loss_graph``: whether the training loss mixes examples; ``mixtures``:
  whether its batches do.
- ``observable``: what is measured where nobody says it; ``head_gradients``: 1 − p and labels, read
  where the loss begins.
- ``observation``: what a trainer or a loop tells, handed on to the schedule.
- ``watch``: a loop in plain PyTorch; ``loop``: what it tells and what shows by itself;
  ``loop_batch``, ``loop_checks``: its batches, and what it is refused for; ``criterion``: loss
  modules.
- ``aside``: passes that leave modes and random states alone; ``question``: what is asked, as a
  digest.
- ``training_data``, ``batch_adapter``: examples by position, and where things are in a batch.
- ``passes``: gradients beside the training's own: queries, curvature.
- ``in_batch``: an example is observed when it is in the batch. ``micro_batches``: what a step is
  put together from; ``draws``: examples that stand in it twice; ``short_steps``: too few of them;
  ``step_sizes``: what each parameter counts in it; ``statistic``: what is taken
  of it; ``gradient_queue``, ``step_queue``: small
  steps handled together; ``distributed``: the examples of other processes.
- ``snapshot``: all examples are scored at the same parameters, now and then.
  ``kernel_snapshot``: the same for the regression.

The paper's own estimator, for single examples and groups:

- ``subset_options``: everything that can be asked for.
- ``subsets``: what is watched, and batches with and without it.
- ``subset_sampler``: these batches measured at one step; ``subset_samples``: the samples of a run.
- ``subset_test``: the test on them.
"""
