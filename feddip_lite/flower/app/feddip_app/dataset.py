"""Who holds which data: `deal`, the configuration's data set among clients; `own_data`, what a node brings itself."""

from feddip_lite.flower.client import images_in, own_data
from feddip_lite.train.setup import deal

__all__ = ["deal", "images_in", "own_data"]
