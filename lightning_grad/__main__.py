"""``python -m lightning_grad`` is the same as ``lightning-grad``."""

from lightning_grad.cli import main

if __name__ == "__main__":
    main()
