"""Adversarial attacks on inputs."""

from lightning_grad.functional.adversarial.attacks import IndependentLossError, fgsm, pgd

__all__ = ["IndependentLossError", "fgsm", "pgd"]
