"""The runner: Hydra job → training with callbacks → estimators → metrics → records."""
