"""Language models: find the poison in instruction tuning. Needs the extra ``llm``."""
