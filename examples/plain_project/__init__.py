"""An ordinary PyTorch Lightning project: three models, three data sets, nothing else.

Files:

- ``modules.py``: the LightningModules that classify images, :class:`ImageClassifier` and its subclasses
  :class:`VisionTransformer` and :class:`ResidualConvNet`.
- ``language.py``: the LightningModule :class:`CharTransformer`, which models text.
- ``networks.py``: the plain ``nn.Module`` networks that they train.
- ``schedules.py``: the learning-rate schedules that they share.
- ``data.py``: the LightningDataModules :class:`Digits` and :class:`Text`, which need no download.
- ``cifar10.py``: the LightningDataModule :class:`CIFAR10`, which reads local files.

``examples/train.py`` is the command line of the project.
"""

from plain_project.cifar10 import CIFAR10
from plain_project.data import Digits, Text
from plain_project.language import CharTransformer
from plain_project.modules import ImageClassifier, ResidualConvNet, VisionTransformer

__all__ = [
    "CIFAR10",
    "CharTransformer",
    "Digits",
    "ImageClassifier",
    "ResidualConvNet",
    "Text",
    "VisionTransformer",
]
