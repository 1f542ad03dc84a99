"""The two ways of training a task: images by SGD, language models by AdamW on LoRA."""
