"""Finding the architecture: a bandit over the parts of a model, and the searches that draw from it."""

from fast_prompt.search.bandit import Bandit
from fast_prompt.search.das import DASSearch, DASSettings
from fast_prompt.search.dvp import DVPSearch
from fast_prompt.search.retraining import train_anew
from fast_prompt.search.settings import SearchSettings, TrainingSettings

__all__ = ["Bandit", "DASSearch", "DASSettings", "DVPSearch", "SearchSettings", "TrainingSettings", "train_anew"]
