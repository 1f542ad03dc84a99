"""The runner: from a configuration to records. It trains, and never renders.

The way of the main command, ``python -m fine_bench``::

    commands.run → sweep       Hydra's side: plan and announce all jobs, run each, end
                   schema      the configuration as dataclasses
                   config      its checks and its digests
                   calls       its sections that name a function or class
                   addresses   where moved code lies that records name
                   plan        jobs: data, cells, and which are open
                   execution   one job, as Hydra calls it
                   cells       one model is trained, every estimator asked, its scores measured
                   fit         the one set-up of Lightning's Trainer
                   backends/   how models of images, and of language, are trained and measured
                   write       records of what came out
                   progress    what is said meanwhile
                   conclusion  the leaderboard, and what is missing from it
                   launchers, checkpoints, wandb_log

and of other commands::

    recorded           the job behind a record
    verify             a record computed again
    retrain            a model trained again on treated data
    cure, cure_orders  what acting on the scores does to it
    bank, bank_config  the models of a retraining bank
    clean/             a user's own labelled data
"""
