"""How f-INE watches a training run, without any training framework: schedules and geometries."""
