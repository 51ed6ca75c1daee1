from .config import TrainingConfig, parse_config
from .loop import Trainer, TrainingResult, TrainingStopped

__all__ = ["Trainer", "TrainingConfig", "TrainingResult", "TrainingStopped", "parse_config"]
