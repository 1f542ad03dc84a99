"""Numbers alone: what a test can tell, what follows from it, and how it is estimated.

- ``tradeoff``: trade-off functions, their evaluation, inverse, symmetric hull and dual δ(ε).
- ``families``, ``piecewise_linear``, ``subsampling``: normal and Laplace shifts; functions with
  corners, from samples too; data that take part in a step only sometimes.
- ``ordering``: which of two functions means more influence, and where they cross.
- ``composition``, ``central_limit``: many steps together, and their Gaussian limit.
- ``privacy``: the bridge to (ε, δ), and what a μ says as privacy.
- ``error_rates``, ``estimation``, ``p_values``: from samples to error rates, μ̂ with its interval,
  and p-values; ``serial``: what correlation from step to step leaves of a sample.
- ``decision``: what a μ with its interval lets an auditor tell; ``repeats``: what of a run's flags
  another run would flag too.
- ``false_discovery``: conformal p-values and Benjamini–Hochberg.
- ``arrays``: arguments, checked.
"""
