"""Speed and memory, as ratios to a baseline of the same run; ``common.py`` has the shared parts."""
