"""Rivals of this project's ES behind one signature: `start`, then `ask` and `tell` in turns, and `params`.

A method is a module: state in, rewards in, parameters out. `GRID` holds the settings that a sweep tries, `DEFAULTS` the
rest.
"""
