"""The runner: from a configuration to records. It trains, and never renders.

The way of the main command, ``python -m fine_bench``::

    commands.run → sweep     Hydra's side: check all jobs, run each, show the leaderboard
                   config    the configuration as dataclasses, and its digests
                   calls     its sections that name a function or class
                   addresses where moved code lies that records name
                   plan      jobs: data, cells, and which are open
                   cells     one model is trained, every estimator asked, its scores measured
                   fit       the one set-up of Lightning's Trainer
                   backends/ how models of images, and of language, are trained and measured
                   write     records of what came out
                   progress  what is said meanwhile
                   launchers, checkpoints, wandb_log

and of other commands::

    verify             a record computed again
    bank, bank_config  the models of a retraining bank
    retrain, cure      models trained again without what scores call bad
    clean/             a user's own labelled data
"""
