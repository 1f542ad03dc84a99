"""f-INE: formulas and schedules, without any training framework."""
