from .distances import LPIPS, PseudoHuber, l1, l2
from .pid import PIDLoss

__all__ = ["LPIPS", "PIDLoss", "PseudoHuber", "l1", "l2"]
