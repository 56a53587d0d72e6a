"""K-FAC (Kronecker-factored approximate curvature) for PyTorch.

`KFAC` is an optimizer; `KFACPreconditioner` is the same engine in front of any other optimizer.
"""

from .fisher.likelihood import Likelihood
from .optimizer import KFAC
from .preconditioner import KFACPreconditioner

__version__ = "0.2.0"  # the one place: pyproject.toml reads it from here without importing the package

__all__ = ["KFAC", "KFACPreconditioner", "Likelihood", "__version__"]
