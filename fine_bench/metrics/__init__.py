"""Metrics: pure functions from scores (and the truth) to numbers, without input or output.

``registry`` is how a metric declares its label, direction and unit, and how it is found.

- Of one run: ``detection`` (are the bad examples at the suspicious end), ``top`` (what a person who
  inspects the top finds), ``error_rate`` (flags with a bounded share of false ones), ``cost``.
- Between runs: ``consistency``, ``stable`` (are the examples that all runs flag the right ones);
  ``intervals`` over seeds, and paired differences.
- Against retraining: ``retraining`` (μ of every example from a bank of models), ``reliability``
  (its noise ceiling), ``fidelity``, ``out_of_sample`` (the truth of loss-like scores), ``limits``
  (what retraining says, beside the numbers of methods), ``lds``, ``lds_interval`` (over queries),
  ``outcome_spread`` (do scores foretell how much a query varies between runs), ``definition`` (μ by
  its definition, on a sample of sets), ``gaussianity`` (what one number μ leaves out).
- Of groups and treatments: ``groups``, ``agreement`` (of the paper's estimator with the all-example
  one), ``cure``.
"""
