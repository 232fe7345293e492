"""What is measured of a model to compress it well."""
