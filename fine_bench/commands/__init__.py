"""The commands: arguments in, a call, an exit status out. ``COMMANDS`` lists them.

A command is the module of its name, whose ``main(argv)`` returns the exit status; ``common`` is
what they share. ``run`` and ``bank`` leave their arguments to Hydra (``hydra_help``).
"""

COMMANDS = {
    "run": "train, score and compare: what `python -m fine_bench` does",
    "leaderboard": "rebuild the tables from the records",
    "summary": "all tasks, a table a kind: each method by one measure",
    "sensitivity": "how far numbers move over preset ranges of the methods' options",
    "figures": "draw the figures from records and scores",
    "report": "write one self-contained page to look at",
    "verify": "compute one record again and compare",
    "score": "score anybody's method against a ground truth",
    "audit": "what a subset's influence says as (epsilon, delta) privacy",
    "bank": "train the models of a retraining bank, or those that it lacks",
    "truth": "condense a bank into a ground-truth file",
    "clean": "find wrong labels in your own data, at an error rate",
    "cure": "remove, relabel or weight down suspicious examples, and train again",
    "publish": "pack the records of a results folder for the repository",
}
"""Every command with one line on what it does."""
