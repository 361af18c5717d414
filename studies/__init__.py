"""Comparisons with tables and figures over many seeds; ``demo.py`` runs five of them, ``common.py`` has their shared parts."""
