"""Checkpoints that lie in parts, one a process or a group of processes: joined where their layout says how."""
