"""Callbacks that train and evaluate on attacked inputs.

One callback per file. ``_attack.py`` runs the attack; ``_places.py`` finds what to attack, a tensor of the
batch or the output of an embedding. For the evaluation, ``_worst_inputs.py`` computes the attacked inputs, and
``_second_state.py`` gives the module a second state for its second run. ``core/quiet.py`` lets an attack run
the module's own step without side effects.
"""

from lightning_grad.callbacks.adversarial.adversarial_evaluation import AdversarialEvaluation
from lightning_grad.callbacks.adversarial.adversarial_training import AdversarialTraining

__all__ = ["AdversarialEvaluation", "AdversarialTraining"]
