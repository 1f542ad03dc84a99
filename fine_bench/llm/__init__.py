"""Language models: find the poison in instruction tuning. Needs the extra ``llm``.

task             the task, from generated data or the user's files
world, corpus    the small world of the generated texts, and plain text about it
instructions     the generated instruction set with its poison
jsonl            instruction data from files
tokens           from conversations to token ids
models           which language model is tuned, and how
hub, pretraining weights from the hub, and the small model that is trained here
net              logits from padded token ids
tuner            tuning under Lightning
engine           per-example gradients of sequences
watchers         f-INE for sequences
trainer_callback f-INE in Transformers' Trainer: its events, its checkpoints
trainer_loop     its training loop, watched
trainer_batches  positions that travel with its batches
trainer_losses   what divides its losses, read off the gradient
steering         did the poison take?
"""
