"""Adversarial training, and the learning rate that follows the gradient of an accuracy.

One callback a file. How inputs are attacked is in ``_attack.py``, what is attacked (a tensor of the batch, the output of an
embedding) in ``_places.py``, how an evaluation is run a second time beside itself in ``_second_state.py``. That the module's
own step serves for the attack without a trace is the work of ``_quiet.py``, one folder up.
"""

from lightning_grad.callbacks.adversarial.accuracy_gradient_lr import AccuracyGradientLR
from lightning_grad.callbacks.adversarial.adversarial_evaluation import AdversarialEvaluation
from lightning_grad.callbacks.adversarial.adversarial_training import AdversarialTraining

__all__ = ["AccuracyGradientLR", "AdversarialEvaluation", "AdversarialTraining"]
