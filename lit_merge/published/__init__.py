"""Published tables as data, and a run's report beside them."""
