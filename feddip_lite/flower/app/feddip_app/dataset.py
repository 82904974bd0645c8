"""Who holds which data: `deal`, the configuration's data set among clients; `own_data`, what a node brings itself."""

from feddip_lite.data.own import read_images
from feddip_lite.flower.client import own_data
from feddip_lite.train.setup import deal

__all__ = ["deal", "own_data", "read_images"]
