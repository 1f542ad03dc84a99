"""The two ways of training a task: images by SGD, language models by AdamW on LoRA.

choice           which one a job has, and what each offers
trained          a trained run, where it is kept, what its scores are measured by
images           tasks of class labels
language         tasks of token sequences
language_tuning  one tuning, and how a tuned model is measured
language_cure    tuned again without what is suspected
"""
