"""Parameter groups, optimizers and learning-rate schedules; none of them knows an engine."""
