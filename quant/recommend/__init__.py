"""Which presets fit a device, in which order, with the arithmetic, from headers alone."""

from quant.recommend.advice import Advice, recommend
from quant.recommend.needs import TASKS, Need, Option

__all__ = ["TASKS", "Advice", "Need", "Option", "recommend"]
