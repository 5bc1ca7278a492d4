"""Beside training: the doctor, the planner, the compile gate."""
