"""Retrained models and what they say: banks of them, and the ground truth condensed from a bank.

``fine-bench bank`` trains thousands of models on random subsets (a *bank*). ``fine-bench truth
BANK_FOLDER --name mnist_mlp --version 1`` condenses it into
``results/ground_truth/mnist_mlp.safetensors``, with which any method can be scored without
retraining (``fine-bench score``), and by which the runner's records get their fidelity.

- ``design``: which models a bank consists of, their subsets and seeds.
- ``train``, ``train_dense``, ``train_mapped``: many models at once, by one recipe; fully connected
  networks the fast way, all others through ``torch.func``.
- ``build``: train the models that a bank lacks, over several processes.
- ``bank``, ``identity``, ``outputs``: the folder, which bank it is, and what its models put out.
- ``definition``: influence by its definition (all data against all data without a set).
- ``condense``, ``truth``, ``truth_files``: from a bank to a ground truth, what that says of scores,
  and its file.
- ``oracles``: what retraining itself says, scored as if it were a method, for the tables.

The models are divided into two halves, by even and odd subsets, and a truth is made of each: what
is *developed* on one half is *published* with the other. The subsets of the linear datamodeling
score are divided the same way. A truth never changes under its version: another bank, or more
models, is a higher version.
"""
