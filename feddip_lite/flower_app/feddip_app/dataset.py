"""Who holds which data: `deal`, the configuration's data set among clients; `own_data`, what a node brings itself."""

from feddip_lite.federation import deal
from feddip_lite.flower_client import images_in, own_data

__all__ = ["deal", "images_in", "own_data"]
