"""K-FAC (Kronecker-factored approximate curvature) for PyTorch.

`KFAC` is an optimizer; `KFACPreconditioner` is the same engine in front of any other optimizer. `graphed_step` makes a training
step one CUDA graph.
"""

from .adam import KFACAdam
from .fisher.likelihood import Likelihood
from .optimizer import KFAC
from .preconditioner import KFACPreconditioner
from .training_graph import GraphedStep, graphed_step

__version__ = "0.2.0"  # the one place: pyproject.toml reads it from here without importing the package

__all__ = ["KFAC", "GraphedStep", "KFACAdam", "KFACPreconditioner", "Likelihood", "__version__", "graphed_step"]
