"""The frozen ground truth of one task and recipe: what a retraining bank says, in a small file.

``fine-bench truth BANK_FOLDER --name mnist_mlp --version 1`` condenses a bank of
thousands of models into ``results/ground_truth/mnist_mlp.safetensors``. With it any method can be
scored without retraining (``fine-bench score``), and the runner's records get their
fidelity.

The models are divided into two halves, by even and odd subsets, and a truth is made of each: what
is *developed* on one half is *published* with the other. The subsets of the linear datamodeling
score are divided the same way.

A truth never changes under its version: another bank, or more models, is a higher version.
"""
