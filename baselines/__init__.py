"""Methods beside f-INE, in one file each: influence, gradients along the training, controls."""
