"""Every exported technique against the eight guarantees; the techniques are listed in ``settings.py``."""
