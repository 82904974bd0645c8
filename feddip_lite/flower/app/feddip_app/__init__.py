"""FedDIP and its relatives as a Flower app; all of it is in the package `feddip_lite`."""
