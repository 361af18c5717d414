"""Training and evaluation on attacked inputs.

One callback a file. How inputs are attacked is in ``_attack.py``, what is attacked (a tensor of the batch, the output of an
embedding) in ``_places.py``. Of the evaluation, ``_worst_inputs.py`` finds the attacked inputs and ``_second_state.py`` lets
the module run a second time beside itself. That its own step serves for an attack without a trace is the work of
``core/quiet.py``.
"""

from lightning_grad.callbacks.adversarial.adversarial_evaluation import AdversarialEvaluation
from lightning_grad.callbacks.adversarial.adversarial_training import AdversarialTraining

__all__ = ["AdversarialEvaluation", "AdversarialTraining"]
