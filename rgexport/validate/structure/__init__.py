"""The structure of an artifact: whether its graph is the one that the exporter writes."""
