"""Functions that answer requests; the table `app.ENDPOINTS` has their paths."""
